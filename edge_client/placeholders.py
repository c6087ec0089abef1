"""Placeholders: parameters without memory of their own, whose weights exist only while an operation uses them.

A placeholder stands in a module where the base weight stood. Operations reach it through `__torch_function__`:
those of `_PLAIN`, whose outputs never share memory with their inputs, get the weights in scratch memory that the next
operation uses again; a large linear layer uses them slice by slice; an embedding computes the rows it looks up; an
int index into the first dimension (an expert of many) is a smaller placeholder. Metadata is answered without weights.
Everything else arrives in `__torch_dispatch__` as an ATen operation and gets weights in fresh memory, so a weight used
in a way nobody thought of here is still the right one. What would write to a placeholder, or read its memory directly,
is refused with the tensor's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from edge_client.pairs import Pair, same, written
from shared.errors import UserError

SLICE = 1 << 21  # weights of a matrix that are in memory at a time
_ALIGNED = 64  # rows


class Weights(Protocol):
    """Where a placeholder's weights come from: one tensor of the manifest."""

    name: str

    @property
    def sides(self) -> int:
        """How many models the weights are wanted of at once: 2 while both probes of a step run together, else 1."""

    def fill(self, starts: Tensor, *outs: Tensor) -> None:
        """outs, one for each side, (S, L) = the weights of segments that start at the flat indices starts (S,)."""

    def scratch(self, slot: int, elements: int) -> Tensor:
        """Flat memory of the weights' dtype that stays valid until the same slot is asked for again."""

    def fresh(self, elements: int) -> Tensor:
        """New flat memory of the weights' dtype."""


class Placeholder(Tensor):
    """Looks like a parameter with the shape, dtype and device of the weights it stands for."""

    _is_param = True  # isinstance(self, torch.nn.Parameter) holds
    weights: Weights
    offset: int  # of its first element in the flat tensor
    # Asking a tensor of this class for its shape passes through Python; these are asked at every use.
    form: torch.Size
    count: int
    start: Tensor  # the offset, int64 (1,)

    @staticmethod
    def __new__(
        cls, weights: Weights, offset: int, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Placeholder:
        """A placeholder for `shape` elements from `offset` on of a tensor."""
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
            made.stand_for(weights, offset, shape, device)
        return made

    def stand_for(self, weights: Weights, offset: int, shape: torch.Size, device: torch.device) -> None:
        """Remember what this is a placeholder for."""
        self.weights = weights
        self.offset = offset
        self.form = shape
        self.count = shape.numel()
        self.start = torch.tensor([offset], device=device)

    def part(self, offset: int, shape: torch.Size) -> Placeholder:
        """A placeholder for the `shape` elements from `offset` on, counted in this one."""
        return Placeholder(self.weights, self.offset + offset, shape, self.dtype, self.device)

    def into(self, *memory: Tensor) -> Tensor:
        """The weights, written to `memory` (flat, of as many elements, one for each side) and viewed in shape."""
        self.weights.fill(self.start, *[out.view(1, -1) for out in memory])
        return _of_sides([out.view(self.form) for out in memory])

    def in_scratch(self, slot: int) -> Tensor:
        """The weights in scratch memory."""
        sides = self.weights.sides
        return self.into(*[self.weights.scratch(sides * slot + side, self.count) for side in range(sides)])

    def in_fresh(self) -> Tensor:
        """The weights in memory of their own."""
        return self.into(*[self.weights.fresh(self.count) for _ in range(self.weights.sides)])

    def rows(self, index: Tensor) -> Tensor:
        """self[index] for int64 indices of any shape, in memory of its own: only those rows are computed."""
        size = self.shape[1:].numel()
        index = same(index)
        flat = index.reshape(-1).to(torch.int64)
        # On other devices the kernel's own indexing checks; asking there would wait for the device.
        if flat.is_cpu and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < len(self):
            raise IndexError(f"index out of range in {self.weights.name}: it has {len(self)} rows")
        outs = [self.weights.fresh(flat.numel() * size) for _ in range(self.weights.sides)]
        if outs[0].numel():
            self.weights.fill(self.offset + flat * size, *(out.view(-1, size) for out in outs))
        return _of_sides([out.view(*index.shape, *self.shape[1:]) for out in outs])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Its name and shape."""
        return f"Placeholder({self.weights.name}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation at the level of Python; see the module's docstring."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            done = handler(func, args, kwargs)
            if done is not NotImplemented:
                return done
        elif getattr(func, "__name__", "") == "__set__":
            _refuse(args, kwargs, "set an attribute of")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """An ATen operation; see the module's docstring."""
        kwargs = kwargs or {}
        for target in written(func, args, kwargs):
            _refuse((target,), {}, f"write ({func._schema.name}) to")
        with torch.no_grad():
            return func(
                *tree_map_only(Placeholder, Placeholder.in_fresh, args),
                **tree_map_only(Placeholder, Placeholder.in_fresh, kwargs),
            )


def _of_sides(values: list[Tensor]) -> Tensor:
    return Pair(*values) if len(values) == 2 else values[0]


def _placeholders(values: Any) -> Iterator[Placeholder]:
    return (value for value in tree_iter(values) if isinstance(value, Placeholder))


def _refuse(args: Any, kwargs: Any, action: str) -> None:
    for found in _placeholders((args, kwargs)):
        raise UserError(
            f"the model's code tried to {action} the weight {found.weights.name!r}; under the overlay weights are "
            "computed for each operation and can only be read. Tune another model, or write the weights out first."
        )


def _refusing(action: str) -> Callable[[Any, Any, Any], Any]:
    def handler(func: Any, args: Any, kwargs: Any) -> Any:
        _refuse(args[:1], {}, action)
        return NotImplemented

    return handler


def _wants_gradient(values: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _plain(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation whose output shares no memory with its inputs: weights in scratch memory, one slot for each."""
    values = (*args, *kwargs.values())
    if _wants_gradient(values):
        return NotImplemented  # backward would read the scratch memory after it was used again
    if "out" in kwargs:
        return NotImplemented
    slot = 0
    ready = []
    for value in values:
        if isinstance(value, Placeholder):
            ready.append(value.in_scratch(slot))
            slot += 1
        else:
            ready.append(value)
    return func(*ready[: len(args)], **dict(zip(kwargs, ready[len(args) :], strict=True)))


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """F.linear; a 3-D input that is not contiguous goes as 2-D: it takes 200 times as long (torch 2.13, bf16, CPU)."""
    bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    if not isinstance(x, Placeholder) and x.dim() >= 2 and _is_sliced(weight) and not _wants_gradient((x, bias)):
        return _sliced(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
    if isinstance(x, Placeholder) or x.dim() < 3 or x.is_contiguous():
        return _plain(func, args, kwargs)
    flat = _plain(func, (x.reshape(-1, x.shape[-1]), weight, bias), {})
    return flat if flat is NotImplemented else flat.view(*x.shape[:-1], flat.shape[-1])


def _is_sliced(weight: Any) -> bool:
    """Is the weight large, and do slices of its rows give the bits that all of them give together?

    They did for 2-byte dtypes, and in float32 for so many rows (torch 2.13 on AVX-512). Elsewhere the last bits may
    differ, for both probes alike.
    """
    if not isinstance(weight, Placeholder) or weight.count <= SLICE or len(weight.form) != 2:
        return False
    return weight.element_size() == 2 or weight.form[0] % _ALIGNED == 0


def _sliced(x: Tensor, weight: Placeholder, bias: Tensor | None) -> Tensor:
    """F.linear of x (N, D), with some of the weight's rows in memory at a time; products go where they belong."""
    count, size = weight.form
    step = max(_ALIGNED, SLICE // size // _ALIGNED * _ALIGNED)
    out = x.new_empty(len(x), count)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        part = weight.part(start * size, torch.Size((rows.stop - start, size))).in_scratch(0)
        if bias is None:
            torch.mm(x, part.t(), out=out[:, rows])
        else:
            torch.addmm(bias[rows], x, part.t(), out=out[:, rows])
    return out


def _embedding(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    bound = dict(zip(names, args, strict=False)) | kwargs
    if bound.get("max_norm") is not None:
        _refuse((bound["weight"],), {}, "renormalise (max_norm)")
    if not isinstance(bound["weight"], Placeholder) or isinstance(bound["input"], Placeholder):
        return NotImplemented
    return bound["weight"].rows(bound["input"])


def _item(func: Any, args: Any, kwargs: Any) -> Any:
    """weight[index]: one entry of the first dimension, or several."""
    weight, index = args
    if not isinstance(weight, Placeholder) or weight.dim() < 2:
        return NotImplemented
    if isinstance(index, Tensor):
        index = same(index)
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype not in (torch.bool, torch.uint8):
        if index.dim():
            # Negative indices count from the end, as in torch.
            return weight.rows(torch.where(index < 0, index + len(weight), index))
        index = int(index)
    if type(index) is not int:
        return NotImplemented
    if not -len(weight) <= index < len(weight):
        raise IndexError(f"index {index} is out of range in {weight.weights.name}: it has {len(weight)} entries")
    shape = weight.shape[1:]
    return weight.part((index % len(weight)) * shape.numel(), shape)


def _gradient(func: Any, args: Any, kwargs: Any) -> Any:
    """requires_grad = value and requires_grad_(value): False is what holds anyway."""
    if (args[1:] or tuple(kwargs.values()) or (True,))[0]:
        _refuse(args[:1], {}, "ask for a gradient of")
    return args[0]


_PLAIN = (
    torch.addmm, Tensor.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__,
    torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.conv1d, F.conv1d, torch.conv2d, F.conv2d,
    F.layer_norm, torch.layer_norm, F.group_norm, F.rms_norm, torch.rms_norm,
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__,
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__,
    torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__,
)  # fmt: skip

_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys(_PLAIN, _plain),
    F.linear: _linear,
    F.embedding: _embedding,
    torch.embedding: lambda func, args, kwargs: (
        _embedding(func, (args[1], args[0]), {}) if len(args) > 1 else NotImplemented
    ),
    Tensor.__getitem__: _item,
    Tensor.__setitem__: _refusing("write to"),
    Tensor.requires_grad_: _gradient,
    Tensor.requires_grad.__set__: _gradient,  # type: ignore[attr-defined]
    Tensor.data_ptr: _refusing("read the memory of"),
    Tensor.untyped_storage: _refusing("read the memory of"),
    Tensor.numpy: _refusing("read the memory of"),
    Tensor.__deepcopy__: _refusing("copy"),
    Tensor.__reduce_ex__: _refusing("pickle"),
}
