"""Both probes in one pass: each half is what a pass of its own gives, bit for bit, and no half reaches the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from overlays import CountingKernel, overlay_of
from tiny_models import CONFIGS, tiny_batch, tiny_ids, tiny_model
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from edge_client import placeholders
from edge_client.bases import Base
from edge_client.estimator import OneSided, one_sided, two_point
from edge_client.loss import labelled_loss
from edge_client.overlay import Overlay
from edge_client.pairs import Diverged, Pair, halves, same
from shared.messages import DirectionKind

EPS = 1e-3
SPARSE = {"mixtral", "qwen2-moe"}


def probe_of(overlay: Overlay, k: int = 77, *, is_paired: bool, eps: float = EPS) -> Any:
    overlay.is_paired = is_paired
    return two_point(lambda: labelled_loss(overlay.model, tiny_batch()), overlay, k, eps, "f32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_paired_step_has_the_losses_and_the_scalar_of_two_passes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    overlay = overlay_of(tiny_model(name, dtype))
    before = overlay.model_digest()
    together = probe_of(overlay, is_paired=True)
    assert overlay.is_paired or name in SPARSE
    assert together == probe_of(overlay, is_paired=False)
    assert overlay.model_digest() == before


def test_slices_of_large_layers_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholders, "SLICE", 1 << 8)
    overlay = overlay_of(tiny_model("llama", torch.bfloat16))
    together = probe_of(overlay, is_paired=True)
    assert overlay.is_paired and together == probe_of(overlay, is_paired=False)
    assert overlay.scratch_bytes == 2 * 64 * 24 * 2  # 64 rows of each side


@pytest.mark.parametrize("name", CONFIGS)
def test_each_half_of_the_logits_is_that_of_its_probe(name: str) -> None:
    overlay = overlay_of(tiny_model(name))
    with torch.inference_mode():
        near = np.float32(1e-6)  # so near that all tokens go to the same experts
        with overlay.both_probes((3, near), (3, -near)):
            plus, minus = halves(overlay.model(input_ids=tiny_ids()).logits)
        for found, step in ((plus, 1e-6), (minus, -1e-6)):
            with overlay.probe(3, step):
                assert torch.equal(found, overlay.model(input_ids=tiny_ids()).logits)


def test_an_encoder_decoder_pairs() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=101, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    overlay = overlay_of(T5ForConditionalGeneration(config).eval().requires_grad_(False))
    inputs = {"input_ids": tiny_ids(2, 12), "decoder_input_ids": tiny_ids(seed=1)}  # its position bias is no batch
    with torch.inference_mode():
        with overlay.both_probes((3, np.float32(EPS)), (5, np.float32(-EPS))):
            plus, minus = halves(overlay.model(**inputs).logits)
        for found, k, step in ((plus, 3, EPS), (minus, 5, -EPS)):
            with overlay.probe(k, step):
                assert torch.equal(found, overlay.model(**inputs).logits)
    assert not torch.equal(plus, minus)


@pytest.mark.parametrize("kind", get_args(DirectionKind))
def test_all_kinds_of_directions_pair(kind: DirectionKind) -> None:
    overlay = overlay_of(tiny_model("llama"), kind)
    assert probe_of(overlay, is_paired=True) == probe_of(overlay, is_paired=False)


@pytest.mark.parametrize("kind", get_args(DirectionKind))
def test_a_group_of_one_sided_directions_pairs_two_by_two_bit_for_bit(kind: DirectionKind) -> None:
    overlay = overlay_of(tiny_model("llama", torch.bfloat16), kind)

    def group(*, is_paired: bool) -> list[OneSided]:
        overlay.is_paired = is_paired
        loss = lambda: labelled_loss(overlay.model, tiny_batch())  # noqa: E731
        return one_sided(loss, overlay, (77, 3, 3, 5, 9), EPS, "f32", (2**31,) * 5)

    together = group(is_paired=True)
    assert overlay.is_paired and together == group(is_paired=False)


def test_a_pair_of_passes_reads_each_base_once() -> None:
    class Counted:
        """A base that counts what is read of it."""

        def __init__(self, base: Base) -> None:
            self.base, self.read_weights = base, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.base, name)

        def read(self, starts: Tensor, out: Tensor) -> None:
            self.read_weights += out.numel()
            self.base.read(starts, out)

        def fill(self, add: Any, starts: Tensor, out: Tensor) -> None:
            self.read_weights += out.numel()
            self.base.fill(add, starts, out)

    kernel = CountingKernel()
    overlay = overlay_of(tiny_model("gpt2"), kernel=kernel)
    for weights in overlay._weights.values():
        weights.base = Counted(weights.base)  # type: ignore[assignment]

    def read() -> int:
        return sum(weights.base.read_weights for weights in overlay._weights.values())  # type: ignore[attr-defined]

    probe_of(overlay, is_paired=True)
    once = read()
    probe_of(overlay, is_paired=False)
    assert once > 0 and read() == 3 * once


def test_tokens_that_part_ways_are_measured_in_two_passes_from_then_on() -> None:
    overlay = overlay_of(tiny_model("mixtral"))
    wide = 0.3  # moves the router far enough
    together = probe_of(overlay, is_paired=True, eps=wide)
    assert not overlay.is_paired
    assert together == probe_of(overlay, is_paired=False, eps=wide)


def pair() -> Pair:
    return Pair(torch.arange(6.0).view(2, 3), -torch.arange(6.0).view(2, 3))


plain = torch.ones(2, 3)

SPLIT: dict[str, Callable[[Pair], object]] = {
    "item": lambda p: p[0, 1].item(),
    "condition": lambda p: bool(p[0, 1] > 0),
    "where": lambda p: torch.where(p > 3),
    "nonzero": lambda p: (p > 3).nonzero(),
    "numpy": lambda p: p.data_ptr(),
    "into a plain tensor": lambda p: plain.clone().copy_(p),
    "an entry of a plain tensor": lambda p: plain.clone().__setitem__(0, p[0]),
    "added to a plain tensor": lambda p: plain.clone().__iadd__(p),
    "out": lambda p: torch.add(p, 1, out=plain.clone()),
    "to a list": lambda p: p.tolist(),
    "shapes": lambda p: Pair(plain, plain[0]),
    "indices": lambda p: same(p),
}


@pytest.mark.parametrize("what", SPLIT)
def test_what_would_need_two_answers_or_mix_the_halves_is_refused(what: str) -> None:
    with pytest.raises(Diverged):
        SPLIT[what](pair())


USES: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + 2 * x,
    "product": lambda x: F.linear(x, plain),
    "list": lambda x: torch.cat([x, plain, x]),
    "chunks": lambda x: x.chunk(3, dim=1),
    "top": lambda x: torch.topk(x.abs(), 2).values,
    "in place": lambda x: x.clone().mul_(3).add_(x),
    "entry in place": lambda x: x.clone().__setitem__(0, x[1]),
    "augmented": lambda x: x.clone().__imul__(x),
    "rows": lambda x: [row + 1 for row in x],
    "metadata": lambda x: (x.shape, x.size(1), x.dim(), len(x), x.dtype, x.device, x.numel(), x.is_contiguous()),
    "equal answer": lambda x: bool((x == x).all()),
    "attention": lambda x: F.scaled_dot_product_attention(x.view(1, 1, 2, 3), x.view(1, 1, 2, 3), x.view(1, 1, 2, 3)),
    "made anew": lambda x: torch.zeros_like(x).index_add_(0, torch.tensor([1, 0]), x),
    "variance": lambda x: torch.var_mean(x, dim=0),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, plain),
}


def flat(value: Any, side: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [one for item in value for one in flat(item, side)]
    return [getattr(value, side) if isinstance(value, Pair) else value]


@pytest.mark.parametrize("use", USES)
def test_an_operation_gives_each_half_what_it_would_alone(use: str) -> None:
    with torch.inference_mode():
        found = USES[use](pair())
        for side in ("plus", "minus"):
            for one, wanted in zip(flat(found, side), flat(USES[use](getattr(pair(), side)), side), strict=True):
                assert torch.equal(one, wanted) if isinstance(wanted, Tensor) else one == wanted
