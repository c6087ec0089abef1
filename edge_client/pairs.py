"""Two computations in step: a `Pair` is the same tensor under both probes, and every operation on it runs twice.

One forward pass with pairs in it computes what two passes would, operation by operation, so each base weight is read
from its disk or unpacked once for both. Each half sees the tensors and the functions that a pass of its own would see,
so its bits are those of that pass, and nothing of one half can reach the other. Where the code asks for a number or a
shape that differs between the halves there is no one answer (a mixture of experts sends a token to another expert):
`Diverged`, and the caller measures in two passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WRITES = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_WRITES |= {"__setitem__", "__ilshift__", "__irshift__"}


class Diverged(Exception):
    """The halves of a pair need different answers here, so they cannot go through the model together."""


class Pair(Tensor):
    """Looks like either half: same shape, dtype and device."""

    plus: Tensor
    minus: Tensor

    @staticmethod
    def __new__(cls, plus: Tensor, minus: Tensor) -> Pair:
        """Raises Diverged where the halves differ in shape, dtype or device."""
        if plus.shape != minus.shape or plus.dtype != minus.dtype or plus.device != minus.device:
            raise Diverged(f"one half is {list(plus.shape)} of {plus.dtype}, the other {list(minus.shape)}")
        made = Tensor._make_wrapper_subclass(
            cls, plus.shape, strides=plus.stride(), dtype=plus.dtype, device=plus.device, requires_grad=False
        )
        made.plus = plus
        made.minus = minus
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Both halves."""
        return f"Pair({self.plus!r}, {self.minus!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation at the level of Python, once for each half."""
        if not _PLAIN.issuperset(types):
            return NotImplemented  # placeholders first: they give their weights as pairs
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(args[0].plus, *args[1:], **kwargs)
        if func is Tensor.__iter__:
            return iter(args[0].unbind(0))
        name = getattr(func, "__name__", "")
        if "out" in kwargs:
            _check_written(kwargs["out"], name)
        if name in _WRITES or name == "__set__" or (name.endswith("_") and not name.endswith("__")):
            _check_written(args[0] if args else None, name)
        return _twice(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """An ATen operation that torch's own code called, once for each half."""
        if not _PLAIN.issuperset(types):
            return NotImplemented
        kwargs = kwargs or {}
        for target in written(func, args, kwargs):
            _check_written(target, func._schema.name)
        return _twice(func, args, kwargs)


_PLAIN = {Pair, Tensor, nn.Parameter}
_METADATA = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.__len__,
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__, Tensor.is_cpu.__get__, Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
}  # fmt: skip


def halves(value: Any) -> tuple[Any, Any]:
    """What `value` is in each of the two computations; what is no pair is the same in both."""
    return _half(value, "plus"), _half(value, "minus")


def same(value: Tensor) -> Tensor:
    """The one tensor that both halves are equal to. Raises Diverged where they are not."""
    plus, minus = halves(value)
    if plus is not minus and not torch.equal(plus, minus):
        raise Diverged("indices differ between the halves")
    return plus  # type: ignore[no-any-return]


def written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an ATen operation writes to, as `__torch_dispatch__` gets them."""
    if not func._schema.is_mutable:
        return []
    formal = func._schema.arguments
    given = dict(zip((argument.name for argument in formal), args, strict=False)) | kwargs
    return [given.get(one.name) for one in formal if one.alias_info is not None and one.alias_info.is_write]


def _twice(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    plus = func(*_half(args, "plus"), **_half(kwargs, "plus"))
    minus = func(*_half(args, "minus"), **_half(kwargs, "minus"))
    first = args[0] if args else None
    if isinstance(first, Pair) and plus is first.plus and minus is first.minus:
        return first
    return _joined(plus, minus, func)


def _half(value: Any, side: str) -> Any:
    if isinstance(value, Pair):
        return getattr(value, side)
    if type(value) in (tuple, list):
        return type(value)(_half(item, side) for item in value)
    if type(value) is dict:
        return {key: _half(item, side) for key, item in value.items()}
    return value


def _joined(plus: Any, minus: Any, func: Callable[..., Any]) -> Any:
    if isinstance(plus, Tensor) and isinstance(minus, Tensor):
        return plus if plus is minus else Pair(plus, minus)
    if type(plus) in (tuple, list) and len(plus) == len(minus):
        return type(plus)(_joined(one, other, func) for one, other in zip(plus, minus, strict=True))
    if isinstance(plus, tuple) and type(plus).__module__ == "torch.return_types":
        return type(plus)(_joined(one, other, func) for one, other in zip(plus, minus, strict=True))
    if type(plus) is type(minus) and plus == minus:
        return plus
    raise Diverged(f"{getattr(func, '__name__', func)} gives {plus!r:.40} for one half and {minus!r:.40} for the other")


def _check_written(target: Any, name: str) -> None:
    """What is written must have a half for each."""
    if isinstance(target, (tuple, list)):
        for one in target:
            _check_written(one, name)
    elif isinstance(target, Tensor) and not isinstance(target, Pair):
        raise Diverged(f"{name} writes both halves into one tensor")
