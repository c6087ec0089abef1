"""The exact gradient of a loss with respect to the K offsets, by backprop through the overlay.

With w = w0 + s * y[b], dL/dy is the signed bucket sum of each tensor's weight gradient
(`edge_client.kernels.bucket_sums`), taken as soon as backward has one and forgotten: no gradient of all weights ever
exists. dL/da = H dL/dy.

In place of plain placeholders stand `Tracked` ones, leaves of autograd without memory. What autograd keeps for backward
is the placeholder, not its weights; they are computed again when backward uses them. `F.linear` and looked-up rows have
Functions of their own, which never hold more than a slice of a weight and of its gradient; every other operation is
autograd's own and gets a whole tensor's at a time. Activations live for one layer (`first_order_layers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import Function

from edge_client.data.batches import Batch
from edge_client.first_order_layers import Carried, run_again
from edge_client.kernels.bucket_sums import bucket_sums_for
from edge_client.loss import labelled, token_losses
from edge_client.overlay import BaseWeights, Overlay
from edge_client.placeholders import Placeholder
from edge_client.shortage import in_portions
from shared.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLICE = 1 << 22  # weights, and as many of their gradient, at a time
_HALF_SCALE = 4096.0  # of the loss, so that float16 gradients do not vanish; lowered where they overflow


class OffsetGradient:
    """dL/dy of one model under one overlay. Raises UserError where the run's directions are not Hadamard rows."""

    def __init__(self, overlay: Overlay) -> None:
        if overlay.directions != "hadamard":
            raise UserError(
                f"the run's directions are {overlay.directions!r}; exact gradients need 'hadamard', whose rows make K "
                "numbers of a gradient in one pass. Join with the estimator forward."
            )
        self._overlay = overlay
        self._sum = bucket_sums_for(overlay.kernel)
        self._running: Callable[[PreTrainedModel], AbstractContextManager[None]] = run_again
        self._scale = _HALF_SCALE if overlay.dtype == "fp16" else 1.0

    def measure(self, model: PreTrainedModel, batch: Batch, at_once: int | None = None) -> tuple[float, NDArray[Any]]:
        """The mean loss of the labelled tokens, in nats, and its gradient with respect to y, float64 (K,).

        model: the overlay's. at_once: sequences that go through it together (None: all). Raises UserError where loss
        or gradient is not finite, and as `edge_client.loss.labelled` does.
        """
        while True:
            try:
                loss, gradient = self._measured(model, batch, at_once)
            except Carried:
                self._running = lambda _: nullcontext()  # all layers' activations are kept, now and from now on
                continue
            if torch.isfinite(gradient).all() and math.isfinite(loss):
                return loss, gradient.cpu().double().numpy()
            if self._scale <= 1.0 or not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} and its gradient is not finite everywhere; both must be. "
                    "Lower the step, or load the model in bf16 or fp32."
                )
            self._scale /= 16.0

    def _measured(self, model: PreTrainedModel, batch: Batch, at_once: int | None) -> tuple[float, Tensor]:
        device = batch.input_ids.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        total = torch.zeros(self._overlay.seeds, dtype=wide, device=device)
        tokens = len(labelled(batch).targets)
        loss = 0.0

        def tracked(weights: BaseWeights, number: int) -> Placeholder:
            add = partial(self._sum, total=total, tensor=number, pool_key=self._overlay.pool_key)
            return Tracked(weights, 0, weights.shape, weights.base.dtype, weights.base.device, add)

        with self._overlay.placed(tracked), self._running(model), torch.enable_grad():
            for portion in in_portions(batch, at_once):
                part = token_losses(model, portion).sum() / tokens
                (part * self._scale).backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
        return loss, total / self._scale


class Tracked(Placeholder):
    """A placeholder that autograd takes for a leaf; `receive(grads (S, L), starts (S,))` gets its gradient."""

    receive: Callable[[Tensor, Tensor], None]

    @staticmethod
    def __new__(
        cls,
        weights: Any,
        offset: int,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        receive: Callable[[Tensor, Tensor], None],
    ) -> Tracked:
        """As Placeholder, with a taker of gradients."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=True)
        made.stand_for(weights, offset, shape, device)
        made.receive = receive
        made.register_post_accumulate_grad_hook(_taken)  # type: ignore[no-untyped-call]
        return made

    def part(self, offset: int, shape: torch.Size) -> Tracked:
        """See Placeholder."""
        return Tracked(self.weights, self.offset + offset, shape, self.dtype, self.device, self.receive)

    def rows(self, index: Tensor) -> Tensor:
        """See Placeholder."""
        if not torch.is_grad_enabled():
            return super().rows(index)
        looked_up: Tensor = _Rows.apply(self, index)  # type: ignore[no-untyped-call]
        return looked_up

    def pass_on(self, grads: Tensor) -> None:
        """The gradient of all its elements."""
        self.receive(grads.contiguous().view(1, -1), torch.tensor([self.offset], device=grads.device))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See Placeholder."""
        if func is F.linear and torch.is_grad_enabled():
            bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
            is_known = bias is None or isinstance(bias, Tracked)
            if isinstance(weight, Tracked) and is_known and not isinstance(x, Placeholder):
                flat = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
                return flat.view(*x.shape[:-1], flat.shape[-1])
        return super().__torch_function__(func, types, args, kwargs)


def _taken(leaf: Tensor) -> None:
    """What autograd has accumulated in a leaf goes on at once."""
    assert isinstance(leaf, Tracked)
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        grads = leaf.grad
        leaf.grad = None
    if grads is not None:  # a Function of ours has passed its part on by itself
        leaf.pass_on(grads)


class _Rows(Function):
    """Looked-up rows; only their gradients exist."""

    @staticmethod
    def forward(ctx: Any, weight: Tracked, index: Tensor) -> Tensor:
        """See `Placeholder.rows`."""
        ctx.weight = weight
        ctx.save_for_backward(index)
        return weight.rows(index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        """The looked-up segments' gradients, on their way."""
        weight, (index,) = ctx.weight, ctx.saved_tensors
        size = weight.shape[1:].numel()
        starts = weight.offset + index.reshape(-1).to(torch.int64) * size
        weight.receive(grads[0].reshape(-1, size).contiguous(), starts)
        return None, None


class _Linear(Function):
    """F.linear with 2-D input, whose backward computes weights and their gradient slice by slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tracked, bias: Tracked | None) -> Tensor:
        """x (N, in), weight (out, in), bias (out,); gives (N, out)."""
        ctx.weight, ctx.bias = weight, bias
        ctx.save_for_backward(x)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        """The gradient of x; those of weight and bias are on their way."""
        (x,), (grad,), weight = ctx.saved_tensors, grads, ctx.weight
        rows = max(1, SLICE // weight.shape[1])
        is_sliced = rows < len(weight)
        grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if is_sliced else None
        for start in range(0, len(weight), rows):
            mine = grad[:, start : start + rows]
            part = weight.part(start * weight.shape[1], torch.Size((mine.shape[1], weight.shape[1])))
            if ctx.needs_input_grad[0]:
                product = mine @ part.in_scratch(0)
                grad_x = product if grad_x is None else grad_x.add_(product)
            part.pass_on(mine.t() @ x)
        if ctx.bias is not None:
            ctx.bias.pass_on(grad.sum(0))
        return (grad_x.to(x.dtype) if grad_x is not None and ctx.needs_input_grad[0] else None), None, None
