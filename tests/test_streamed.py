"""A streamed model is the loaded one, bit for bit, in memory where the loaded one does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from overlays import overlay_of
from tiny_models import CONFIGS, tiny_batch, tiny_ids, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from edge_client import fit
from edge_client.config import KernelConfig, ModelConfig
from edge_client.estimator import TwoSided, two_point
from edge_client.loss import labelled_loss
from edge_client.model import load_model
from edge_client.overlay import Overlay
from edge_client.scopes import names_in
from edge_client.streamed import load_streamed
from edge_client.trainer import ModelTrainer
from edge_client.tuned import select
from shared.errors import UserError
from shared.messages import Run, WeightDtype
from tests.test_fleet import reviews
from tools.manifest import run_base

STACKED = {"mixtral", "qwen2-moe"}  # experts that transformers 5 stacks when it loads them
REPOSITORY = Path(__file__).parent.parent


def saved(folder: Path, model: PreTrainedModel, **how: str) -> str:
    model.save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def step_of(overlay: Overlay) -> TwoSided:
    return two_point(lambda: labelled_loss(overlay.model, tiny_batch()), overlay, 77, 1e-3, "f32")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in STACKED])
def test_a_streamed_model_is_the_loaded_one_bit_for_bit(
    name: str, wanted: WeightDtype, stored: torch.dtype, tmp_path: Path
) -> None:
    source = saved(tmp_path, tiny_model(name, stored))
    loaded, streamed = overlay_of(load_model(source, wanted).model), overlay_of(load_streamed(source, wanted).model)
    assert streamed.manifest == loaded.manifest
    assert streamed.base_digest() == loaded.base_digest()
    assert streamed.model_digest() == loaded.model_digest()
    assert streamed.is_paired and not loaded.is_paired
    with torch.inference_mode():
        assert torch.equal(streamed.model(input_ids=tiny_ids()).logits, loaded.model(input_ids=tiny_ids()).logits)
    assert step_of(streamed) == step_of(loaded)
    assert streamed.is_paired


@pytest.mark.parametrize("name", CONFIGS)
def test_without_an_overlay_it_computes_with_its_base(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_model(name))
    if name in STACKED:
        with pytest.raises(
            UserError, match=r"has no tensor model\.layers\.0\..*; such a model cannot stream\. Load it"
        ):
            load_streamed(source, "fp32")
        return
    with torch.inference_mode():
        wanted = load_model(source, "fp32").model(input_ids=tiny_ids()).logits
        assert torch.equal(load_streamed(source, "fp32").model(input_ids=tiny_ids()).logits, wanted)


def test_a_checkpoint_of_several_files_streams(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_model("llama"), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    streamed = overlay_of(load_streamed(source, "fp32").model)
    assert streamed.base_digest() == overlay_of(load_model(source, "fp32").model).base_digest()


def test_a_part_of_a_streamed_model_is_tuned_like_that_of_a_loaded_one(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_model("llama"))
    overlays = []
    for load in (load_streamed, load_model):
        model = load(source, "fp32").model
        only = names_in("norms", [tensor.name for tensor in select(model).manifest.tensors])
        overlays.append(Overlay(model, pool_key=9, seeds=256, directions="hadamard", only=only))
    streamed, loaded = overlays
    assert streamed.manifest == loaded.manifest and streamed.base_digest() == loaded.base_digest()
    assert step_of(streamed) == step_of(loaded) and streamed.is_paired


@pytest.mark.parametrize(("free_mb", "form"), [(400, "loaded"), (fit.FIXED / fit.MB + 28, "streamed")])
def test_the_agent_takes_the_form_that_fits_and_says_why(
    free_mb: float, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = LlamaConfig(
        vocab_size=101, hidden_size=512, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    saved(tmp_path / "model", LlamaForCausalLM(wide).to(torch.bfloat16))
    monkeypatch.setattr(fit, "free_on", lambda device: (free_mb * fit.MB, "system"))
    lines: list[str] = []
    data = msgspec.structs.replace(reviews(tmp_path, "same"), max_length=64)
    trainer = ModelTrainer(
        "ann", data, model=ModelConfig(source=str(tmp_path / "model")), kernel=KernelConfig(name="torch"),
        say=lines.append,
    )  # fmt: skip
    base = run_base(load_model(str(tmp_path / "model"), "bf16"), "bf16", "wide")
    ready = trainer.load(
        Run("demo", "wide", "bf16", "hadamard", 256, 9, base.manifest.pack(), base.manifest.digest(), base.base_digest,
            "f32", "f32", False)
    )  # fmt: skip
    assert ready.base_digest == base.base_digest
    assert trainer.overlay.is_paired == (form == "streamed")
    assert lines[0].startswith("model: ") and f"{form} in bf16, " in lines[0] and lines[0].endswith("(system)")


def broken(folder: Path, what: str) -> None:
    file = folder / "model.safetensors"
    if what == "missing":
        file.unlink()
    elif what == "short":
        os.truncate(file, file.stat().st_size // 2)
    elif what == "no header":
        file.write_bytes(b"\xff" * 100)
    elif what == "other shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    elif what == "quantised":
        config = json.loads((folder / "config.json").read_text())
        quantised = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        (folder / "config.json").write_text(json.dumps(quantised))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", r"no model.safetensors in .*Load it whole"),
        ("short", r"is no whole safetensors file: a tensor"),
        ("no header", r"is no whole safetensors file: the header would have"),
        ("other shape", r"holds model.layers.0.mlp.\w+.weight as \[\d+, \d+\] of F32; the model has"),
        ("quantised", r"is quantised; only plain weights stream"),
    ],
)
def test_what_cannot_stream_is_refused_with_the_reason(what: str, said: str, tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_model("llama"))
    broken(tmp_path, what)
    with pytest.raises(UserError, match=said):
        load_streamed(source, "fp32")


def test_a_file_that_ends_while_the_model_streams_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_model("llama"))
    overlay = overlay_of(load_streamed(source, "fp32").model)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read any more: it ends too early"):
        step_of(overlay)


def test_a_file_that_is_written_to_while_the_model_streams_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_model("llama"))
    file = tmp_path / "model.safetensors"
    os.utime(file, (1e9, 1e9))  # clocks of file systems are coarse
    overlay = overlay_of(load_streamed(source, "fp32").model)
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read any more: it was written to"):
        step_of(overlay)


def test_a_file_that_is_replaced_while_the_model_streams_changes_nothing(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", tiny_model("llama"))
    overlay = overlay_of(load_streamed(source, "fp32").model)
    before = overlay.base_digest()
    other = tiny_model("llama")
    other.model.norm.weight.data.fill_(2.0)
    saved(tmp_path / "other", other)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    assert overlay.base_digest() == before
    assert overlay_of(load_streamed(source, "fp32").model).base_digest() != before


LIMITED = """
import resource, sys
import torch
from edge_client.kernels import choose
from edge_client.model import load_model
from edge_client.streamed import load_streamed
from overlays import overlay_of
from test_streamed import step_of
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
choose("cpu")
way, source, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + room, resource.RLIM_INFINITY))
load = {"loaded": load_model, "streamed": load_streamed}[way]
try:
    print(step_of(overlay_of(load(source, "bf16").model)))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit on memory with RLIMIT_DATA")
def test_a_model_larger_than_the_memory_makes_the_same_step_streamed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=512, intermediate_size=2048, num_hidden_layers=13, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    source = saved(tmp_path / "model", LlamaForCausalLM(config).to(torch.bfloat16))
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    room = 50_000_000
    assert size > 2 * room

    def said(way: str, room: int) -> str:
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-W", "ignore", "-c", LIMITED, way, source, str(room)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    wanted = said("loaded", 10 * size)
    assert wanted.startswith("TwoSided(")
    assert "allocate memory" in said("loaded", room)
    assert said("streamed", room) == wanted
