"""A base model with a delta file applied to it: what export, generate and the demo have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.delta import Delta
from shared.errors import UserError
from shared.messages import WeightDtype

if TYPE_CHECKING:
    from edge_client.model import LoadedModel
    from edge_client.overlay import Overlay


@dataclass(frozen=True, eq=False)
class TunedModel:
    """A loaded model whose weights come from `overlay`, set to the delta's coefficients."""

    loaded: LoadedModel
    overlay: Overlay


def load_base(model: str, dtype: WeightDtype) -> LoadedModel:
    """The base model on the CPU. Raises UserError where it cannot be loaded."""
    from edge_client.model import load_model

    return load_model(model, dtype, "cpu")


def apply_delta(loaded: LoadedModel, delta: Delta, place: str) -> TunedModel:
    """Put an overlay with the delta's coefficients over `loaded`. `place` names the delta in errors.

    Raises UserError where the model is not the one that the delta was made for: other tensors, or other base weights.
    """
    from edge_client.overlay import Overlay

    only = _tuned_names(loaded, delta)
    overlay = Overlay(loaded.model, pool_key=delta.pool_key, seeds=delta.seeds, directions=delta.directions, only=only)
    if overlay.manifest.digest() != delta.manifest_digest:
        raise UserError(
            f"{loaded.source} has other tensors than the model of {place} ({delta.model}); a delta fits its own base "
            f"only. Give --model {delta.model}."
        )
    digest = overlay.base_digest()
    if digest != delta.base_digest:
        raise UserError(
            f"{loaded.source} in {delta.dtype} has the base digest {digest.hex()[:16]}..., {place} was made for "
            f"{delta.base_digest.hex()[:16]}... ({delta.model}); the weights must be the same to the bit. "
            "Give the folder or file that the run used."
        )
    overlay.set_coefficients(delta.coefficients)
    return TunedModel(loaded, overlay)


def _tuned_names(loaded: LoadedModel, delta: Delta) -> frozenset[str] | None:
    """The tensors of the scope that the delta's manifest is of; None, which is all of them, where it is of none."""
    from edge_client.scopes import SCOPES, names_in
    from edge_client.tuned import select
    from shared.manifest import Manifest

    tensors = select(loaded.model).manifest.tensors
    for scope in SCOPES:
        try:
            names = names_in(scope, [tensor.name for tensor in tensors])
        except UserError:  # a model without layers has no upper ones
            continue
        if Manifest(tuple(one for one in tensors if one.name in names)).digest() == delta.manifest_digest:
            return names
    return None
