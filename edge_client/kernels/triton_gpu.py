"""The CUDA kernel: Hadamard weights in one pass, written in Triton (`shared.directions` is the definition).

Checked bit for bit under Triton's interpreter, and compiled for CUDA devices without one. NOT YET RUN ON HARDWARE: its
speed is unknown, and `choose` lets it prove itself against the torch kernel on the device first (`prove`). Other
directions go the way of the torch kernel.

A program computes one tile of a segment: a power of two of weights, at most K and aligned to its own size, so that a
tile lies within one block of K and one Philox call gives its rotation. Signs cost one call per 128 weights. Weights
pass as integers: Triton's own conversions to bfloat16 differ between its versions and devices, rounding in integers
does not. Philox is written out here, because a function of `triton.language` is compiled or interpreted as the
variable TRITON_INTERPRET said when triton was first imported, by whomever.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from edge_client.kernels import PADDING, Packed
from edge_client.kernels.torch_any import TorchKernel
from shared.directions import BUCKET_STREAM, SIGN_STREAM
from shared.packed import EIGHT_BIT_UNIT

_TILE = 4096  # weights of a program, at most
_GROUP = 128  # weights that share a Philox call
_PROOF_WEIGHTS = 10_000
_PROOF_LENGTH = 4_999  # of each segment
_PROOF_SEEDS = 256
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FLOAT32, _BFLOAT16 = tl.constexpr(0), tl.constexpr(1)
_PLAIN, _HALVES, _BYTES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_UNIT = tl.constexpr(float(EIGHT_BIT_UNIT))
_SIGNS, _BUCKETS = tl.constexpr(SIGN_STREAM), tl.constexpr(BUCKET_STREAM)


@triton.jit
def _multiplied(value, factor: tl.constexpr):
    """The upper and the lower half of a product of two 32-bit numbers."""
    product = value.to(tl.uint64) * tl.full((), factor, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(counter, tensor, stream: tl.constexpr, key_low, key_high):
    """The four words of W(counter, stream). counter: int64, a scalar or (n,)."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = c0 * 0 + tensor.to(tl.uint32)
    c3 = c0 * 0 + tl.full((), stream, tl.uint32)
    k0 = key_low.to(tl.uint32)
    k1 = key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _multiplied(c0, 0xD2511F53)
        high1, low1 = _multiplied(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _widened(stored, dtype: tl.constexpr):
    """Stored bits as float32 numbers."""
    if dtype == _FLOAT32:
        wide = stored.to(tl.float32, bitcast=True)
    elif dtype == _BFLOAT16:
        wide = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = stored.to(tl.float16, bitcast=True).to(tl.float32)
    return wide


@triton.jit
def _rounded(total, dtype: tl.constexpr):
    """Float32 numbers as bits of `dtype`; NaN becomes the canonical one."""
    if dtype == _FLOAT32:
        bits = tl.where(total != total, 0x7FC00000, total.to(tl.int32, bitcast=True))
    elif dtype == _BFLOAT16:
        wide = total.to(tl.int32, bitcast=True)
        rounded = (wide + (0x7FFF + ((wide >> 16) & 1))) >> 16  # wraps for NaN alone
        bits = tl.where(total != total, 0x7FC0, rounded).to(tl.int16)
    else:
        half = total.to(tl.float16).to(tl.int16, bitcast=True)
        bits = tl.where(total != total, 0x7E00, half.to(tl.int32)).to(tl.int16)
    return bits


@triton.jit
def _unpacked(codes, scales, table, index, mask, block: tl.constexpr, packing: tl.constexpr):
    """What the packed weights at these indices stand for, in float32, not yet rounded to the dtype."""
    scale = tl.load(scales + index // block, mask=mask, other=0.0)
    if packing == _HALVES:
        both = tl.load(codes + index // 2, mask=mask, other=0).to(tl.int32)
        value = tl.load(table + ((both >> ((index + 1) % 2 * 4).to(tl.int32)) & 15)) * scale
    else:
        value = (tl.load(codes + index, mask=mask, other=0).to(tl.float32) * scale) * _UNIT
    return value


@triton.jit(do_not_specialize=["tensor", "key_low", "key_high"])
def _hadamard(
    base, scales, table, starts, out, y, length, tiles, tensor, key_low, key_high,
    seeds: tl.constexpr, shift: tl.constexpr, groups: tl.constexpr, dtype: tl.constexpr, is_apart: tl.constexpr,
    block: tl.constexpr, packing: tl.constexpr,
):  # fmt: skip
    """One tile. base, out: bits; y: float32 bits (seeds,); a segment of `length` weights is cut into `tiles`.

    is_apart: base holds the segments alone, one after the other as `out` does. packing: how base is packed, in codes
    with scales for `block` weights each and, for halves, a table; otherwise these three are not looked at.
    Numbers of weights take 64 bits, places within the tile 32, which are faster.
    """
    tile: tl.constexpr = groups * 128
    number = tl.program_id(0)
    segment = number // tiles
    start = tl.load(starts + segment)
    first = (start // tile + number % tiles) * tile  # of the tensor's weights; int64
    rotation, _, _, _ = _philox(first >> shift, tensor, _BUCKETS, key_low, key_high)
    w0, w1, w2, w3 = _philox(first // 128 + tl.arange(0, groups), tensor, _SIGNS, key_low, key_high)
    lane = tl.arange(0, 128)[None, :]
    within = tl.arange(0, groups)[:, None] * 128 + lane
    early = tl.where(lane < 32, w0[:, None], w1[:, None])
    late = tl.where(lane < 96, w2[:, None], w3[:, None])
    sign = (tl.where(lane < 64, early, late) >> (lane & 31).to(tl.uint32)) << 31
    bucket = (rotation + first.to(tl.uint32) + within.to(tl.uint32)) & (seeds - 1)
    amount = (tl.load(y + bucket).to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    lead = start - first  # below 0 in all tiles of a segment but its first
    mask = (within >= tl.maximum(lead, 0).to(tl.int32)) & (within < tl.minimum(lead + length, tile).to(tl.int32))
    place = segment.to(tl.int64) * length - lead
    if packing == _PLAIN:
        stored = tl.load(base + (place if is_apart else first) + within, mask=mask, other=0)
    else:
        stored = _rounded(_unpacked(base, scales, table, first + within, mask, block, packing), dtype)
    tl.store(out + place + within, _rounded(_widened(stored, dtype) + amount, dtype), mask=mask)


class TritonKernel(TorchKernel):
    """`edge_client.kernels.Kernel` for tensors on a CUDA device; independent directions are the torch kernel's."""

    name = "triton"

    def add_hadamard(
        self, base: Tensor | Packed, starts: Tensor, out: Tensor, *, tensor: int, padded: Tensor, pool_key: int
    ) -> None:
        """See `edge_client.kernels.Kernel.add_hadamard`."""
        segments, length = out.shape
        if not out.numel():
            return
        seeds = padded.numel() - PADDING
        tile = min(_TILE, seeds, max(_GROUP, triton.next_power_of_2(length)))
        tiles = (length + tile - 2) // tile + 1  # a segment begins anywhere in its first tile
        bits = torch.int32 if out.element_size() == 4 else torch.int16
        settings = {"seeds": seeds, "shift": seeds.bit_length() - 1, "groups": tile // _GROUP}
        settings |= {"dtype": _DTYPES[out.dtype], "is_apart": False, "block": 1, "packing": _PLAIN.value}
        if isinstance(base, Packed):
            table = base.scales if base.table is None else base.table
            kept = base.codes, base.scales, table
            settings |= {"block": base.block, "packing": (_BYTES if base.table is None else _HALVES).value}
        else:
            kept = base.view(bits), padded, padded
            settings["is_apart"] = base.dim() == 2
        arguments = (*kept, starts, out.view(bits), padded.view(torch.int32), length, tiles)
        with torch.cuda.device_of(out):
            _hadamard[(segments * tiles,)](*arguments, tensor, _signed(pool_key), _signed(pool_key >> 32), **settings)


def _signed(number: int) -> int:
    """The same lowest 32 bits as a signed number: one type for every key, so that Triton compiles once."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def prove(device: torch.device) -> None:
    """Compare a few thousand weights of each dtype with the torch kernel's, on `device`.

    Raises RuntimeError where a bit differs, and whatever Triton raises where it cannot compile or run.
    """
    generator = torch.Generator().manual_seed(0)
    y = (1e-2 * torch.randn(_PROOF_SEEDS, generator=generator)).to(device)
    padded = torch.cat((y, y[:PADDING]))
    starts = torch.tensor([0, 77, _PROOF_WEIGHTS - _PROOF_LENGTH], device=device)
    weights = 10.0 ** torch.empty(_PROOF_WEIGHTS).uniform_(-45, 4, generator=generator)  # subnormal ones among them
    codes = torch.randint(0, 256, (_PROOF_WEIGHTS,), generator=generator, dtype=torch.uint8).to(device)
    scales = weights[: -(-_PROOF_WEIGHTS // 64)].to(device)
    packings = (
        Packed(codes[: (_PROOF_WEIGHTS + 1) // 2], scales, 64, y[:16].contiguous()),
        Packed(codes.view(torch.int8), scales, 701, None),
    )
    for dtype in _DTYPES:
        for base in (weights.to(dtype).to(device), *packings):
            outs = []
            for kernel in (TorchKernel(), TritonKernel()):
                outs.append(torch.empty(len(starts), _PROOF_LENGTH, dtype=dtype, device=device))
                kernel.add_hadamard(base, starts, outs[-1], tensor=3, padded=padded, pool_key=0xFEDC_BA98_7654_3210)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            if not torch.equal(outs[0].view(bits), outs[1].view(bits)):
                what = "packed weights" if isinstance(base, Packed) else "weights"
                raise RuntimeError(f"its {what} in {dtype} differ from those of the torch kernel")
