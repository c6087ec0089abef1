"""The trainer on a tiny model: what a round gives, what ends it early, and what it says when the model is broken."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from edge_client.config import KernelConfig, ModelConfig
from edge_client.events import Evaluated, Trained, TrainingFailed
from edge_client.jobs import HeldOutReport, Job, Report, StepReport
from edge_client.model import LoadedModel
from edge_client.trainer import ModelTrainer
from shared.messages import Plan, Run
from shared.seeds import draw
from shared.steprule import deltas
from shared.wire import coefficients_to_bytes, scalars_from_bytes
from tests.driven_session import PLAN
from tests.test_fleet import base_of, reviews
from tests.tiny_models import tiny_model, tiny_tokenizer

SEEDS = 256
WORK = msgspec.structs.replace(PLAN, local_steps=5, batch_size=2)


def run_of(scalar_format: str = "f32") -> Run:
    base = base_of("llama", "fp32")
    digest = base.manifest.digest()
    formats = (scalar_format, "f32", False)
    return Run("demo", "llama", "fp32", "hadamard", SEEDS, 9, base.manifest.pack(), digest, base.base_digest, *formats)


def trainer_of(folder: Path, device: str = "ann", *, poison: bool = False, scalar_format: str = "f32") -> ModelTrainer:
    """A trainer that has loaded and rebuilt version 3."""

    def load(run: Run) -> LoadedModel:
        model = tiny_model("llama")
        if poison:
            next(iter(model.parameters())).data.fill_(float("nan"))
        return LoadedModel(model, tiny_tokenizer(), "tiny", "fp32", torch.device("cpu"), ())

    said: list[str] = []
    data, kernel = reviews(folder, "same"), KernelConfig(name="torch")
    trainer = ModelTrainer(device, data, model=ModelConfig(), kernel=kernel, say=said.append, load=load)
    trainer.load(run_of(scalar_format))
    trainer.rebuild(3, coefficients_to_bytes(np.zeros(SEEDS, np.float32)))
    assert said[0].startswith("data: ")
    assert said[1].startswith("kernel torch (was asked for), ")
    return trainer


def played(job: Job, conclude_after: int = 10**9) -> tuple[list[Report], object]:
    """All reports, and what came of it."""
    reports = []
    try:
        reports.append(next(job))
        while True:
            reports.append(job.send(len(reports) >= conclude_after))
    except StopIteration as end:
        return reports, end.value


def update_of(job: Job, **how: int) -> np.ndarray:
    end = played(job, **how)[1]
    assert isinstance(end, Trained)
    return scalars_from_bytes(end.update.scalars, "f32")


def test_round_gives_every_step_and_an_update_that_replays_to_the_devices_coefficients(tmp_path):
    trainer = trainer_of(tmp_path)
    reports, end = played(trainer.train(WORK, b"d" * 16))
    assert [report.step for report in reports if isinstance(report, StepReport)] == [1, 2, 3, 4, 5]
    assert isinstance(end, Trained)
    update = end.update
    assert (update.round, update.model_digest, update.held_out_loss) == (3, b"d" * 16, None)
    assert update.train_loss == pytest.approx(np.mean([report.loss for report in reports]))  # type: ignore[union-attr]
    scalars = scalars_from_bytes(update.scalars, "f32")
    a = np.zeros(SEEDS, np.float32)
    for seed, delta in zip(draw(WORK.nonce, "ann", 5, SEEDS, None), deltas(WORK.step, scalars), strict=True):
        a[seed] += delta
    np.testing.assert_array_equal(trainer.overlay.coefficients, a)
    assert np.any(a)


def test_device_steps_by_the_scalars_as_they_travel(tmp_path):
    trainer = trainer_of(tmp_path, scalar_format="f16")
    _, end = played(trainer.train(WORK, b"d" * 16))
    assert isinstance(end, Trained)
    assert len(end.update.scalars) == 2 * 5
    seeds = draw(WORK.nonce, "ann", 5, SEEDS, None)
    assert len(set(seeds.tolist())) == 5
    moved = deltas(WORK.step, scalars_from_bytes(end.update.scalars, "f16"))
    np.testing.assert_array_equal(trainer.overlay.coefficients[seeds], moved)


def test_concluded_round_sends_the_steps_that_are_done(tmp_path):
    whole = update_of(trainer_of(tmp_path).train(WORK, b"d" * 16))
    part = update_of(trainer_of(tmp_path).train(WORK, b"d" * 16), conclude_after=2)
    np.testing.assert_array_equal(part, whole[:2])


def test_evaluation_that_is_asked_for_comes_first_and_conclusion_waits_for_a_step(tmp_path):
    plan: Plan = msgspec.structs.replace(WORK, evaluate=True)
    reports, end = played(trainer_of(tmp_path).train(plan, b"d" * 16), conclude_after=1)
    assert isinstance(end, Trained)
    kinds = [type(report) for report in reports]
    assert kinds == [HeldOutReport] * (len(kinds) - 1) + [StepReport]
    last = reports[-2]
    assert isinstance(last, HeldOutReport)
    assert (end.update.held_out_loss, end.update.held_out_accuracy) == (last.loss, last.accuracy)
    assert last.loss is not None
    assert last.accuracy is not None
    assert last.done == last.examples


def test_devices_take_their_examples_in_an_order_of_their_own(tmp_path):
    common = msgspec.structs.replace(WORK, common_seeds=True)
    ann = update_of(trainer_of(tmp_path, "ann").train(common, b"d" * 16))
    bob = update_of(trainer_of(tmp_path, "bob").train(common, b"d" * 16))
    again = update_of(trainer_of(tmp_path, "ann").train(common, b"d" * 16))
    np.testing.assert_array_equal(ann, again)
    assert not np.array_equal(ann, bob)


@pytest.mark.parametrize("evaluate", [False, True])
def test_model_that_gives_nan_fails_the_round_with_a_reason(tmp_path, evaluate):
    plan = msgspec.structs.replace(WORK, evaluate=evaluate)
    _, end = played(trainer_of(tmp_path, poison=True).train(plan, b"d" * 16))
    assert isinstance(end, TrainingFailed)
    assert end.round == 3
    assert "nan" in end.reason


def test_last_evaluation_of_a_broken_model_is_no_reason_to_fail(tmp_path):
    assert played(trainer_of(tmp_path, poison=True).evaluate(3))[1] == Evaluated(3)
    reports, end = played(trainer_of(tmp_path).evaluate(3))
    assert end == Evaluated(3)
    assert isinstance(reports[-1], HeldOutReport)
    assert reports[-1].loss is not None


def test_digest_that_is_reported_is_that_of_the_rebuilt_weights(tmp_path):
    trainer = trainer_of(tmp_path)
    a = np.zeros(SEEDS, np.float32)
    assert trainer.rebuild(4, coefficients_to_bytes(a)) == trainer.overlay.base_digest()[:16]
    a[3] = 0.5
    assert trainer.rebuild(5, coefficients_to_bytes(a)) == trainer.overlay.model_digest()[:16]
    assert trainer.overlay.model_digest() != trainer.overlay.base_digest()
