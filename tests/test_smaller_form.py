"""A model that does not fit goes on in a smaller form: the same weights, read from their files as they are used."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edge_client import trainer as trainers
from edge_client.config import KernelConfig, ModelConfig
from edge_client.events import Evaluated, Trained, TrainingFailed
from edge_client.first_order import GradientSettings
from edge_client.first_order_kept import KeptGradient
from edge_client.jobs import HeldOutReport, StepReport
from edge_client.model import LoadedModel
from edge_client.state_files import Owner
from edge_client.trainer import ModelTrainer
from shared.errors import UserError
from shared.wire import coefficients_to_bytes
from tests.test_fleet import reviews
from tests.test_shortage import FOUR, MORE_THAN_ANY_MACHINE, ROOT, allow, scalars
from tests.test_trainer import SEEDS, played, run_of
from tests.tiny_models import tiny_model, tiny_tokenizer


def saved(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trainer_of(folder: Path, said: Callable[[str], None] = print, **model: Any) -> ModelTrainer:
    """A trainer that has loaded from files and rebuilt version 3, one sequence at once."""
    source = folder / "model"
    config = ModelConfig(source=str(source if source.exists() else saved(source)), **model)
    trainer = ModelTrainer("ann", reviews(folder, "same"), model=config, kernel=KernelConfig(name="torch"), say=said)
    trainer.load(run_of())
    trainer._portions.at_once = 1
    trainer.rebuild(3, coefficients_to_bytes(np.linspace(-1e-3, 1e-3, SEEDS, dtype=np.float32)))
    return trainer


def test_a_round_goes_on_where_it_was_with_the_weights_in_their_files(tmp_path: Path) -> None:
    whole = scalars(trainer_of(tmp_path))
    said: list[str] = []
    trainer = trainer_of(tmp_path, said.append)
    job = trainer.train(FOUR, b"d" * 16)
    first = next(job)
    assert isinstance(first, StepReport) and first.step == 1
    del said[:]
    allow(trainer, 0)  # the model that is loaded now; the next one is another
    reports, end = played(job)
    assert [report.step for report in reports if isinstance(report, StepReport)] == [2, 3]
    assert isinstance(end, Trained)
    np.testing.assert_array_equal(np.frombuffer(end.update.scalars, "<f4"), whole)
    assert said[0].startswith("warning: local step: memory ran out with a single sequence (")
    assert said[0].endswith("Reading the weights from their files from here on, which takes longer.")
    np.testing.assert_array_equal(trainer.overlay.coefficients, coefficients_after(tmp_path))


def coefficients_after(folder: Path) -> np.ndarray:
    trainer = trainer_of(folder)
    scalars(trainer)
    return np.array(trainer.overlay.coefficients)


def test_an_evaluation_begins_again_with_the_weights_in_their_files(tmp_path: Path) -> None:
    whole = played(trainer_of(tmp_path).evaluate(3))[0][-1]
    trainer = trainer_of(tmp_path)
    allow(trainer, 0)
    reports, end = played(trainer.evaluate(3))
    assert end == Evaluated(3)
    last = reports[-1]
    assert isinstance(last, HeldOutReport) and isinstance(whole, HeldOutReport)
    assert last.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_model_in_memory_is_gone_before_its_files_are_read_also_where_gradients_used_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "model")
    config = ModelConfig(source=str(tmp_path / "model"))
    kept = KeptGradient(tmp_path, Owner("localhost:1883", "demo", "ann"), "kseed test", print, lambda: 0.0)
    trainer = ModelTrainer(
        "ann", reviews(tmp_path, "same"), model=config, kernel=KernelConfig(name="torch"), say=print,
        gradient=GradientSettings("gradient", kept),
    )  # fmt: skip
    trainer.load(msgspec.structs.replace(run_of(), first_order=True))
    trainer.rebuild(3, coefficients_to_bytes(np.zeros(SEEDS, np.float32)))
    trainer._evaluated.at_once = 1
    allow(trainer, 0)
    first, load = weakref.ref(trainer._loaded.model), trainers.load_streamed
    alive = []

    def watched(*arguments: Any) -> LoadedModel:
        alive.append(first() is not None)
        return load(*arguments)

    monkeypatch.setattr(trainers, "load_streamed", watched)
    assert played(trainer.evaluate(3))[1] == Evaluated(3)
    assert alive == [False]


def test_a_form_that_does_not_fit_either_fails_the_round_with_both_sentences_or_the_second(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    allow(trainer, 0)
    load = trainers.load_streamed

    def small_too(*arguments: Any) -> LoadedModel:
        found = load(*arguments)
        found.model.register_forward_pre_hook(lambda *_: torch.empty(MORE_THAN_ANY_MACHINE, dtype=torch.uint8))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "load_streamed", small_too)
        end = played(trainer.train(FOUR, b"d" * 16))[1]
    assert isinstance(end, TrainingFailed)
    assert end.reason.startswith("local step: memory ran out with a single sequence (")
    assert end.reason.endswith("Lower max_length, free some memory, or take a smaller model.")


def test_the_round_after_one_given_up_loads_the_model_again(tmp_path: Path) -> None:
    whole = scalars(trainer_of(tmp_path))
    trainer = trainer_of(tmp_path)
    coefficients = coefficients_to_bytes(trainer.overlay.coefficients)
    allow(trainer, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "load_streamed", no_room)
        assert isinstance(played(trainer.train(FOUR, b"d" * 16))[1], TrainingFailed)
        trainer.rebuild(3, coefficients)
        trainer._portions.at_once = 1
        np.testing.assert_array_equal(scalars(trainer), whole)


def test_memory_that_runs_out_around_a_step_is_met_in_the_same_way(tmp_path: Path, monkeypatch: Any) -> None:
    whole = scalars(trainer_of(tmp_path))
    trainer = trainer_of(tmp_path)
    collate, calls = trainers.collate, iter(range(9))

    def no_room_once(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError
        return collate(*arguments)

    monkeypatch.setattr(trainers, "collate", no_room_once)
    np.testing.assert_array_equal(scalars(trainer), whole)
    assert not trainer._is_whole


def no_room(*_: Any, **__: Any) -> LoadedModel:
    torch.empty(MORE_THAN_ANY_MACHINE, dtype=torch.uint8)
    raise AssertionError


def test_a_model_that_cannot_be_read_from_files_is_refused_with_both_reasons(tmp_path: Path, monkeypatch: Any) -> None:
    source = saved(tmp_path / "model")
    torch.save({}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    monkeypatch.setattr(trainers, "load_model", no_room)
    with pytest.raises(UserError, match=r"does not fit into the memory of cpu .* Nor can its weights be read from"):
        trainer_of(tmp_path)


@pytest.mark.parametrize("wanted", [{"load_in": "unpacked"}, {"form": "loaded"}])
def test_an_owner_who_said_how_to_load_it_is_not_overruled(tmp_path: Path, monkeypatch: Any, wanted: Any) -> None:
    monkeypatch.setattr(trainers, "load_model", no_room)
    with pytest.raises(UserError, match="take a smaller model") as refused:
        trainer_of(tmp_path, **wanted)
    assert "from their files" not in str(refused.value)


def test_files_that_changed_meanwhile_are_noticed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    allow(trainer, 0)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    end = played(trainer.train(FOUR, b"d" * 16))[1]
    assert isinstance(end, TrainingFailed)
    assert end.reason == "the model or the data changed on disk since this agent began. Start it again."


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from edge_client.config import KernelConfig, ModelConfig
from edge_client.data.settings import DataConfig
from edge_client.kernels import choose
from edge_client import trainer as trainers
from edge_client.state_files import Owner
from edge_client.trainer import ModelTrainer
from tests.test_smaller_form import FOUR, played, run_for
import numpy as np
torch.set_num_threads(1)
choose("cpu")
trainers.fit_of = lambda *_, **__: None  # nobody foresaw that the model would not fit
source, data, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
run = run_for(Path(sys.argv[4]))
said = []
config = DataConfig(data, max_length=40)
trainer = ModelTrainer("ann", config, model=ModelConfig(source=source), kernel=KernelConfig(), say=said.append)
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + room, resource.RLIM_INFINITY))
ready = trainer.load(run)
trainer.rebuild(3, np.zeros(run.seeds, np.float32).tobytes())
end = played(trainer.train(FOUR, b"d" * 16))[1]
first = said[0].split(" (")[0] + " " if "warning" in said[0] else ""
print(first + str(ready.base_digest == run.base_digest), end.update.scalars.hex())
"""


def run_for(file: Path) -> Any:
    return msgspec.msgpack.decode(file.read_bytes(), type=type(run_of()))


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit on memory with RLIMIT_DATA")
def test_an_agent_with_too_little_memory_for_the_model_trains_all_the_same(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.overlays import overlay_of

    torch.manual_seed(0)
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 13, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=101, num_key_value_heads=8, max_position_embeddings=64, **size)
    source, model = tmp_path / "model", LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    overlay = overlay_of(model)
    facts = {
        "dtype": "bf16",
        "manifest": overlay.manifest.pack(),
        "manifest_digest": overlay.manifest.digest(),
        "base_digest": overlay.base_digest(),
    }
    run = tmp_path / "run"
    run.write_bytes(msgspec.msgpack.encode(msgspec.structs.replace(run_of(), **facts)))
    data = reviews(tmp_path, "same").source

    def said(room: int) -> list[str]:
        command = [sys.executable, "-W", "ignore", "-c", LIMITED, source, data, str(room), run]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(" ")

    *before, is_same, wanted = said(2 * 10**9)
    *warned, is_same_again, found = said(60_000_000)
    assert (before, is_same, is_same_again) == ([], "True", "True")
    assert " ".join(warned) == f"warning: {source} does not fit into the memory of cpu"
    assert found == wanted
