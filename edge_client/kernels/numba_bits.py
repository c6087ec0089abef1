"""Floating point numbers as bits, for the numba kernels: what a dtype's storage holds, and one rounding into it.

Arrays tell the weight's dtype to numba: uint16 holds bfloat16 bits, int16 holds float16 bits, float32 is itself.
uint32() around each integer operation keeps numba from widening it to 64 bits.

Every numba module of this folder imports this one first, so the folder of their machine code is chosen here.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, call-overload, operator, attr-defined"
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numba import config, njit, uint16, uint32
from numba.extending import overload


def cache_folder(kernels: Path) -> str:
    """Where numba keeps machine code of the sources in the folder `kernels`: another folder for each state of them.

    numba itself looks at the file alone that holds a cached function (0.68: its content, before: its date). After an
    update that changes what such a function calls in another file it would go on with the old code and its bits.
    """
    sources = b"".join(source.read_bytes() for source in sorted(kernels.glob("*numba*.py")))
    return str(kernels / "__pycache__" / f"numba-{hashlib.sha256(sources).hexdigest()[:16]}")


if not config.CACHE_DIR:  # NUMBA_CACHE_DIR is its user's matter
    config.CACHE_DIR = cache_folder(Path(__file__).parent)

_HALF_SMALLEST_NORMAL = 0x38800000  # 2**-14 as float32
_HALF_OVERFLOW = 0x477FF000  # 65520: rounds to infinity in float16


@njit(nogil=True)
def _bits(value):
    return np.float32(value).view(np.uint32)


@njit(nogil=True)
def _float(bits):
    return np.uint32(bits).view(np.float32)


@njit(nogil=True)
def _from_half(bits):
    magnitude = uint32(bits & uint32(0x7FFF))
    exponent = uint32(magnitude << uint32(13)) + uint32(0x38000000)
    if magnitude >= uint32(0x7C00):  # infinity and NaN
        exponent = uint32(exponent + uint32(0x38000000))
    subnormal = np.float32(np.int32(magnitude)) * np.float32(2.0**-24)
    value = subnormal if magnitude < uint32(0x400) else _float(exponent)
    return _float(uint32(_bits(value) | uint32(uint32(bits & uint32(0x8000)) << uint32(16))))


@njit(nogil=True)
def _to_half(value):
    bits = _bits(value)
    sign = uint32(uint32(bits >> uint32(16)) & uint32(0x8000))
    magnitude = uint32(bits & uint32(0x7FFFFFFF))
    is_odd = uint32(uint32(magnitude >> uint32(13)) & uint32(1))
    half = uint32(uint32(magnitude + uint32(0xFFF) + is_odd - uint32(0x38000000)) >> uint32(13))
    # 0.5 has the unit in the last place of a subnormal half: the sum rounds where the half would.
    subnormal = uint32(_bits(_float(magnitude) + np.float32(0.5)) - uint32(0x3F000000))
    half = subnormal if magnitude < uint32(_HALF_SMALLEST_NORMAL) else half
    half = uint32(0x7C00) if magnitude >= uint32(_HALF_OVERFLOW) else half
    return uint16(0x7E00) if value != value else uint16(half | sign)


@njit(nogil=True)
def _to_bf16(value):
    bits = _bits(value)
    is_odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
    rounded = uint32(uint32(bits + uint32(0x7FFF) + is_odd) >> uint32(16))
    return uint16(0x7FC0) if value != value else uint16(rounded)


def widened(stored):
    """A stored weight as float32; numba picks by the storage's type."""


def rounded(value, array):
    """A float32 rounded into the storage of an array; a NaN becomes the canonical one."""


@overload(widened)
def _overload_widened(stored):
    if stored.bitwidth == 32:
        return lambda stored: stored
    if stored.signed:
        return lambda stored: _from_half(uint32(uint16(stored)))
    return lambda stored: _float(uint32(uint32(stored) << uint32(16)))


@overload(rounded)
def _overload_rounded(value, array):
    if array.dtype.bitwidth == 32:
        return lambda value, array: np.float32(np.nan) if value != value else value
    if array.dtype.signed:
        return lambda value, array: np.int16(_to_half(value))
    return lambda value, array: _to_bf16(value)
