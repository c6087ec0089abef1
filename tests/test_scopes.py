"""A scope: what it names, and a run over a part of a model, while the rest stays as it is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from overlays import POOL_KEY, SEEDS, random_coefficients
from tiny_models import CONFIGS, tiny_ids, tiny_model, tiny_tokenizer

from edge_client.model import load_model
from edge_client.overlay import Overlay
from edge_client.scopes import Scope, names_in
from edge_client.tuned import select
from shared.delta import Delta, write_delta
from shared.errors import UserError
from shared.manifest import RunBase
from tools.manifest import write_manifest
from tools.tuned_model import apply_delta

LAYERED = [f"model.layers.{number}.mlp.weight" for number in range(30)]


def upper(names: list[str]) -> list[str]:
    return sorted(names_in("upper", names))


def test_upper_is_the_last_third_of_the_layers_and_what_is_in_none() -> None:
    found = upper(["model.embed.weight", "model.norm.weight", *LAYERED])
    assert found == sorted(["model.embed.weight", "model.norm.weight", *LAYERED[20:]])


def test_each_stack_has_an_upper_third_of_its_own() -> None:
    names = [f"{side}.block.{number}.weight" for side in ("encoder", "decoder") for number in range(3)]
    assert upper(names) == ["decoder.block.2.weight", "encoder.block.2.weight"]


def test_the_first_number_of_a_name_is_its_layer_and_not_its_expert() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.weight" for layer in range(2) for expert in range(4)]
    assert upper(names) == names[4:]


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_are_known_by_their_names(name: str) -> None:
    shapes = {tensor.name: tensor.shape for tensor in select(tiny_model(name)).manifest.tensors}
    parts: tuple[Scope, ...] = ("attention", "mlp", "norms")
    attention, mlp, norms = (names_in(part, list(shapes)) for part in parts)
    assert attention and mlp and norms and not (attention & mlp or attention & norms or mlp & norms)
    rest = shapes.keys() - attention - mlp - norms
    assert all(re.search(r"embed|lm_head|wte|wpe|project_(in|out)", left) for left in rest), rest
    assert all(len(shapes[norm]) == 1 for norm in norms)
    assert all(re.search(r"attn\.", tensor) for tensor in attention)
    assert all(re.search(r"mlp|fc[12]|moe", tensor) for tensor in mlp)


def test_a_norm_of_an_attention_is_a_norm() -> None:
    names = ["layers.0.self_attn.q_norm.weight", "layers.0.self_attn_layer_norm.bias", "layers.0.self_attn.q.weight"]
    assert names_in("norms", names) == set(names[:2]) and names_in("attention", names) == {names[2]}


def test_a_part_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="scope is 'mlp', but no module of the model is named as one; tune all of it"):
        names_in("mlp", ["mixer.weight"])


def test_all_is_all() -> None:
    assert names_in("all", ["a", "b"]) == {"a", "b"}


def test_a_model_without_layers_has_no_upper_ones() -> None:
    with pytest.raises(UserError, match="no numbered layers; tune all of it"):
        names_in("upper", ["weight"])


def over(model: torch.nn.Module, names: list[str]) -> Overlay:
    return Overlay(model, pool_key=POOL_KEY, seeds=SEEDS, directions="hadamard", only=names)


def test_an_overlay_over_a_part_moves_that_part_alone() -> None:
    model = tiny_model("llama-tied")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    only = upper([tensor.name for tensor in select(model).manifest.tensors])
    overlay = over(model, only)
    overlay.set_coefficients(random_coefficients())
    assert [tensor.name for tensor in overlay.manifest.tensors] == only
    overlay.verify(tiny_ids())
    overlay.write_out()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert moved == {tied.get(name, name) for name in only}


def test_the_base_digest_knows_the_part_that_is_not_tuned() -> None:
    digests = []
    for change in (0.0, 1.0):
        model = tiny_model("llama")
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += change
        only = upper([tensor.name for tensor in select(model).manifest.tensors])
        assert "model.layers.0.mlp.up_proj.weight" not in only
        digests.append(over(model, only).base_digest())
    assert digests[0] != digests[1]


def test_a_run_that_tunes_nothing_of_the_model_is_refused() -> None:
    with pytest.raises(UserError, match="none of the tensors that the run tunes"):
        over(tiny_model("llama"), ["transformer.h.0.weight"])


def test_a_delta_over_the_upper_part_finds_its_tensors_again(tmp_path: Path) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_manifest(str(tmp_path / "base"), "fp32", tmp_path / "base.json", name="tiny", scope="upper")
    facts = RunBase.read(tmp_path / "base.json")
    coefficients = np.ones(SEEDS, np.float32)
    digests = {"manifest_digest": facts.manifest.digest(), "base_digest": facts.base_digest}
    delta = Delta(
        run="spring", version=1, model="tiny", dtype="fp32", directions="hadamard", seeds=SEEDS, pool_key=POOL_KEY,
        coefficients=coefficients, **digests,
    )  # fmt: skip
    write_delta(tmp_path / "spring.kseed", delta)
    tuned = apply_delta(load_model(str(tmp_path / "base"), "fp32"), delta, "spring.kseed")
    assert tuned.overlay.manifest.digest() == facts.manifest.digest()
    assert "model.layers.0.mlp.up_proj.weight" not in {one.name for one in tuned.overlay.manifest.tensors}
