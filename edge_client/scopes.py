"""Scopes: which part of a model a run tunes. The run's manifest names the tensors, so devices need no scope.

`upper` is the last third of each stack of layers and whatever is in no stack (embeddings, head, last norm). A random
step in the lower layers harms more than one in the upper ones, because what it disturbs passes through all layers above
it, so the upper third alone learns from longer steps (docs/benchmarks.md, "Learning").

`attention`, `mlp` and `norms` go by the names that transformers gives the modules of its models. A norm inside an
attention is a norm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from shared.errors import UserError

Scope = Literal["all", "upper", "attention", "mlp", "norms"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_MODULES = {
    "attention": {"attn", "self_attn", "cross_attn", "attention", "self_attention", "selfattention", "encdecattention"},
    "mlp": {"mlp", "ffn", "feed_forward", "densereludense", "block_sparse_moe", "fc1", "fc2"},
}
_NORM = re.compile(r"norm|^ln(_|$)")
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")  # model.layers.20.mlp..., decoder.block.3.layer.1...


def names_in(scope: Scope, names: Sequence[str]) -> frozenset[str]:
    """Those of a model's tensors, by name, that `scope` tunes. Raises UserError where the model has no such part."""
    if scope == "all":
        return frozenset(names)
    if scope != "upper":
        chosen = frozenset(name for name in names if _part(name) == scope)
        if not chosen:
            raise UserError(f"scope is {scope!r}, but no module of the model is named as one; tune all of it.")
        return chosen
    places = {name: (found[1], int(found[2])) for name in names if (found := _LAYER.match(name))}
    if not places:
        raise UserError(f"scope is {scope!r}, but the model has no numbered layers; tune all of it.")
    layers: dict[str, int] = {}
    for stack, number in places.values():
        layers[stack] = max(layers.get(stack, 0), number + 1)
    lower = {name for name, (stack, number) in places.items() if number < layers[stack] * 2 // 3}
    return frozenset(names) - lower


def _part(name: str) -> str:
    """attention, mlp, norms, or nothing of these."""
    modules = name.lower().split(".")[:-1]
    if any(_NORM.search(module) for module in modules):
        return "norms"
    return next((part for part, known in _MODULES.items() if not known.isdisjoint(modules)), "")
