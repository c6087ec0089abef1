"""Packed models: what they compute, which tensors they have, and that a device without bitsandbytes holds the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from overlays import POOL_KEY, SEEDS, overlay_of, random_coefficients
from tiny_models import save_tiny, tiny_ids, tiny_model, tiny_tokenizer

from edge_client import packed
from edge_client.config import KernelConfig, ModelConfig
from edge_client.model import LoadedModel, LoadIn, load_model
from edge_client.overlay import Overlay
from edge_client.trainer import ModelTrainer
from shared.errors import UserError
from shared.wire import coefficients_to_bytes
from tests.test_fleet import reviews
from tests.test_trainer import WORK, run_of, update_of

CPU = torch.device("cpu")


def quantised(folder: Path, width: packed.Width = "4bit", name: str = "llama-tied", **more: Any) -> Path:
    """A folder with a tiny model that transformers and bitsandbytes quantised and wrote, without kseed."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = folder / "plain"
    tiny_model(name, torch.bfloat16).save_pretrained(plain)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if width == "4bit" else {"load_in_8bit": True}
    config = BitsAndBytesConfig(**{**settings, **more})
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    out = folder / "packed"
    model.save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    return out


PACKINGS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "scales quantised again": {"bnb_4bit_use_double_quant": True},
    "stored as bf16": {"bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"width": "8bit"},
}


def overlay_over(loaded: LoadedModel) -> Overlay:
    return Overlay(loaded.model, pool_key=POOL_KEY, seeds=SEEDS, directions="hadamard")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_model_is_the_unpacked_one_to_the_bit(tmp_path: Path, packing: str, dtype: Any) -> None:
    folder = str(quantised(tmp_path, **PACKINGS[packing]))
    kept, unpacked = load_model(folder, dtype), load_model(folder, dtype, load_in="unpacked")
    assert torch.equal(kept.model(tiny_ids()).logits, unpacked.model(tiny_ids()).logits)
    one, other = overlay_over(kept), overlay_over(unpacked)
    assert one.manifest == other.manifest
    assert one.base_digest() == other.base_digest()
    for overlay in (one, other):
        overlay.set_coefficients(random_coefficients())
    assert one.model_digest() == other.model_digest()
    assert torch.equal(kept.model(tiny_ids()).logits, unpacked.model(tiny_ids()).logits)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_base_is_what_bitsandbytes_unpacks(tmp_path: Path, packing: str) -> None:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from transformers import AutoModelForCausalLM

    folder = quantised(tmp_path, **PACKINGS[packing])
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    overlay = overlay_over(load_model(str(folder), "fp32"))
    named = [(name, layer) for name, layer in theirs.named_modules() if isinstance(layer, torch.nn.Linear)]
    layers = {name: layer for name, layer in named if name != "lm_head"}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = layer.weight
        if packing == "int8":
            wanted = int8_vectorwise_dequant(weight.CB, weight.SCB)
        else:
            weight.quant_state.dtype = torch.float32
            wanted = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(overlay.materialise(f"{name}.weight"), wanted), name


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_model_computes_what_it_would_with_weights_written_out(
    tmp_path: Path, packing: str, name: str
) -> None:
    loaded = load_model(str(quantised(tmp_path, name=name, **PACKINGS[packing])), "bf16")
    before = loaded.model(tiny_ids()).logits
    overlay = overlay_over(loaded)
    overlay.set_coefficients(random_coefficients())
    overlay.verify(tiny_ids())
    tuned = loaded.model(tiny_ids()).logits
    assert not torch.equal(tuned, before)
    overlay.write_out()
    assert torch.equal(loaded.model(tiny_ids()).logits, tuned)
    loaded.model.save_pretrained(tmp_path / "out")
    again = load_model(save_tokenizer(tmp_path / "out"), "bf16")
    assert torch.equal(again.model(tiny_ids()).logits, tuned)
    assert not hasattr(again.model.config, "quantization_config")


def save_tokenizer(folder: Path) -> str:
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_packed_layers_that_a_run_does_not_tune_count_in_its_base_and_are_written_out_too(tmp_path: Path) -> None:
    folder = str(quantised(tmp_path))
    digests = set()
    for load_in in ("auto", "unpacked"):
        model = load_model(folder, "bf16", load_in=load_in).model
        only = {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
        overlay = Overlay(model, pool_key=POOL_KEY, seeds=SEEDS, directions="hadamard", only=only)
        overlay.set_coefficients(random_coefficients())
        overlay.verify(tiny_ids())
        tuned = model(tiny_ids()).logits
        digests.add((overlay.base_digest(), overlay.model_digest()))
        overlay.write_out()
        assert {type(weight) for weight in model.parameters()} == {torch.nn.Parameter}
        assert torch.equal(model(tiny_ids()).logits, tuned)
    assert len(digests) == 1


@pytest.mark.parametrize("directions", ["rademacher", "gaussian"])
def test_independent_directions_are_added_to_packed_weights_too(tmp_path: Path, directions: Any) -> None:
    folder = str(quantised(tmp_path))
    digests = set()
    for load_in in ("auto", "unpacked"):
        overlay = overlay_of(load_model(folder, "bf16", load_in=load_in).model, directions)
        overlay.verify(tiny_ids())
        digests.add(overlay.model_digest())
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "opt", "phi", "mixtral", "qwen2-moe"])
@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_every_architecture_is_packed_and_tuned_in_full(tmp_path: Path, name: str, width: Any) -> None:
    """Also with rows that are no multiple of the block, and biases."""
    folder = str(quantised(tmp_path, width, name))
    overlay = overlay_of(load_model(folder, "bf16").model)
    assert [tensor.name for tensor in overlay.manifest.tensors] == [
        tensor.name for tensor in overlay_of(tiny_model(name, torch.bfloat16)).manifest.tensors
    ]
    overlay.verify(tiny_ids())
    assert overlay.base_digest() == overlay_of(load_model(folder, "bf16", load_in="unpacked").model).base_digest()


def test_gpt2_is_refused_because_its_layers_are_turned_round(tmp_path: Path) -> None:
    folder = str(quantised(tmp_path, name="gpt2"))
    for load_in in ("auto", "unpacked"):
        with pytest.raises(UserError, match=r"h\.0\.attn\.c_attn.* is a Conv1D|cannot be loaded"):
            load_model(folder, "bf16", load_in=load_in)


@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_a_plain_model_is_quantised_while_it_is_loaded(tmp_path: Path, width: Any) -> None:
    said: list[str] = []
    loaded = load_model(str(save_tiny(tmp_path)), "bf16", load_in=width, say=said.append)
    assert said == [
        f"model: 14 linear layers stay packed in {width} (quantised now, other devices may do it otherwise), "
        "everything else in torch.bfloat16"
    ]
    overlay = overlay_of(loaded.model)
    overlay.verify(tiny_ids())
    overlay.write_out()
    loaded.model.save_pretrained(tmp_path / "out")  # as a plain model
    overlay = overlay_of(load_model(str(tmp_path), "bf16", load_in=width).model)
    plain = overlay_of(load_model(str(tmp_path), "bf16").model)
    assert overlay.manifest == plain.manifest and overlay.base_digest() != plain.base_digest()


def test_packed_weights_are_never_kept_unpacked(tmp_path: Path) -> None:
    loaded = load_model(str(quantised(tmp_path)), "bf16")
    kept = sum(weight.numel() for weight in loaded.model.parameters() if type(weight) is torch.nn.Parameter)
    plain = sum(weight.numel() for weight in tiny_model("llama-tied").parameters())
    assert kept == plain - 2 * (24 * 24 * 2 + 24 * 12 * 2 + 24 * 40 * 3)


def test_where_bitsandbytes_is_missing_a_packed_model_is_unpacked_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(quantised(tmp_path))
    with_it = overlay_of(load_model(folder, "bf16").model).base_digest()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # what import makes of a broken module
    said: list[str] = []
    loaded = load_model(folder, "bf16", say=said.append)
    assert overlay_of(loaded.model).base_digest() == with_it
    assert len(said) == 1 and said[0].startswith(
        "model: 4bit unpacked to torch.bfloat16, because bitsandbytes cannot be used on cpu: "
    )
    with pytest.raises(UserError, match=r"bitsandbytes cannot be used on cpu .*, and 4bit needs it to quantise"):
        load_model(str(save_tiny(tmp_path / "whole")), "bf16", load_in="4bit")


@pytest.mark.parametrize(
    ("load_in", "said"),
    [
        ("8bit", "is packed in 4bit already; it cannot be loaded in 8bit"),
        ("2bit", "load_in is '2bit'; allowed are auto"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, load_in: LoadIn, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_model(str(quantised(tmp_path)), "bf16", load_in=load_in)


def test_importing_bitsandbytes_asks_no_hub() -> None:
    """In a process of its own: a module is imported once."""
    import subprocess

    code = """
import sys, types, torch
def forbidden(*_, **__): raise AssertionError("asked the hub")
sys.modules["kernels"] = types.SimpleNamespace(get_kernel=forbidden, __spec__=None)
from edge_client.packed import why_not
assert why_not(torch.device("cpu")) is None
assert sys.modules["kernels"].get_kernel is forbidden
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernel" not in done.stderr


@pytest.mark.parametrize("spoilt", ["codes", "scales", "table"])
def test_a_packed_tensor_of_the_wrong_size_is_refused_by_name(spoilt: str) -> None:
    from dataclasses import replace

    from edge_client.kernels import Packed

    right = Packed(torch.zeros(3, dtype=torch.uint8), torch.zeros(1), 64, torch.zeros(16))
    assert packed.checked("a.b", right, 5) is right
    with pytest.raises(UserError, match=r"'a\.b' is packed in"):
        packed.checked("a.b", replace(right, **{spoilt: torch.zeros(2, dtype=torch.uint8)}), 5)


def test_an_agent_trains_a_packed_model_and_says_so(tmp_path: Path) -> None:
    folder = str(quantised(tmp_path))
    said: list[str] = []
    updates = []
    for load_in in ("auto", "unpacked"):
        model = ModelConfig(source=folder, load_in=load_in)  # type: ignore[arg-type]
        kernel = KernelConfig(name="torch")
        trainer = ModelTrainer("ann", reviews(tmp_path, "same"), model=model, kernel=kernel, say=said.append)
        trainer.load(run_of())
        trainer.rebuild(3, coefficients_to_bytes(random_coefficients()))
        updates.append(update_of(trainer.train(WORK, b"d" * 16)))
    assert any("model: 14 linear layers stay packed in 4bit (as the checkpoint has them)" in line for line in said)
    assert "model: unpacked to torch.float32, as was asked for" in said
    assert np.array_equal(*updates) and len(updates[0]) == WORK.local_steps
