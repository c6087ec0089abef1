"""Which parameters of a model are tuned, and where they stand; what cannot be tuned is refused by name.

Tuned are all floating point parameters, each once: tied weights under the smallest of their full names. Buffers are
not. A parameter that the overlay cannot stand in for is an error and never left out in silence, because a model that
is tuned in part on one device and whole on another diverges.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from edge_client.bases import BareWeights, Base, PlainBase
from edge_client.placeholders import Placeholder
from shared.errors import UserError
from shared.manifest import Manifest
from shared.manifest import Tensor as Entry
from shared.messages import WeightDtype

DTYPES: dict[WeightDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES: dict[torch.dtype, WeightDtype] = {dtype: name for name, dtype in DTYPES.items()}
_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class Tuned:
    """One tuned tensor: its weights and every place in the model where they stand."""

    name: str
    weight: Tensor  # a parameter, or a placeholder over `BareWeights` where the base is kept in another way
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def base(self) -> Base:
        """Its base weights."""
        kept = _kept(self.weight)
        return PlainBase(self.weight) if kept is None else kept

    def free(self) -> None:
        """Let go of the base weights; nothing may use them any more."""
        if isinstance(self.weight, Placeholder):
            del self.weight.weights
        else:
            self.weight.data = torch.empty(0)


@dataclass(frozen=True)
class Selection:
    """All tuned tensors of a model, in manifest order, of one dtype on one device."""

    tensors: tuple[Tuned, ...]
    fixed: tuple[Tuned, ...]  # the others, by name
    manifest: Manifest
    dtype: torch.dtype
    device: torch.device


def select(model: nn.Module, only: Collection[str] | None = None) -> Selection:
    """The tuned tensors of `model`: all, or those with a name in `only`.

    Raises UserError, naming tensors, where one cannot be tuned, or none is left.
    """
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    weights: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, weight in module._parameters.items():
            if weight is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                weights[id(weight)] = weight
                places.setdefault(id(weight), []).append((name, module, attribute))
    found = []
    for key, standing in places.items():
        spots = {(id(module), attribute): (module, attribute) for _, module, attribute in standing}
        found.append(Tuned(min(name for name, _, _ in standing), weights[key], tuple(spots.values())))
    if not found:
        raise UserError("the model has no parameters, so there is nothing to tune. Choose another model.")
    found.sort(key=lambda tuned: tuned.name)
    _check_each(found)
    found = _merge_shared(found)
    _check_alike(found)
    _check_references(model, found)
    chosen = found if only is None else [tuned for tuned in found if tuned.name in only]
    if not chosen:
        raise UserError("the model has none of the tensors that the run tunes. Choose the run's model.")
    names = {tuned.name for tuned in chosen}
    fixed = tuple(tuned for tuned in found if tuned.name not in names)
    manifest = Manifest(tuple(Entry(tuned.name, tuple(tuned.weight.shape)) for tuned in chosen))
    return Selection(tuple(chosen), fixed, manifest, found[0].weight.dtype, found[0].weight.device)


def stored_buffers(model: nn.Module, dtype: torch.dtype) -> bytes:
    """The floating point buffers that a checkpoint holds, in `dtype`, little-endian, in ascending order of names.

    They are the model's and never tuned, such as the bias that some routers of experts add. What is computed from the
    configuration is not among them.
    """
    found = {
        f"{prefix}.{attribute}" if prefix else attribute: buffer.detach().to(dtype).cpu().contiguous().view(-1)
        for prefix, module in model.named_modules()
        for attribute, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point() and attribute not in module._non_persistent_buffers_set
    }
    return b"".join(found[name].view(torch.uint8).numpy().tobytes() for name in sorted(found))


def _merge_shared(found: list[Tuned]) -> list[Tuned]:
    """Parameters that are different objects over the same memory are tied as well."""
    merged: dict[object, Tuned] = {}
    for tuned in found:
        weight = tuned.weight
        key: object = id(weight)
        if isinstance(weight, Placeholder):
            key = id(_kept(weight))
        elif _has_memory(weight):
            key = (weight.device, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        first = merged.get(key)
        merged[key] = tuned if first is None else Tuned(first.name, first.weight, first.places + tuned.places)
    return list(merged.values())


def _check_each(found: list[Tuned]) -> None:
    faults = [(tuned.name, fault) for tuned in found if (fault := _fault(tuned)) is not None]
    if faults:
        _, fault = faults[0]
        names = [name for name, other in faults if other == fault]
        raise UserError(f"{_listed(names)} cannot be tuned: {fault}. Load the whole model in bf16, fp16 or fp32.")


def _fault(tuned: Tuned) -> str | None:
    weight = tuned.weight
    is_kept = _kept(weight) is not None
    if not is_kept and (type(weight) is not nn.Parameter or type(weight.data) is not Tensor):
        return f"it is a {type(weight).__name__}, a kind of tensor with rules of its own"
    if weight.is_meta:
        return "its data is not in memory (meta device)"
    if weight.layout != torch.strided:
        return f"its layout is {weight.layout}"
    if weight.dtype not in DTYPE_NAMES:
        return f"its dtype is {weight.dtype} (packed or quantised weights)"
    if any(isinstance(module, torch.jit.ScriptModule) for module, _ in tuned.places):
        return "it is part of a TorchScript module"
    return None


def _check_alike(found: list[Tuned]) -> None:
    for what in ("dtype", "device"):
        values = [getattr(tuned.weight, what) for tuned in found]
        usual = max(set(values), key=values.count)
        odd = [tuned.name for tuned, value in zip(found, values, strict=True) if value != usual]
        if odd:
            other = next(value for value in values if value != usual)
            raise UserError(
                f"{_listed(odd)} has the {what} {other} and the other weights {usual}; all must have the same. "
                f"Move the whole model to one {what}, as load_model does."
            )


def _check_references(model: nn.Module, found: list[Tuned]) -> None:
    """Refuse weights that the model also reaches past its parameters, where no placeholder would stand."""
    owners = {id(tuned.weight): tuned.name for tuned in found}
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_modules", "_buffers"):
                continue
            for tensor in _tensors_in(value):
                if id(tensor) in owners:
                    raise UserError(
                        f"{owners[id(tensor)]!r} cannot be tuned: {type(module).__name__} {prefix!r} also holds it "
                        f"outside its parameters (in {key}). Tune another model."
                    )
    _check_overlaps(model, found)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (item for item in value if isinstance(item, Tensor))
    elif isinstance(value, dict):
        yield from (item for item in value.values() if isinstance(item, Tensor))


def _check_overlaps(model: nn.Module, found: list[Tuned]) -> None:
    """Refuse weights that share part of their memory with another weight or with a buffer."""
    named = [(tuned.name, tuned.weight.detach()) for tuned in found if _kept(tuned.weight) is None]
    named += list(model.named_buffers())
    spans = sorted((*_span(tensor), name) for name, tensor in named if _has_memory(tensor))
    weights = {tuned.name for tuned in found}
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end and (name in weights or other in weights):
            raise UserError(f"{name!r} and {other!r} share part of their memory, so they cannot be tuned. Clone one.")


def _kept(weight: Tensor) -> Base | None:
    """The base behind a placeholder that the model was loaded with; None for any other tensor."""
    if isinstance(weight, Placeholder) and isinstance(weight.weights, BareWeights):
        return weight.weights.base
    return None


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last address + 1 of a tensor's elements."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
