"""Placeholders give every operation the right weights, compute no more than they must, and cannot be written."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from overlays import CountingKernel, overlay_of
from tiny_models import tiny_ids, tiny_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from edge_client import placeholders
from shared.errors import UserError


class Weights(nn.Module):
    """A matrix, a vector, a stack of matrices and an embedding, without a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(6, 10))
        self.vector = nn.Parameter(torch.randn(10))
        self.stack = nn.Parameter(torch.randn(4, 6, 10))
        self.rows = nn.Embedding(20, 10)
        self.requires_grad_(False)


x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(1))
ids = torch.tensor([[3, 0, 19], [3, 3, 7]])

USES: dict[str, Callable[[Weights], object]] = {
    "linear": lambda m: F.linear(x, m.matrix),
    "linear by keyword": lambda m: F.linear(input=x, weight=m.matrix, bias=None),
    "linear with bias": lambda m: F.linear(x[0], m.stack[1], m.matrix[:, 0]),
    "linear, not contiguous": lambda m: F.linear(x.transpose(0, 1), m.matrix),
    "linear of one vector": lambda m: F.linear(x[0, 0], m.matrix),
    "linear of a weight": lambda m: F.linear(m.matrix, m.matrix),
    "matmul": lambda m: x @ m.matrix.T,
    "matmul from the left": lambda m: m.matrix @ x[0].T,
    "addmm, all of them weights": lambda m: torch.addmm(m.vector, m.matrix[:3, :6], m.matrix),
    "einsum": lambda m: torch.einsum("bti,oi->bto", x, m.matrix),
    "norm": lambda m: F.layer_norm(x, (10,), m.vector, m.vector),
    "norm by hand": lambda m: x * (1.0 + m.vector.float()),
    "product of weights": lambda m: m.vector * m.vector + m.vector,
    "scalar by weight": lambda m: 2 - m.vector,
    "sum in place": lambda m: x.clone().add_(m.vector),
    "augmented": lambda m: augmented(x.clone(), m.vector),
    "slice": lambda m: m.matrix[1:3],
    "last entry": lambda m: m.stack[-1] * 1,
    "entry by tensor": lambda m: F.linear(x, m.stack[torch.tensor(2)]),
    "entry of an entry": lambda m: m.stack[2][5] * 1,
    "entries of an entry": lambda m: m.stack[2][torch.tensor([5, 0, 5])],
    "entries": lambda m: m.stack[torch.tensor([1, -1, 0])],
    "mask": lambda m: m.stack[torch.tensor([True, False, True, False])],
    "embedding": lambda m: m.rows(ids),
    "embedding of nothing": lambda m: m.rows(ids[:0]),
    "embedding by function": lambda m: torch.embedding(m.rows.weight, ids),
    "embedding as a head": lambda m: F.linear(x, m.rows.weight),
    "view": lambda m: m.matrix.view(-1) + 0,
    "transpose": lambda m: m.stack.transpose(1, 2).contiguous(),
    "split": lambda m: torch.cat(m.matrix.split(2)[::-1]),
    "iteration": lambda m: torch.stack(list(m.matrix)),
    "concatenation": lambda m: torch.cat([m.matrix, m.stack[0]]),
    "cast": lambda m: m.matrix.to(torch.float64),
    "data": lambda m: m.matrix.data,
    "reduction": lambda m: m.matrix.sum().item(),
    "comparison": lambda m: bool((m.matrix > 0).any()),
    "copy to": lambda m: torch.empty(6, 10).copy_(m.matrix),
    "state": lambda m: m.state_dict()["rows.weight"],
    "convolution": lambda m: F.conv1d(x, m.stack[:, :3]),
}


def augmented(value: Tensor, weight: Tensor) -> Tensor:
    value += weight
    return value


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
@pytest.mark.parametrize("use", USES)
def test_an_operation_gets_the_weights_it_would_find_written_out(
    use: str, mode: Callable[[], torch.inference_mode]
) -> None:
    model = Weights()
    overlay = overlay_of(model)
    with mode():
        found = USES[use](model)
        again = USES[use](model)
    overlay.write_out()
    with mode():
        wanted = USES[use](model)
    for value in (found, again):
        if isinstance(wanted, Tensor):
            assert isinstance(value, Tensor) and type(value) is Tensor
            # Flattened, this one takes another way through torch than a plain module's would.
            same = torch.allclose if use == "linear, not contiguous" else torch.equal
            assert same(value, wanted)
        else:
            assert value == wanted


def test_results_are_not_overwritten_by_later_operations() -> None:
    model = Weights()
    overlay_of(model)
    with torch.inference_mode():
        kept = {name: use(model) for name, use in USES.items()}
        snapshots = {name: value.clone() for name, value in kept.items() if isinstance(value, Tensor)}
        for _ in range(2):
            for use in USES.values():
                use(model)
    for name, before in snapshots.items():
        assert torch.equal(kept[name], before), name  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "is_sliced"), [(1024, True), (1001, False)])
def test_a_large_linear_layer_is_used_in_slices_of_rows_with_the_same_bits(
    dtype: torch.dtype, rows: int, is_sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placeholders, "SLICE", 1 << 13)
    torch.manual_seed(0)
    model = nn.Linear(48, rows, dtype=dtype).requires_grad_(False)
    value = torch.randn(3, 37, 48).to(dtype)
    overlay = overlay_of(model)
    with torch.inference_mode():
        found = model(value)
    is_sliced = is_sliced or dtype != torch.float32
    assert (overlay.scratch_bytes <= ((1 << 13) + rows) * dtype.itemsize) == is_sliced
    overlay.write_out()
    with torch.inference_mode():
        assert torch.equal(found, model(value))


def test_gradients_of_inputs_are_right() -> None:
    model = Weights()
    overlay = overlay_of(model)
    source = x.clone().requires_grad_()

    def loss() -> Tensor:
        return (F.linear(F.linear(source, model.matrix), model.stack[0].T) * model.vector).sum()

    found = torch.autograd.grad(loss(), source)[0]
    overlay.write_out()
    assert torch.equal(found, torch.autograd.grad(loss(), source)[0])


def test_metadata_costs_no_weights() -> None:
    model = Weights()
    kernel = CountingKernel()
    overlay_of(model, kernel=kernel)
    weight = model.matrix
    assert (weight.shape, weight.dtype, weight.device.type) == ((6, 10), torch.float32, "cpu")
    assert (weight.ndim, weight.size(1), len(weight), weight.numel(), weight.stride()) == (2, 10, 6, 60, (10, 1))
    assert weight.is_floating_point() and not weight.requires_grad and weight.is_contiguous() and not weight.is_meta
    assert isinstance(weight, nn.Parameter)
    assert weight.to("cpu") is weight and weight.requires_grad_(False) is weight
    assert repr(weight) == "Placeholder(matrix, [6, 10], torch.float32)"
    assert [name for name, _ in model.named_parameters()] == ["matrix", "vector", "stack", "rows.weight"]
    model.requires_grad_(False)
    model.zero_grad()
    assert kernel.weights == 0


def test_only_the_weights_in_use_are_computed() -> None:
    model = Weights()
    kernel = CountingKernel()
    overlay_of(model, kernel=kernel)
    for use, weights in (("embedding", 60), ("entry by tensor", 60), ("entries", 180), ("linear", 60)):
        kernel.weights = 0
        USES[use](model)
        assert kernel.weights == weights, use


WRITES: dict[str, Callable[[Weights], object]] = {
    "multiply": lambda m: m.matrix.mul_(2),
    "assign an entry": lambda m: m.matrix.__setitem__(0, 1.0),
    "assign data": lambda m: setattr(m.matrix, "data", torch.zeros(6, 10)),
    "output of an operation": lambda m: torch.add(x[0, 0], 1, out=m.vector),
    "output of a product": lambda m: torch.mul(x[0, 0], m.vector, out=m.vector),
    "initialise": lambda m: nn.init.zeros_(m.matrix),
    "load": lambda m: m.load_state_dict({"matrix": torch.zeros(6, 10)}, strict=False),
    "gradient": lambda m: m.matrix.requires_grad_(),
    "gradient by attribute": lambda m: setattr(m.matrix, "requires_grad", True),
    "pointer": lambda m: m.matrix.data_ptr(),
    "array": lambda m: m.matrix.numpy(),
    "deep copy": lambda m: copy.deepcopy(m),
    "pickle": lambda m: torch.save(m.matrix, io.BytesIO()),
    "renormalise": lambda m: F.embedding(ids, m.matrix, max_norm=1.0),
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("write", WRITES)
def test_writing_or_reaching_into_a_weight_is_refused_by_name(
    write: str, mode: Callable[[], torch.inference_mode]
) -> None:
    model = Weights()
    overlay = overlay_of(model)
    before = overlay.model_digest()
    with pytest.raises((UserError, RuntimeError), match=r"the weight '(matrix|vector)'"), mode():
        WRITES[write](model)
    assert overlay.model_digest() == before and not model.matrix.requires_grad


def test_an_index_outside_a_weight_is_an_error() -> None:
    model = Weights()
    overlay_of(model)
    for use in (lambda: model.rows(ids + 1), lambda: model.rows(ids - 1), lambda: model.stack[torch.tensor([4])]):
        with pytest.raises(IndexError, match=r"index out of range in (rows.weight|stack)"):
            use()
    with pytest.raises(IndexError, match="index 4 is out of range in stack: it has 4 entries"):
        model.stack[4]


def test_an_encoder_decoder_computes_what_it_would_with_weights_written_out() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=101, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    overlay = overlay_of(model)
    with torch.inference_mode():
        found = model(input_ids=tiny_ids(), decoder_input_ids=tiny_ids(seed=1)).logits
        overlay.write_out()
        wanted = model(input_ids=tiny_ids(), decoder_input_ids=tiny_ids(seed=1)).logits
    assert torch.equal(found, wanted)


def test_generation_runs_on_placeholders() -> None:
    model = tiny_model("llama")
    overlay = overlay_of(model)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    found = model.generate(tiny_ids(1, 4), **arguments)
    overlay.write_out()
    assert torch.equal(found, model.generate(tiny_ids(1, 4), **arguments))
