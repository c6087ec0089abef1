"""Scopes: which part of a model a run tunes. The run's manifest names the tensors, so devices need no scope.

`upper` is the last third of each stack of layers and whatever is in no stack (embeddings, head, last norm). A random
step in the lower layers harms more than one in the upper ones, because what it disturbs passes through all layers above
it, so the upper third alone learns from longer steps (docs/benchmarks.md, "Learning").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from shared.errors import UserError

Scope = Literal["all", "upper"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")  # model.layers.20.mlp..., decoder.block.3.layer.1...


def names_in(scope: Scope, names: Sequence[str]) -> frozenset[str]:
    """Those of a model's tensors, by name, that `scope` tunes. Raises UserError where it has no layers for it."""
    if scope == "all":
        return frozenset(names)
    places = {name: (found[1], int(found[2])) for name in names if (found := _LAYER.match(name))}
    if not places:
        raise UserError(f"scope is {scope!r}, but the model has no numbered layers; tune all of it.")
    layers: dict[str, int] = {}
    for stack, number in places.values():
        layers[stack] = max(layers.get(stack, 0), number + 1)
    lower = {name for name, (stack, number) in places.items() if number < layers[stack] * 2 // 3}
    return frozenset(names) - lower
