"""Base weights for the numba kernels: how a run of them is read, whether they lie in an array or are packed.

A packed base is a tuple: codes (uint8 with two weights per byte, or int8), scales float32, the number of weights that
share a scale, and the table float32 (16,) of 4-bit codes (empty for int8). `shared.packed` is the definition. A 4-bit
block has 16 different weights at most: they are computed once, rounded, and looked up. A loop of
64 turns, known when numba compiles, is faster than others.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, call-overload, operator, attr-defined"
from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types, uint8, uint64
from numba.extending import intrinsic, overload

from edge_client.kernels.numba_bits import rounded, widened
from shared.packed import EIGHT_BIT_UNIT

LEVELS = 16  # different weights of a 4-bit block
GROUP = 128  # weights that share a Philox call
_READ_AHEAD, _WRITE_AHEAD = 1 << 14, 1 << 12  # bytes: what a processor asks for by itself comes too late
_LINE = 64  # bytes


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


@intrinsic
def ask_ahead(typing, base, at, out, to):
    """Ask for the cache lines of a group that is due soon; at and to are the present one's places in base and out.

    Nothing is read or written by it, so places beyond the end do no harm. Of a packed base only `out` is asked for.
    """

    def code(context, builder, signature, arguments):
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        for which, ahead, is_write in ((0, _READ_AHEAD, 0), (2, _WRITE_AHEAD, 1)):
            array = signature.args[which]
            if isinstance(array, types.BaseTuple):
                continue
            data = context.make_array(array)(context, builder, arguments[which]).data
            first = builder.bitcast(builder.gep(data, [arguments[which + 1]]), byte)
            for line in range(ahead, ahead + GROUP * array.dtype.bitwidth // 8, _LINE):
                builder.call(ask, [builder.gep(first, [number(line)]), number(is_write), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(base, at, out, to), code
