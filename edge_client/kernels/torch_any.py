"""The plain torch kernel: right on every device torch has, and the slow reference of the fast ones on a device.

Philox runs in int64: a product of two 32-bit numbers may wrap into the sign, but the bits are those of the unsigned
product, and masks take what is wanted. Memory is bounded by working on `_CHUNK` weights at a time. Multiplication and
addition are separate operations, so each rounds; bfloat16 is rounded in integers, because some hardware's own
conversion flushes subnormal numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from edge_client.kernels import PADDING, Packed, SumKind, Terms
from shared.directions import BUCKET_STREAM, GAUSSIAN_STREAM, RADEMACHER_STREAM, SIGN_STREAM, normal_quantiles
from shared.packed import EIGHT_BIT_UNIT

_CHUNK = 1 << 18
_LOW = 0xFFFFFFFF


def _words(counters: Tensor, tensor: int, stream: int, key: int) -> Tensor:
    """W(counter, stream): int64 (..., 4) in [0, 2^32). counters: int64 (...)."""
    c0, c1 = counters & _LOW, (counters >> 32) & _LOW
    c2, c3 = torch.full_like(counters, tensor), torch.full_like(counters, stream)
    k0, k1 = key & _LOW, key >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, ((p0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _counters(starts: Tensor, length: int, per_call: int) -> Tensor:
    """The counters that rows of `length` elements from `starts` (S,) need, `per_call` elements each: int64 (S, C)."""
    calls = (length + per_call - 2) // per_call + 1
    return (starts // per_call)[:, None] + torch.arange(calls, device=starts.device)


def _cut(values: Tensor, starts: Tensor, length: int, per_call: int) -> Tensor:
    """Of values (S, C * per_call), which begin at whole calls, the rows of `length` elements from `starts` on."""
    lead = starts % per_call
    if len(starts) == 1 and starts.is_cpu:
        return values[:, int(lead) : int(lead) + length]
    return values.gather(1, lead[:, None] + torch.arange(length, device=starts.device))


def _sign_bits(counters: Tensor, tensor: int, stream: int, key: int) -> Tensor:
    """The signs of the calls' 128 elements as bit 31, 1 for -1: int32 (S, C, 128)."""
    words = _words(counters, tensor, stream, key)
    signed = (words - ((words >> 31) << 32)).to(torch.int32)  # the same 32 bits
    shifted = signed[..., None] << torch.arange(31, -1, -1, dtype=torch.int32, device=words.device)
    return (shifted & -(1 << 31)).flatten(-2)


def _flipped(values: Tensor, sign_bits: Tensor) -> Tensor:
    return (values.view(torch.int32) ^ sign_bits).view(torch.float32).flatten(1)


def _hadamard(starts: Tensor, length: int, tensor: int, padded: Tensor, key: int) -> Tensor:
    """s * y[b] of rows of elements: float32 (S, length)."""
    seeds = padded.numel() - PADDING
    calls = _counters(starts, length, 128)
    rotations = _words(_counters(starts, length, seeds), tensor, BUCKET_STREAM, key)[..., 0]
    block = calls * 128 // seeds - (starts // seeds)[:, None]
    begin = (rotations.gather(1, block) + calls * 128) & (seeds - 1)
    windows = padded.unfold(0, 128, 1)[begin]
    return _cut(_flipped(windows, _sign_bits(calls, tensor, SIGN_STREAM, key)), starts, length, 128)


def _signs(starts: Tensor, length: int, tensor: int, stream: int, key: int) -> Tensor:
    """s of rows of elements: float32 (S, length) of +1 and -1."""
    bits = _sign_bits(_counters(starts, length, 128), tensor, stream, key)
    return _cut(_flipped(torch.ones(bits.shape, device=bits.device), bits), starts, length, 128)


def _normals(starts: Tensor, length: int, tensor: int, stream: int, key: int) -> Tensor:
    """Gaussian z of rows of elements: float32 (S, length)."""
    words = _words(_counters(starts, length, 8), tensor, stream, key)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)
    return _table(str(starts.device))[_cut(halves, starts, length, 8)]


@lru_cache(maxsize=4)
def _table(device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(normal_quantiles().copy()).to(device)


def _rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values in `dtype`, rounded to nearest even; NaN becomes the canonical one."""
    total = torch.where(total.isnan(), torch.full_like(total, torch.nan), total)
    if dtype != torch.bfloat16:
        return total.to(dtype)
    bits = total.view(torch.int32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # wraps for NaN alone
    return torch.where(total.isnan(), 0x7FC0, rounded).to(torch.int16).view(torch.bfloat16)


def _pieces(starts: Tensor, length: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows and columns of an (S, length) output that hold at most `_CHUNK` elements, and the starts of their part."""
    rows = max(1, _CHUNK // length)
    for top in range(0, len(starts), rows):
        for left in range(0, length, _CHUNK):
            part = slice(top, min(len(starts), top + rows))
            yield part, slice(left, min(length, left + _CHUNK)), starts[part] + left


class TorchKernel:
    """`edge_client.kernels.Kernel` for tensors on any device."""

    name = "torch"

    def add_hadamard(
        self, base: Tensor | Packed, starts: Tensor, out: Tensor, *, tensor: int, padded: Tensor, pool_key: int
    ) -> None:
        """See `edge_client.kernels.Kernel.add_hadamard`."""
        for rows, columns, begins in _pieces(starts, out.shape[1]):
            length = columns.stop - columns.start
            amounts = _hadamard(begins, length, tensor, padded, pool_key)
            if isinstance(base, Packed):
                weights = _unpacked(base, begins, length, out.dtype)
            else:
                weights = _part(base, rows, columns, begins)
            _store(weights, amounts, out[rows, columns])

    def unpack(self, base: Packed, starts: Tensor, out: Tensor) -> None:
        """See `edge_client.kernels.Kernel.unpack`."""
        for rows, columns, begins in _pieces(starts, out.shape[1]):
            out[rows, columns] = _unpacked(base, begins, columns.stop - columns.start, out.dtype)

    def add_sums(
        self, base: Tensor, starts: Tensor, out: Tensor, *, tensor: int, sums: Tensor, kind: SumKind, pool_key: int,
        probe: Terms | None,
    ) -> None:  # fmt: skip
        """See `edge_client.kernels.Kernel.add_sums`."""
        for rows, columns, begins in _pieces(starts, out.shape[1]):
            length = columns.stop - columns.start
            amounts = _segments(sums, begins, length)
            if probe is not None:
                amounts = _plus_terms(amounts, begins, tensor, kind, pool_key, probe)
            _store(_part(base, rows, columns, begins), amounts, out[rows, columns])

    def accumulate(self, sums: Tensor, *, tensor: int, kind: SumKind, pool_key: int, terms: Terms) -> None:
        """See `edge_client.kernels.Kernel.accumulate`."""
        for start in range(0, sums.numel(), _CHUNK):
            part = sums[start : start + _CHUNK]
            begin = torch.tensor([start], device=sums.device)
            part.copy_(_plus_terms(part[None], begin, tensor, kind, pool_key, terms)[0])


def _plus_terms(amounts: Tensor, starts: Tensor, tensor: int, kind: SumKind, key: int, terms: Terms) -> Tensor:
    """amounts + amount * z for every term in order, each product and each sum rounded. amounts: float32 (S, L)."""
    length = amounts.shape[1]
    for seed, amount in zip(terms.seeds.tolist(), terms.amounts.to(amounts.device), strict=True):
        if kind == "gaussian":
            z = _normals(starts, length, tensor, GAUSSIAN_STREAM + seed, key)
        else:
            z = _signs(starts, length, tensor, RADEMACHER_STREAM + seed, key)
        product = torch.mul(z, amount)
        amounts = torch.add(amounts, product)
    return amounts


def _segments(flat: Tensor, starts: Tensor, length: int) -> Tensor:
    """Rows of `length` elements of a flat tensor, (S, length)."""
    if len(starts) == 1 and starts.is_cpu:
        return flat[int(starts) : int(starts) + length][None]
    return flat[starts[:, None] + torch.arange(length, device=starts.device)]


def _unpacked(base: Packed, starts: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The base weights of rows of `length` elements from `starts` on, rounded: (S, length) of `dtype`."""
    index = starts[:, None] + torch.arange(length, device=starts.device)
    scales = base.scales[index // base.block]
    if base.table is None:
        product = torch.mul(base.codes[index].to(torch.float32), scales)
        return _rounded(torch.mul(product, float(EIGHT_BIT_UNIT)), dtype)
    both = base.codes[index >> 1]
    codes = torch.where(index % 2 == 1, both & 15, both >> 4)
    return _rounded(base.table[codes.to(torch.int64)] * scales, dtype)


def _part(base: Tensor, rows: slice, columns: slice, starts: Tensor) -> Tensor:
    """The base weights of a piece of the output."""
    return base[rows, columns] if base.dim() == 2 else _segments(base, starts, columns.stop - columns.start)


def _store(base: Tensor, amounts: Tensor, out: Tensor) -> None:
    out.copy_(_rounded(base.to(torch.float32) + amounts, out.dtype))
