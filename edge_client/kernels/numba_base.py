"""Base weights for the numba kernels: how one run of them is read, whether they lie in an array or are packed.

A packed base is a tuple: codes (uint8 with two weights per byte, or int8), scales float32, the number of weights that
share a scale, and the table float32 (16,) of 4-bit codes (empty for int8). `shared.packed` is the definition. A 4-bit
block has 16 different weights at most: they are computed once, rounded, and looked up.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, call-overload, operator, attr-defined"
from __future__ import annotations

import numpy as np
from numba import njit, types, uint8, uint64
from numba.extending import overload

from edge_client.kernels.numba_bits import rounded, widened
from shared.packed import EIGHT_BIT_UNIT

_GROUP = 128
ROOM = _GROUP + 16


def add(base, at, amounts, skip, out, to, count, room):
    """out[to + i] = base[at + i] + amounts[skip + i], rounded, for i < count; numba picks by the base's type.

    room: float32 (`ROOM`,) to work in; making it anew for every 128 weights would cost more than the work.
    """


def copy(base, at, out, to, count):
    """out[to + i] = base[at + i] for i < count."""


@njit(nogil=True)
def _add_stored(base, at, amounts, skip, out, to, count, room):
    at, skip, to = uint64(at), uint64(skip), uint64(to)
    for i in range(uint64(count)):
        out[to + i] = rounded(widened(base[at + i]) + amounts[skip + i], out[to + i])


@njit(nogil=True)
def _add_packed(base, at, amounts, skip, out, to, count, room):
    """In pieces that share a scale; none of them is longer than 128."""
    codes, scales, block, table = base
    values, levels = room[:_GROUP], room[_GROUP:]
    stop = at + count
    while at < stop:
        number = at // block
        piece = min(stop, (number + 1) * block, at + _GROUP) - at
        _unpack(codes, table, scales[number], at, piece, levels, values, out[to])
        _add_stored(values, 0, amounts, skip, out, to, piece, room)
        at, skip, to = at + piece, skip + piece, to + piece


@njit(nogil=True)
def _copy_packed(base, at, out, to, count):
    nothing = np.full(_GROUP, -0.0, np.float32)  # what leaves a sum its sign where the base is -0.0
    room = np.empty(ROOM, np.float32)
    for done in range(0, count, _GROUP):
        _add_packed(base, at + done, nothing, 0, out, to + done, min(_GROUP, count - done), room)


def _unpack(codes, table, scale, at, count, levels, values, stored):
    """values[i] = the base weight at + i as float32, rounded as `stored` is, for i < count. levels: memory for 16."""


@njit(nogil=True)
def _unpack_halves(codes, table, scale, at, count, levels, values, stored):
    for code in range(16):
        levels[code] = widened(rounded(table[code] * scale, stored))
    first, count = uint64(at & 1), uint64(count)
    if first:
        values[0] = levels[codes[at >> 1] & uint8(15)]
    byte = uint64(at + 1) >> uint64(1)
    for pair in range((count - first) >> uint64(1)):
        both = codes[byte + pair]
        values[first + uint64(2) * pair] = levels[both >> uint8(4)]
        values[first + uint64(2) * pair + uint64(1)] = levels[both & uint8(15)]
    if (count - first) & uint64(1):
        values[count - uint64(1)] = levels[codes[uint64(at) + count - uint64(1) >> uint64(1)] >> uint8(4)]


@njit(nogil=True)
def _unpack_bytes(codes, table, scale, at, count, levels, values, stored):
    at = uint64(at)
    for i in range(uint64(count)):
        product = np.float32(codes[at + i]) * scale
        values[i] = widened(rounded(product * EIGHT_BIT_UNIT, stored))


@overload(_unpack)
def _overload_unpack(codes, table, scale, at, count, levels, values, stored):
    chosen = _unpack_bytes if codes.dtype.signed else _unpack_halves
    return lambda codes, table, scale, at, count, levels, values, stored: chosen(
        codes, table, scale, at, count, levels, values, stored
    )


@overload(add)
def _overload_add(base, at, amounts, skip, out, to, count, room):
    chosen = _add_packed if isinstance(base, types.BaseTuple) else _add_stored
    return lambda base, at, amounts, skip, out, to, count, room: chosen(base, at, amounts, skip, out, to, count, room)


@overload(copy)
def _overload_copy(base, at, out, to, count):
    if isinstance(base, types.BaseTuple):
        return lambda base, at, out, to, count: _copy_packed(base, at, out, to, count)
    return None  # nobody copies an array this way
