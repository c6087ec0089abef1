"""`kseed manifest`: what a run starts from, written where the model is and read where the aggregator is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared.manifest import RunBase
from shared.messages import WeightDtype

if TYPE_CHECKING:
    from edge_client.model import LoadedModel
    from edge_client.scopes import Scope

ANY_SEEDS = 256  # manifest and base digest do not depend on the directions


def write_manifest(model: str, dtype: WeightDtype, output: Path, *, name: str, scope: Scope = "all") -> str:
    """Write the tensors and digests of `model` to the JSON file `output`; returns what to tell the person.

    `name` stands in the run as the model's name. Raises UserError where model or file cannot be used.
    """
    from tools.tuned_model import load_base

    base = run_base(load_base(model, dtype), dtype, name, scope)
    base.write(output)
    weights = sum(tensor.elements for tensor in base.manifest.tensors)
    return f"{output}: {name} in {dtype}, {len(base.manifest.tensors)} tensors, {weights} weights"


def run_base(loaded: LoadedModel, dtype: WeightDtype, name: str, scope: Scope = "all") -> RunBase:
    """What a run over `scope` of `loaded` starts from. The model is as before when this returns."""
    from edge_client.overlay import Overlay
    from edge_client.scopes import names_in
    from edge_client.tuned import select

    names = [tensor.name for tensor in select(loaded.model).manifest.tensors]
    only = names_in(scope, names)
    overlay = Overlay(loaded.model, pool_key=0, seeds=ANY_SEEDS, directions="hadamard", only=only)
    try:
        return RunBase(name, dtype, overlay.manifest, overlay.base_digest())
    finally:
        overlay.detach()
