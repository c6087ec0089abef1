"""The gradient of the offsets: that of finite differences, and that of dense autograd on the written-out model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from overlays import POOL_KEY, SEEDS, CountingKernel, overlay_of
from tiny_models import CONFIGS, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from edge_client import first_order_gradient
from edge_client.data.batches import Batch
from edge_client.first_order_gradient import OffsetGradient
from edge_client.kernels.bucket_sums import reference
from edge_client.kernels.bucket_sums_numba import numba_sums
from edge_client.kernels.torch_any import TorchKernel
from edge_client.loss import labelled_loss
from edge_client.placeholders import Placeholder
from shared.directions import hadamard_row
from shared.errors import UserError


def dense_gradient(name: str, dtype: torch.dtype) -> np.ndarray:
    """dL/dy by autograd on real parameters, float64 (SEEDS,)."""
    return dense_gradient_of(tiny_model(name, dtype))


def dense_gradient_of(model: Any) -> np.ndarray:
    overlay = overlay_of(model)
    manifest = overlay.manifest
    overlay.write_out()
    model.requires_grad_(True)
    labelled_loss(model, tiny_batch()).backward()
    weights = dict(model.named_parameters(remove_duplicate=False))
    total = np.zeros(SEEDS)
    for number, tensor in enumerate(manifest.tensors):
        grad = weights[tensor.name].grad
        if grad is not None:
            flat = grad.float().reshape(1, -1).numpy()
            total += reference(flat, np.zeros(1, np.int64), SEEDS, tensor=number, pool_key=POOL_KEY)
    return total


def measured(name: str, dtype: torch.dtype, kernel: object = None, at_once: int | None = None) -> np.ndarray:
    model = tiny_model(name, dtype)
    _, gradient = OffsetGradient(overlay_of(model, kernel=kernel)).measure(model, tiny_batch(), at_once)
    return gradient


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_that_of_the_written_out_model(name: str) -> None:
    assert relative_error(measured(name, torch.float32), dense_gradient(name, torch.float32)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_half_precision_gradient_is_close_to_that_of_the_same_weights(name: str, dtype: torch.dtype) -> None:
    assert relative_error(measured(name, dtype), dense_gradient(name, dtype)) < 0.02


class Sharing(torch.nn.Module):
    """Its second layer reads what the first left in an object that both are given."""

    class Layer(torch.nn.Linear):
        def forward(self, x: Tensor, shared: Any, number: int = 0) -> Tensor:
            y = super().forward(x).tanh()
            if number == 0:
                shared.y = y
            return x + y * shared.y

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.layers = torch.nn.ModuleList([self.Layer(8, 8), self.Layer(8, 8)])
        self.head = torch.nn.Linear(8, VOCABULARY)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        x, shared = self.embed(input_ids), SimpleNamespace()
        for number, layer in enumerate(self.layers):
            x = layer(x, shared, number=number)
        return SimpleNamespace(logits=self.head(x))


def test_what_layers_hand_on_past_their_outputs_counts_too() -> None:
    torch.manual_seed(0)
    model: Any = Sharing().requires_grad_(False)
    wanted = dense_gradient_of(deepcopy(model))
    measure = OffsetGradient(overlay_of(model))
    for _ in range(2):
        assert relative_error(measure.measure(model, tiny_batch())[1], wanted) < 1e-5


def test_gradient_is_that_of_finite_differences() -> None:
    model = tiny_model("llama-tied")
    overlay = overlay_of(model)
    loss, gradient = OffsetGradient(overlay).measure(model, tiny_batch())
    assert loss == pytest.approx(float(labelled_loss(model, tiny_batch())), abs=1e-6)
    step = 1e-3
    for k in (0, 3, 128, 200):
        losses = []
        for side in (step, -step):
            with overlay.probe(k, side), torch.inference_mode():
                losses.append(float(labelled_loss(model, tiny_batch())))
        assert hadamard_row(k, SEEDS) @ gradient == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=5e-3)


def test_slices_portions_and_kernels_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured("llama", torch.float32)
    assert relative_error(measured("llama", torch.float32, kernel=TorchKernel()), whole) < 1e-6
    assert relative_error(measured("llama", torch.float32, at_once=1), whole) < 1e-5
    monkeypatch.setattr(first_order_gradient, "SLICE", 100)  # four rows of 24
    assert relative_error(measured("llama", torch.float32), whole) < 1e-5


def test_a_weight_that_is_used_in_an_unforeseen_way_counts_too() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.einsum("oi,bi->bo", module.weight, x).tanh() @ module.weight.t()[:3].exp().sum(0)

    module = torch.nn.Linear(5, 4, bias=False).requires_grad_(False)
    overlay = overlay_of(module)
    x = torch.arange(10.0).view(2, 5) / 10
    total = torch.zeros(SEEDS, dtype=torch.float64)
    with overlay.placed(taking(lambda grads, starts: first_order_sum(total, grads, starts))), torch.enable_grad():
        forward(x).sum().backward()
    overlay.write_out()
    module.requires_grad_(True)
    forward(x).sum().backward()
    wanted = torch.zeros(SEEDS, dtype=torch.float64)
    first_order_sum(wanted, module.weight.grad.view(1, -1), torch.zeros(1, dtype=torch.int64))  # type: ignore[union-attr]
    assert float(wanted.norm()) > 0 and torch.allclose(total, wanted, rtol=1e-5)


def taking(add: Callable[[Tensor, Tensor], None]) -> Callable[[Any, int], Placeholder]:
    def make(weights: Any, number: int) -> Placeholder:
        return first_order_gradient.Tracked(weights, 0, weights.shape, torch.float32, torch.device("cpu"), add)

    return make


def first_order_sum(total: Tensor, grads: Tensor, starts: Tensor) -> None:
    numba_sums(grads.contiguous(), starts, total, tensor=0, pool_key=POOL_KEY)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_no_more_than_one_tensors_weights_and_gradient_are_alive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    overlay = overlay_of(model)
    alive: list[tuple[StorageWeakRef, int]] = []
    peak = 0

    def watch(tensor: Tensor) -> None:
        nonlocal peak
        alive[:] = [(ref, size) for ref, size in alive if not ref.expired()]
        if all(ref.cdata != tensor.untyped_storage()._cdata for ref, _ in alive):
            alive.append((StorageWeakRef(tensor.untyped_storage()), tensor.numel()))
        peak = max(peak, sum(size for _, size in alive))

    def fresh(elements: int, of: Any = overlay._scratch.fresh) -> Tensor:
        made: Tensor = of(elements)
        watch(made)
        return made

    def summed(grads: Tensor, starts: Tensor, total: Tensor, **where: Any) -> None:
        watch(grads)
        numba_sums(grads, starts, total, **where)

    monkeypatch.setattr(overlay._scratch, "fresh", fresh)
    measure = OffsetGradient(overlay)
    monkeypatch.setattr(measure, "_sum", summed)
    measure.measure(model, tiny_batch())
    sizes = sorted((tensor.elements for tensor in overlay.manifest.tensors), reverse=True)
    # Scratch memory for a weight and its bias, a weight that autograd asked for, a gradient.
    assert 0 < peak <= 3 * sizes[0]
    assert peak < sum(sizes) / 2


def test_only_looked_up_rows_of_an_embedding_are_computed_and_summed() -> None:
    model = tiny_model("llama")
    kernel = CountingKernel()
    overlay = overlay_of(model, kernel=kernel)
    measure = OffsetGradient(overlay)
    number = [tensor.name for tensor in overlay.manifest.tensors].index("model.embed_tokens.weight")
    sizes = []

    def summed(grads: Tensor, starts: Tensor, total: Tensor, *, tensor: int, pool_key: int) -> None:
        if tensor == number:
            sizes.append(grads.numel())
        numba_sums(grads, starts, total, tensor=tensor, pool_key=pool_key)

    measure._sum = summed
    measure.measure(model, tiny_batch())
    assert sizes == [33 * 24]  # tokens of the batch, hidden size
    assert kernel.tensors.count(number) == 1


def test_plain_placeholders_stand_again_also_after_an_error() -> None:
    model = tiny_model("llama")
    overlay = overlay_of(model)
    batch = tiny_batch()
    before = labelled_loss(model, batch)
    out_of_range = Batch(batch.input_ids + 1000, batch.attention_mask, batch.labels)
    with pytest.raises(IndexError):
        OffsetGradient(overlay).measure(model, out_of_range)
    OffsetGradient(overlay).measure(model, batch)
    assert torch.equal(labelled_loss(model, batch), before)
    assert type(model.lm_head.weight) is Placeholder
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_other_directions_are_refused(kind: Any) -> None:
    with pytest.raises(UserError, match="exact gradients need 'hadamard'"):
        OffsetGradient(overlay_of(tiny_model("llama"), kind))


def test_a_float16_gradient_that_overflows_is_scaled_down() -> None:
    model = tiny_model("llama-tied", torch.float16)
    measure = OffsetGradient(overlay_of(model))
    wanted = measure.measure(model, tiny_batch())[1]
    measure._scale = 2.0**24
    assert relative_error(measure.measure(model, tiny_batch())[1], wanted) < 0.02
    assert measure._scale < 2.0**24
