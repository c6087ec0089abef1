"""The CPU kernel: numba loops over groups of 128 weights, one Philox call each (`shared.directions` is the definition).

Speed rests on choices that were measured: Philox runs over many counters in one loop, so that it vectorises; a group's
signs, its window of y and its base meet in registers; they are added at once, so that reading memory and computing
overlap; indices are unsigned, because numba tests others for wrap-around. No fast-math: every operation rounds once,
none is fused.

Words of Philox are (4, n) so that each of the four is contiguous. uint32() around each integer operation keeps numba
from widening it to 64 bits.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, call-overload, operator, attr-defined"
# mypy: warn-unreachable=False
from __future__ import annotations

import numpy as np
import torch
from numba import config as numba_config
from numba import get_num_threads, njit, prange, set_num_threads, uint32, uint64
from torch import Tensor

from edge_client.kernels import Packed, SumKind, Terms
from edge_client.kernels.numba_base import LEVELS, ask_ahead, kept
from edge_client.kernels.numba_bits import _float, rounded, widened
from shared.directions import BUCKET_STREAM, GAUSSIAN_STREAM, RADEMACHER_STREAM, SIGN_STREAM, normal_quantiles

_CHUNK = 4096  # weights per batch of Philox calls
_GROUPS = _CHUNK // 128 + 1
_UNIT = 16384  # weights per unit of work for a thread
_SERIAL = 1 << 20  # weights below which waking threads costs more than it saves (docs/benchmarks.md)


@njit(nogil=True)
def _philox(first, calls, tensor, stream, key, out):
    """out[:, :calls] = words of the counters from `first` on."""
    word0, word1, word2, word3 = out[0], out[1], out[2], out[3]
    for call in range(calls):
        counter = uint64(first + call)
        c0, c1 = uint32(counter), uint32(counter >> uint64(32))
        c2, c3 = uint32(tensor), uint32(stream)
        k0, k1 = uint32(key), uint32(key >> uint64(32))
        for _ in range(10):
            p0 = uint64(c0) * uint64(0xD2511F53)
            p1 = uint64(c2) * uint64(0xCD9E8D57)
            c0 = uint32(uint32(p1 >> uint64(32)) ^ c1 ^ k0)
            c2 = uint32(uint32(p0 >> uint64(32)) ^ c3 ^ k1)
            c1, c3 = uint32(p1), uint32(p0)
            k0, k1 = uint32(k0 + uint32(0x9E3779B9)), uint32(k1 + uint32(0xBB67AE85))
        word0[call], word1[call], word2[call], word3[call] = c0, c1, c2, c3


@njit(nogil=True)
def _flip(buffer, bits, begin, words, group):
    """buffer[i] = the float with these bits[begin + i], its sign changed where the group's bit i is 1; 128 of them."""
    w0, w1, w2, w3 = words[0, group], words[1, group], words[2, group], words[3, group]
    at = uint64(begin)
    top = uint32(0x80000000)
    for j in range(uint64(32)):  # four words side by side: numba vectorises this, and not one word after another
        shift = uint32(uint32(31) - uint32(j))
        buffer[j] = bits[at + j] ^ uint32(uint32(w0 << shift) & top)
        buffer[uint64(32) + j] = bits[at + uint64(32) + j] ^ uint32(uint32(w1 << shift) & top)
        buffer[uint64(64) + j] = bits[at + uint64(64) + j] ^ uint32(uint32(w2 << shift) & top)
        buffer[uint64(96) + j] = bits[at + uint64(96) + j] ^ uint32(uint32(w3 << shift) & top)


@njit(nogil=True)
def _add_group(base, at, bits, begin, words, group, out, to):
    """128 weights: out[to + i] = base[at + i] + the float with these bits[begin + i] and the group's sign i.

    Four words side by side, because numba vectorises this and not one word after another; no memory in between.
    """
    w0, w1, w2, w3 = words[0, group], words[1, group], words[2, group], words[3, group]
    at, begin, to, top = uint64(at), uint64(begin), uint64(to), uint32(0x80000000)
    n1, n2, n3 = uint64(32), uint64(64), uint64(96)
    for j in range(uint64(32)):
        shift = uint32(uint32(31) - uint32(j))
        y0 = _float(bits[begin + j] ^ uint32(uint32(w0 << shift) & top))
        y1 = _float(bits[begin + n1 + j] ^ uint32(uint32(w1 << shift) & top))
        y2 = _float(bits[begin + n2 + j] ^ uint32(uint32(w2 << shift) & top))
        y3 = _float(bits[begin + n3 + j] ^ uint32(uint32(w3 << shift) & top))
        out[to + j] = rounded(widened(base[at + j]) + y0, out)
        out[to + n1 + j] = rounded(widened(base[at + n1 + j]) + y1, out)
        out[to + n2 + j] = rounded(widened(base[at + n2 + j]) + y2, out)
        out[to + n3 + j] = rounded(widened(base[at + n3 + j]) + y3, out)


@njit(nogil=True)
def _add(base, at, amounts, skip, out, to, count):
    """out[to + i] = base[at + i] + amounts[skip + i], rounded, for i < count."""
    at, skip, to = uint64(at), uint64(skip), uint64(to)
    for i in range(uint64(count)):
        out[to + i] = rounded(widened(base[at + i]) + amounts[skip + i], out)


@njit(nogil=True)
def _hadamard_span(base, lead, start, stop, out, to, bits, shift, tensor, key, memory):
    """Weights start..stop, at most `_CHUNK`; theirs is base[start + lead] on."""
    words, rotations, buffer, room = memory
    amounts = buffer.view(np.float32)
    array, shifted = kept(base, start + lead, stop - start, out, room)
    shifted -= start
    first, block = start >> 7, start >> shift
    groups = ((stop + 127) >> 7) - first
    _philox(first, groups, tensor, SIGN_STREAM, key, words)
    _philox(block, ((stop - 1) >> shift) - block + 1, tensor, BUCKET_STREAM, key, rotations)
    for group in range(groups):
        element = (first + group) << 7  # may lie before `start`, never in an earlier block than its group
        window = (rotations[0, (element >> shift) - block] + element) & ((1 << shift) - 1)
        lower, upper = max(start, element), min(stop, element + 128)
        ask_ahead(base, lower + shifted, out, to + lower - start)  # type: ignore[call-arg]
        if upper - lower == 128:
            _add_group(array, lower + shifted, bits, window, words, group, out, to + lower - start)
        else:
            _flip(buffer, bits, window, words, group)
            _add(array, lower + shifted, amounts, lower & 127, out, to + lower - start, upper - lower)


@njit(nogil=True, cache=True)
def _hadamard_units(base, is_apart, starts, length, out, bits, shift, tensor, key, unit, end):
    """Units unit..end of work; a segment of `length` weights is cut into units of `_UNIT`.

    base: an array, or what `numba_base` knows as a packed one. is_apart: it holds the segments alone, one after the
    other as `out` does.
    """
    words, rotations = np.empty((4, _GROUPS), np.uint32), np.empty((4, _CHUNK // 256 + 2), np.uint32)
    memory = words, rotations, np.empty(128, np.uint32), np.empty(LEVELS + _CHUNK, np.float32)
    pieces = (length + _UNIT - 1) // _UNIT
    for number in range(unit, end):
        segment, piece = number // pieces, number % pieces
        begin = starts[segment]
        lead = segment * length - begin if is_apart else 0
        stop = begin + min(length, (piece + 1) * _UNIT)
        for offset in range(piece * _UNIT, min(length, (piece + 1) * _UNIT), _CHUNK):
            start, to = begin + offset, segment * length + offset
            _hadamard_span(base, lead, start, min(stop, start + _CHUNK), out, to, bits, shift, tensor, key, memory)


@njit(nogil=True, cache=True, parallel=True)
def _hadamard_parallel(base, is_apart, starts, length, out, bits, shift, tensor, key, units, tasks):
    for task in prange(tasks):
        first, end = units * task // tasks, units * (task + 1) // tasks
        _hadamard_units(base, is_apart, starts, length, out, bits, shift, tensor, key, first, end)


@njit(nogil=True)
def _accumulate(sums, to, start, stop, is_gaussian, tensor, key, seeds, amounts, table, words):
    """sums[to + i] += amount * z[start + i] for every term in order; start..stop spans at most `_CHUNK` weights."""
    buffer = np.empty(128, np.uint32)
    products = buffer.view(np.float32)
    repeated = np.empty(128, np.float32)
    for term in range(seeds.size):
        amount = amounts[term]
        if is_gaussian:
            first = start >> 3
            _philox(first, ((stop + 7) >> 3) - first, tensor, GAUSSIAN_STREAM + seeds[term], key, words)
            for i in range(start, stop):
                word = words[(i >> 1) & 3, (i >> 3) - first]
                half = uint32(word >> uint32(16 * (i & 1))) & uint32(0xFFFF)
                sums[to + i - start] += amount * table[half]
            continue
        first = start >> 7
        groups = ((stop + 127) >> 7) - first
        _philox(first, groups, tensor, RADEMACHER_STREAM + seeds[term], key, words)
        repeated[:] = amount  # times +1 or -1 is exact: only the sign changes
        for group in range(groups):
            _flip(buffer, repeated.view(np.uint32), 0, words, group)
            lower = max(start, (first + group) << 7)
            upper = min(stop, (first + group + 1) << 7)
            at, skip = uint64(to + lower - start), uint64(lower & 127)
            for i in range(uint64(upper - lower)):
                sums[at + i] += products[skip + i]


@njit(nogil=True, cache=True, parallel=True)
def _accumulate_all(sums, is_gaussian, tensor, key, seeds, amounts, table):
    # Chunks outside, terms inside: a chunk stays in the cache while every seed is added to it.
    for chunk in prange((sums.size + _CHUNK - 1) // _CHUNK):
        words = np.empty((4, _CHUNK // 8 + 2), np.uint32)
        start = chunk * _CHUNK
        stop = min(sums.size, start + _CHUNK)
        _accumulate(sums, start, start, stop, is_gaussian, tensor, key, seeds, amounts, table, words)


@njit(nogil=True, cache=True, parallel=True)
def _sums_parallel(base, is_apart, starts, length, out, sums, is_gaussian, tensor, key, seeds, amounts, table):
    pieces = (length + _CHUNK - 1) // _CHUNK
    for number in prange(starts.size * pieces):
        words = np.empty((4, _CHUNK // 8 + 2), np.uint32)
        total = np.empty(_CHUNK, np.float32)
        segment, offset = number // pieces, number % pieces * _CHUNK
        count = min(_CHUNK, length - offset)
        start = starts[segment] + offset
        total[:count] = sums[start : start + count]
        _accumulate(total, 0, start, start + count, is_gaussian, tensor, key, seeds, amounts, table, words)
        at = segment * length + offset if is_apart else start
        _add(base, at, total, 0, out, segment * length + offset, count)


@njit(nogil=True, cache=True, parallel=True)
def _unpack_parallel(base, starts, length, out):
    pieces = (length + _CHUNK - 1) // _CHUNK
    for number in prange(starts.size * pieces):
        segment, offset = number // pieces, number % pieces * _CHUNK
        room = np.empty(LEVELS + _CHUNK, np.float32)
        count = min(length - offset, _CHUNK)
        array, at = kept(base, starts[segment] + offset, count, out, room)
        for i in range(count):
            out[segment * length + offset + i] = rounded(widened(array[at + i]), out)


def _stored(weights: Tensor) -> np.ndarray:
    """A flat view of a contiguous tensor's memory in the type that tells the loops its dtype."""
    if weights.dtype == torch.float32:
        return weights.view(-1).numpy()
    flat = weights.view(-1).view(torch.int16).numpy()
    return flat if weights.dtype == torch.float16 else flat.view(np.uint16)


def _kept(base: Tensor | Packed) -> object:
    """What the loops take for a base."""
    if isinstance(base, Packed):
        table = np.empty(0, np.float32) if base.table is None else base.table.numpy()
        return base.codes.numpy(), base.scales.numpy(), base.block, table
    return _stored(base)


def _match_threads() -> int:
    """As many threads as torch uses, so that one setting governs both."""
    wanted = torch.get_num_threads()
    threads = min(wanted, int(numba_config.NUMBA_NUM_THREADS))
    if get_num_threads() != threads:
        set_num_threads(threads)
    if torch.get_num_threads() != wanted:
        # Where both load the same OpenMP, numba's start has set torch to all cores (numba 0.68, torch 2.13, Linux).
        torch.set_num_threads(wanted)
    return threads


class NumbaKernel:
    """`edge_client.kernels.Kernel` for tensors in the CPU's memory."""

    name = "numba"

    def add_hadamard(
        self, base: Tensor | Packed, starts: Tensor, out: Tensor, *, tensor: int, padded: Tensor, pool_key: int
    ) -> None:
        """See `edge_client.kernels.Kernel.add_hadamard`."""
        segments, length = out.shape
        units = segments * -(-length // _UNIT)
        threads = 1 if out.numel() < _SERIAL else _match_threads()
        bits = padded.numpy().view(np.uint32)
        shift = (bits.size - 128).bit_length() - 1
        key = np.uint64(pool_key)
        is_apart = not isinstance(base, Packed) and base.dim() == 2
        work = (_kept(base), is_apart, starts.numpy(), length, _stored(out), bits, shift, tensor, key)
        if threads == 1:
            _hadamard_units(*work, 0, units)
        else:  # four tasks per thread: a thread that another program holds up does not hold up the rest
            _hadamard_parallel(*work, units, threads * 4)

    def unpack(self, base: Packed, starts: Tensor, out: Tensor) -> None:
        """See `edge_client.kernels.Kernel.unpack`."""
        _match_threads()
        _unpack_parallel(_kept(base), starts.numpy(), out.shape[1], _stored(out))

    def add_sums(
        self, base: Tensor, starts: Tensor, out: Tensor, *, tensor: int, sums: Tensor, kind: SumKind, pool_key: int,
        probe: Terms | None,
    ) -> None:  # fmt: skip
        """See `edge_client.kernels.Kernel.add_sums`."""
        _match_threads()
        seeds, amounts = _arrays(probe)
        _sums_parallel(
            _stored(base), base.dim() == 2, starts.numpy(), out.shape[1], _stored(out), sums.numpy(),
            kind == "gaussian", tensor, np.uint64(pool_key), seeds, amounts, normal_quantiles(),
        )  # fmt: skip

    def accumulate(self, sums: Tensor, *, tensor: int, kind: SumKind, pool_key: int, terms: Terms) -> None:
        """See `edge_client.kernels.Kernel.accumulate`."""
        _match_threads()
        seeds, amounts = _arrays(terms)
        _accumulate_all(
            sums.numpy(), kind == "gaussian", tensor, np.uint64(pool_key), seeds, amounts, normal_quantiles()
        )


def _arrays(terms: Terms | None) -> tuple[np.ndarray, np.ndarray]:
    return (terms.seeds.numpy(), terms.amounts.numpy()) if terms else (np.empty(0, np.int64), np.empty(0, np.float32))
