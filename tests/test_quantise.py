"""tools.quantise: a folder that transformers loads, that a run starts from, and whose tuned weights are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_client import packed
from shared.errors import UserError
from shared.manifest import RunBase
from tests.test_export import a_delta, overlay_logits
from tests.tiny_models import save_tiny, tiny_ids, tiny_model, tiny_tokenizer
from tools.export import export_checkpoint
from tools.generate import answer
from tools.manifest import write_manifest
from tools.quantise import Kind, Width, quantise


def a_quantised_base(folder: Path, width: Width = "4bit", kind: Kind = "nf4") -> Path:
    quantise(str(save_tiny(folder / "plain")), folder / "packed", width=width, kind=kind, dtype="bf16")
    return folder / "packed"


@pytest.mark.parametrize(("width", "kind", "said"), [("4bit", "nf4", "4bit (nf4)"), ("4bit", "fp4", "4bit (fp4)"),
                                                     ("8bit", "nf4", "8bit")])  # fmt: skip
def test_plain_transformers_loads_what_it_writes(tmp_path: Path, width: Any, kind: Any, said: str) -> None:
    plain = save_tiny(tmp_path / "plain")
    told = quantise(str(plain), tmp_path / "out", width=width, kind=kind, dtype="bf16")
    assert told.startswith(f"{tmp_path / 'out'}: {plain} with its linear layers in {said}, everything else in bf16, ")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = packed.layers_of(model)
    assert len(layers) == 14
    assert model(tiny_ids()).logits.isfinite().all()
    if width == "4bit":
        assert {layer.weight.quant_state.quant_type for layer in layers.values()} == {kind}
        assert not any(layer.weight.quant_state.nested for layer in layers.values())


def test_the_manifest_of_the_folder_is_that_of_the_model_with_a_base_of_its_own(tmp_path: Path) -> None:
    folder = a_quantised_base(tmp_path)
    write_manifest(str(folder), "bf16", tmp_path / "packed.json", name="tiny")
    write_manifest(str(tmp_path / "plain"), "bf16", tmp_path / "plain.json", name="tiny")
    one, other = RunBase.read(tmp_path / "packed.json"), RunBase.read(tmp_path / "plain.json")
    assert one.manifest == other.manifest
    assert one.base_digest != other.base_digest


@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_export_writes_the_unpacked_weights_with_the_delta(tmp_path: Path, width: Any) -> None:
    folder = a_quantised_base(tmp_path, width)
    delta = a_delta(tmp_path, folder, dtype="bf16")
    export_checkpoint(str(folder), delta, tmp_path / "tuned")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert not hasattr(exported.config, "quantization_config")
    assert {weight.dtype for weight in exported.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = exported(input_ids=tiny_ids()).logits
    assert torch.equal(logits, overlay_logits(folder, delta, "bf16", "hadamard"))


def test_a_packed_base_answers_with_and_without_a_delta(tmp_path: Path) -> None:
    folder = a_quantised_base(tmp_path)
    delta = a_delta(tmp_path, folder, dtype="bf16")
    for chosen in (None, delta):
        assert isinstance(answer("hello", str(folder), chosen, max_tokens=3, is_chat=False), str)


def test_what_cannot_be_quantised_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    folder = a_quantised_base(tmp_path)
    gpt2 = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(gpt2)
    tiny_tokenizer().save_pretrained(gpt2)
    before = sorted(tmp_path.iterdir())
    for model, said in (
        (folder, "is packed in 4bit already"),
        (gpt2, r"'transformer\.h\.0\.attn\.c_attn' is a Conv1D"),
    ):
        with pytest.raises(UserError, match=said):
            quantise(str(model), tmp_path / "new", width="4bit", kind="nf4", dtype="bf16")
    with pytest.raises(UserError, match="is there already and not an empty folder"):
        quantise(str(tmp_path / "plain"), folder, width="4bit", kind="nf4", dtype="bf16")
    assert sorted(tmp_path.iterdir()) == before
