"""Layers that keep their inputs alone and run again in backward (Chen et al. 2016, arXiv 1604.06174).

Not `torch.utils.checkpoint`, which in the second run keeps what autograd asks for by hooks of its own, and not
transformers' switch for it, which works in training mode alone, where there is dropout. Layers are the modules of the
outermost module lists: no architecture has to be known. A layer that leaves tensors to later ones in an object that it
is given (models that share keys and values) is found out: gradients on that way would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class Carried(Exception):
    """Layers hand tensors on past their outputs, so they cannot run again one by one."""


@contextmanager
def run_again(model: nn.Module) -> Iterator[None]:
    """While it lasts, activations within a layer of `model` are forgotten and computed again in backward.

    The forward pass raises Carried where that would lose gradients.
    """
    layers = list(_layers(model))
    anchor = torch.zeros((), requires_grad=True)
    for layer in layers:
        layer.forward = partial(_run, layer.forward, anchor)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if "forward" not in vars(layer))
        else:
            yield from _layers(child)


def _run(forward: Callable[..., Any], anchor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """forward(*args, **kwargs)."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    tensors, together = _apart((args, kwargs))
    given: list[Callable[[Sequence[Tensor]], Any]] = []

    def call(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        args, kwargs = together(tensors)
        before = _held((args, kwargs))
        outputs, together_again = _apart(forward(*args, **kwargs))
        if _held((args, kwargs)) != before:
            raise Carried
        given[:] = [together_again]
        return outputs

    outputs = _Layer.apply(call, anchor, *tensors)  # type: ignore[no-untyped-call]
    return given[0](outputs)


def _apart(value: Any) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Any]]:
    """The tensors in `value`, and what puts others in their places."""
    leaves, spec = tree_flatten(value)
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    rest = [None if mine else leaf for leaf, mine in zip(leaves, is_tensor, strict=True)]

    def together(tensors: Sequence[Tensor]) -> Any:
        left = iter(tensors)
        return tree_unflatten([next(left) if mine else leaf for leaf, mine in zip(rest, is_tensor, strict=True)], spec)

    return tensors, together


def _held(value: Any) -> set[int]:
    """Which tensors are in `value` and, one level deep, in the objects in it."""
    leaves = tree_leaves(value)
    within = [dict(leaf) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", None) for leaf in leaves]
    return {id(leaf) for leaf in [*leaves, *tree_leaves(within)] if isinstance(leaf, Tensor)}


class _Layer(Function):
    """The tensors that a layer gives for the tensors it is given."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[Any], tuple[Tensor, ...]], anchor: Tensor, *tensors: Tensor) -> Any:
        """anchor: needs a gradient, so that the layer runs again also where no other input does."""
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        outputs = call(tensors)
        ctx.mark_non_differentiable(*(tensor for tensor in outputs if not tensor.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors given."""
        needed = ctx.needs_input_grad[2:]
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = ctx.call(inputs)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        del outputs, grads
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return None, None, *(tensor.grad for tensor in inputs)
