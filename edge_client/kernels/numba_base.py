"""Base weights for the numba kernels: how a run of them is read, whether they lie in an array or are packed.

A packed base is a tuple: codes (uint8 with two weights per byte, or int8), scales float32, the number of weights that
share a scale, and the table float32 (16,) of 4-bit codes (empty for int8). `shared.packed` is the definition. A 4-bit
block has 16 different weights at most: they are computed once, rounded, and looked up. A loop of
64 turns, known when numba compiles, is faster than others.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, call-overload, operator, attr-defined"
from __future__ import annotations

import numpy as np
from numba import types, uint8, uint64
from numba.extending import overload

from edge_client.kernels.numba_bits import rounded, widened
from shared.packed import EIGHT_BIT_UNIT

LEVELS = 16  # different weights of a 4-bit block


def kept(base, at, count, out, room):
    """(array, offset): where the `count` base weights from `at` on are read; numba picks by the base's type.

    Those of a packed base are written to room, float32 (`LEVELS` + count,), rounded as out's are. Call it for some
    thousand weights at once: numba counts references to every array that it is given or gives.
    """


def _kept_in_array(base, at, count, out, room):
    return base, at


def _kept_packed(base, at, count, out, room):
    codes, scales, block, table = base
    _unpack(codes, scales, uint64(block), table, uint64(at), uint64(count), out, room[:LEVELS], room[LEVELS:])
    return room, LEVELS


@overload(kept)
def _overload_kept(base, at, count, out, room):
    return _kept_packed if isinstance(base, types.BaseTuple) else _kept_in_array


def _unpack(codes, scales, block, table, at, count, out, levels, values):
    """values[i] = the base weight at + i as float32, rounded as out's are, for i < count."""


@overload(_unpack)
def _overload_unpack(codes, scales, block, table, at, count, out, levels, values):
    return _unpack_bytes if codes.dtype.signed else _unpack_halves


def _unpack_halves(codes, scales, block, table, at, count, out, levels, values):
    done = uint64(0)
    while done < count:
        start = at + done
        piece = min(count - done, block - start % block)  # of one scale
        for code in range(uint64(LEVELS)):
            levels[code] = widened(rounded(table[code] * scales[start // block], out))
        if (start | piece) & uint64(63):
            for i in range(done, done + piece):
                both = codes[(at + i) >> uint64(1)]
                values[i] = levels[both & uint8(15) if (at + i) & uint64(1) else both >> uint8(4)]
            done += piece
            continue
        for _ in range(piece >> uint64(6)):
            byte = (at + done) >> uint64(1)
            for pair in range(uint64(32)):
                both = codes[byte + pair]
                values[done + uint64(2) * pair] = levels[both >> uint8(4)]
                values[done + uint64(2) * pair + uint64(1)] = levels[both & uint8(15)]
            done += uint64(64)


def _unpack_bytes(codes, scales, block, table, at, count, out, levels, values):
    done = uint64(0)
    while done < count:
        start = at + done
        piece = min(count - done, block - start % block)
        scale = scales[start // block]
        for i in range(done, done + piece):
            product = np.float32(codes[at + i]) * scale
            values[i] = widened(rounded(product * EIGHT_BIT_UNIT, out))
        done += piece
