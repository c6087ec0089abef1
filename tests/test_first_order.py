"""A first-order device's round in the trainer: its update, a kill in the middle, memory, refusals, budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edge_client import trainer as trainers
from edge_client.config import KernelConfig, ModelConfig
from edge_client.events import Trained
from edge_client.first_order import REST_BYTES, GradientSettings, numbers_for, told
from edge_client.first_order_gradient import OffsetGradient
from edge_client.first_order_kept import KeptGradient
from edge_client.first_order_steps import step_rms_of, steps_of
from edge_client.fit import Fit
from edge_client.jobs import HeldOutReport, StepReport
from edge_client.model import LoadedModel
from edge_client.state_files import Owner
from edge_client.trainer import ModelTrainer
from shared.changes import read_change
from shared.errors import UserError
from shared.messages import NormalisedStep, Run, Update
from shared.steprule import check_length, longest_change
from shared.wire import coefficients_to_bytes
from tests.test_fleet import reviews
from tests.test_trainer import SEEDS, WORK, played
from tests.test_trainer import run_of as forward_run
from tests.tiny_models import tiny_model, tiny_tokenizer

RULE = NormalisedStep(step_rms=1e-3, clip=3.0, decay=0.99, prior_mean_square=0.0, prior_count=0)
PLAN = msgspec.structs.replace(WORK, local_steps=15, step=RULE)  # six gradient steps
DIGEST = b"d" * 16


def run_of(**fields: Any) -> Run:
    return msgspec.structs.replace(forward_run(), **{"first_order": True, **fields})


def trainer_of(
    folder: Path,
    estimator: Any = "gradient",
    run: Run | None = None,
    said: list[str] | None = None,
    round_bytes: int = 0,
) -> ModelTrainer:
    """A trainer that has loaded and rebuilt version 3; what must survive lies in `folder`."""
    folder.mkdir(exist_ok=True)
    say = [].append if said is None else said.append
    kept = KeptGradient(folder, Owner("localhost:1883", "demo", "ann"), "kseed test", say, lambda: 0.0)

    def load(run: Run) -> LoadedModel:
        return LoadedModel(tiny_model("llama"), tiny_tokenizer(), "tiny", "fp32", torch.device("cpu"), ())

    trainer = ModelTrainer(
        "ann", reviews(folder, "same"), model=ModelConfig(), kernel=KernelConfig(), say=say, load=load,
        gradient=GradientSettings(estimator, kept, round_bytes),
    )  # fmt: skip
    trainer.load(run or run_of())
    trainer.rebuild(3, coefficients_to_bytes(np.zeros(SEEDS, np.float32)))
    return trainer


def update_of(trainer: ModelTrainer, **how: int) -> Update:
    end = played(trainer.train(PLAN, DIGEST), **how)[1]
    assert isinstance(end, Trained)
    return end.update


def test_the_update_tells_a_change_of_all_coefficients_that_lowers_the_loss(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    reports, end = played(trainer.train(msgspec.structs.replace(PLAN, evaluate=True), DIGEST))
    assert isinstance(end, Trained)
    steps = [report for report in reports if isinstance(report, StepReport)]
    assert [(step.step, step.steps, step.scalar) for step in steps] == [(step, 6, None) for step in range(1, 7)]
    update = end.update
    assert (update.round, update.scalars, update.model_digest) == (3, b"", DIGEST)
    assert update.train_loss == pytest.approx(np.mean([step.loss for step in steps]))
    assert update.change is not None and update.change.seeds is None
    _, values = read_change(update.change, "f32", SEEDS)
    check_length(values, PLAN.step, PLAN.local_steps)
    trainer.rebuild(4, coefficients_to_bytes(values))
    after, _ = played(trainer.evaluate(4))
    assert isinstance(after[-1], HeldOutReport) and after[-1].loss is not None and update.held_out_loss is not None
    assert after[-1].loss < update.held_out_loss - 0.05


def test_a_kill_in_the_middle_of_the_round_changes_nothing(tmp_path: Path) -> None:
    whole = update_of(trainer_of(tmp_path / "whole"))
    job = trainer_of(tmp_path / "killed").train(PLAN, DIGEST)
    for _ in range(3):
        next(job)
    job.close()  # its last save was after step 1: the clock stands still
    said: list[str] = []
    again = update_of(trainer_of(tmp_path / "killed", said=said))
    assert again == whole
    assert "round 3: going on after gradient step 1 of 6" in said


def test_a_concluded_round_tells_the_steps_that_are_done(tmp_path: Path) -> None:
    update = update_of(trainer_of(tmp_path), conclude_after=2)
    assert update.change is not None
    _, values = read_change(update.change, "f32", SEEDS)
    assert 0 < np.linalg.norm(values) <= 2 * step_rms_of(PLAN) * 1.001 < steps_of(PLAN) * step_rms_of(PLAN)


def test_what_rounding_and_a_small_budget_leave_out_is_told_in_later_rounds(tmp_path: Path) -> None:
    run = run_of(scalar_format="f8")
    trainer = trainer_of(tmp_path, run=run, round_bytes=REST_BYTES + 120)  # 2 bits for each of 256
    first = update_of(trainer).change
    assert first is not None and first.seeds is None and len(first.values) == 64
    kept = trainer._first_order._kept.read  # type: ignore[union-attr]
    now = kept(_digest_of(run), SEEDS)
    assert now is not None and now.told is not None
    seeds, values = read_change(first, "f8", SEEDS)
    assert np.array_equal(now.told[seeds], values.astype(np.float64))
    following = now.followed_by(b"n" * 32, 4)
    assert np.allclose(following.unsaid + now.told, now.to_say, atol=1e-12)
    assert np.linalg.norm(following.unsaid) > np.linalg.norm(now.to_say) / 10


def test_what_a_refused_update_told_of_earlier_rounds_is_told_by_the_next(tmp_path: Path) -> None:
    run = run_of(scalar_format="f8")
    trainer = trainer_of(tmp_path, run=run, round_bytes=REST_BYTES + 120)  # 2 bits for each of 256
    kept = trainer._first_order._kept  # type: ignore[union-attr]

    def unsaid_before(number: int) -> np.ndarray:
        end = played(trainer.train(msgspec.structs.replace(PLAN, round=number, nonce=bytes([number]) * 16), DIGEST))[1]
        assert isinstance(end, Trained)
        now = kept.read(_digest_of(run), SEEDS)
        assert now is not None and now.told is not None
        return now.unsaid

    assert not unsaid_before(3).any()
    carried = unsaid_before(4)
    assert carried.any()
    kept.take_back(4)
    assert np.array_equal(unsaid_before(5), carried)
    assert not np.array_equal(unsaid_before(6), carried)


def _digest_of(run: Run) -> bytes:
    import hashlib

    from shared.wire import encode

    return hashlib.sha256(encode(run)).digest()


def test_without_memory_for_backprop_the_round_is_done_with_forward_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def measure(*args: Any) -> Any:
        sizes.append(args[-1])
        raise MemoryError("out of memory")

    said: list[str] = []
    trainer = trainer_of(tmp_path, said=said)
    monkeypatch.setattr(OffsetGradient, "measure", measure)
    update = update_of(trainer)
    assert update.change is None and len(update.scalars) == 4 * PLAN.local_steps
    assert sizes == [None, 1]  # both sequences, then one
    assert said[-1].startswith("warning: gradient step: memory ran out with a single sequence")
    assert said[-1].endswith("Going on with forward passes alone.")
    assert update_of(trainer).change is None


def test_a_gradient_begins_with_as_many_sequences_at_once_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    kept = KeptGradient(tmp_path, Owner("localhost:1883", "demo", "ann"), "kseed test", print, lambda: 0.0)
    trainer = ModelTrainer(
        "ann", reviews(tmp_path, "same"), model=ModelConfig(source=str(tmp_path / "model")), kernel=KernelConfig(),
        say=print, gradient=GradientSettings("gradient", kept),
    )  # fmt: skip
    monkeypatch.setattr(trainers, "fit_of", lambda *_, **__: Fit("loaded", "fp32", "unpacked", 1, "one fits"))
    trainer.load(run_of())
    trainer.rebuild(3, coefficients_to_bytes(np.zeros(SEEDS, np.float32)))
    measure, sizes = OffsetGradient.measure, []

    def watched(self: OffsetGradient, model: Any, batch: Any, at_once: int | None) -> Any:
        sizes.append(at_once)
        return measure(self, model, batch, at_once)

    monkeypatch.setattr(OffsetGradient, "measure", watched)
    assert update_of(trainer).change is not None
    assert sizes == [1] * steps_of(PLAN)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"first_order": False}, "the run takes no updates of devices with exact gradients (first_order = refuse)"),
        ({"directions": "gaussian"}, "the run's directions are gaussian, and exact gradients need hadamard"),
    ],
)
def test_a_run_without_exact_gradients_is_refused_or_joined_with_forward_passes(
    fields: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        trainer_of(tmp_path, "gradient", run_of(**fields))
    assert str(refused.value) == f"{why}. Join with the estimator forward."
    said: list[str] = []
    assert update_of(trainer_of(tmp_path, "auto", run_of(**fields), said)).change is None
    assert f"estimator forward, because {why}" in said


@pytest.mark.parametrize(("numbers", "bits"), [(32, 4), (16, 2), (8, 1)])
def test_all_numbers_in_few_bits_are_told_where_there_is_room_for_them(numbers: int, bits: int) -> None:
    to_say = np.random.default_rng(0).standard_normal(SEEDS).astype(np.float32)
    for longest in (1e9, 1e-3):
        change = told(to_say, "f16", numbers, longest)
        assert (change.seeds, len(change.values)) == (None, SEEDS * bits // 8)
        _, values = read_change(change, "f16", SEEDS)
        assert np.dot(values, to_say) > 0.7 * np.linalg.norm(values) * np.linalg.norm(to_say)
        assert np.linalg.norm(values) <= longest
    _, nothing = read_change(told(np.zeros(SEEDS, np.float32), "f16", numbers, 1.0), "f16", SEEDS)
    assert not nothing.any()


def test_estimator_forward_takes_no_gradients(tmp_path: Path) -> None:
    assert update_of(trainer_of(tmp_path, "forward")).change is None
    assert update_of(trainer_of(tmp_path, "auto")).change is not None


def test_a_budget_has_room_for_all_numbers_or_the_largest() -> None:
    run = run_of(scalar_format="f16")
    assert numbers_for(0, run) == numbers_for(REST_BYTES + 2 * SEEDS, run) == SEEDS
    assert numbers_for(REST_BYTES + 400, run) == 100
    assert numbers_for(1, run) == 16


def test_the_largest_numbers_are_told_and_no_more_than_the_aggregator_takes() -> None:
    to_say = np.random.default_rng(0).standard_normal(SEEDS).astype(np.float32)
    seeds, values = read_change(told(to_say, "f32", 4, 1e9), "f32", SEEDS)
    assert len(seeds) == 4 and np.array_equal(values, to_say[seeds])
    assert np.abs(values).min() >= np.sort(np.abs(to_say))[-4]
    longest = longest_change(RULE, 1)
    for form in ("f32", "f16", "f8"):
        _, values = read_change(told(to_say, form, SEEDS, longest), form, SEEDS)  # type: ignore[arg-type]
        assert 0.8 * longest < np.linalg.norm(values) <= longest
    _, nothing = read_change(told(np.zeros(SEEDS, np.float32), "f16", SEEDS, longest), "f16", SEEDS)
    assert not nothing.any()
