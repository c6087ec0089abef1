"""Numbers as they travel: floats of 32, 16 and 8 bits (PROTOCOL.md, section 5.7). No I/O.

"f8" is the upper byte of an IEEE 754 half: sign, 5 bits of exponent, 2 of fraction, subnormal numbers included.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import PeerError
from shared.messages import NumberFormat
from shared.refusals import Refusal

NUMBER_BYTES: dict[NumberFormat, int] = {"f32": 4, "f16": 2, "f8": 1}
LARGEST: dict[NumberFormat, float] = {"f32": float(np.finfo(np.float32).max), "f16": 65504.0, "f8": 57344.0}
_SMALLEST_F8 = -16  # 2**-16, the distance of its subnormal numbers


def numbers_to_bytes(values: NDArray[np.float64], form: NumberFormat) -> bytes:
    """Finite float64 (n,) as n little-endian numbers, rounded once to nearest even and clamped at the largest."""
    clamped = np.clip(values, -LARGEST[form], LARGEST[form])
    if form == "f8":
        return _upper_bytes(np.rint(clamped / _spacing(clamped)) * _spacing(clamped))
    return clamped.astype("<f4" if form == "f32" else "<f2").tobytes()


def numbers_from_bytes(data: bytes, form: NumberFormat, what: str = "value") -> NDArray[np.float32]:
    """float32 (n,), exactly what `data` stands for; `what` names one. Raises PeerError: MALFORMED or NON_FINITE."""
    if len(data) % NUMBER_BYTES[form]:
        raise PeerError(Refusal.MALFORMED, f"{len(data)} bytes do not hold whole {form} {what}s")
    if form == "f8":
        halves = (np.frombuffer(data, dtype=np.uint8).astype(np.uint16) << 8).view(np.float16)
    else:
        halves = np.frombuffer(data, dtype="<f4" if form == "f32" else "<f2")
    values = halves.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise PeerError(Refusal.NON_FINITE, f"{what} {bad[0]} is {values[bad[0]]}")
    return values


def rounded_by_chance(value: float, form: NumberFormat, noise: int) -> np.float32:
    """A scalar as it travels, noise: u32, uniform.

    "f8" takes the upper or the lower neighbour, so that over the noise the mean is the value: a scalar's error lies
    along its own direction, orthogonal to all others, so no later step can make up for it, and it must average out.
    The others are rounded to nearest even.
    """
    with np.errstate(over="ignore"):  # clamped
        one = np.array([value], dtype=np.float32).astype(np.float64)
    if form == "f8":
        clamped = np.clip(one, -LARGEST[form], LARGEST[form])
        spacing = _spacing(clamped)
        one = np.floor(clamped / spacing + noise / 2**32) * spacing
    sent: np.float32 = numbers_from_bytes(numbers_to_bytes(one, form), form)[0]
    return sent


def _spacing(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance of neighbouring f8 numbers where each value lies: a power of two."""
    _, exponents = np.frexp(values)  # |value| in [2**(e - 1), 2**e)
    spacing: NDArray[np.float64] = np.ldexp(1.0, np.maximum(exponents - 3, _SMALLEST_F8))
    return spacing


def _upper_bytes(values: NDArray[np.float64]) -> bytes:
    return (values.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8).tobytes()
