"""What `next_version` does, once more for `verification`: plain Python numbers, as PROTOCOL.md section 9.9 says it."""

from __future__ import annotations

import bisect
import math
import struct

from shared.messages import Change, NumberFormat

FLOAT32_MAX = 3.4028234663852886e38
_WIDTH: dict[NumberFormat, int] = {"f32": 4, "f16": 2, "f8": 1}
_EIGHTHS = [struct.unpack("<e", bytes((0, byte)))[0] for byte in range(0x7C)]  # the f8 numbers from 0 up

Version = tuple[list[float], list[float], "Change | None"]  # coefficients, what is carried, the change


def published(
    a: list[float], carried: list[float], summed: list[float], form: NumberFormat, drawn: list[int] | None
) -> Version | None:
    """The next version, given what the round adds and the seeds that all its devices drew; None beyond float32."""
    wanted = [c + s for c, s in zip(carried, summed, strict=True)]
    if not all(abs(w) <= FLOAT32_MAX and abs(a_k + w) <= FLOAT32_MAX for a_k, w in zip(a, wanted, strict=True)):
        return None
    moved, width = [k for k, s in enumerate(summed) if s != 0.0], _WIDTH[form]
    choices = [((2 + width) * len(moved), moved, True)]
    if drawn is not None and set(moved) <= set(drawn):
        choices.append((width * len(drawn), drawn, False))
    choices.append((width * len(a), list(range(len(a))), False))
    length, covered, is_named = min(choices, key=lambda choice: choice[0])
    largest = max((abs(wanted[k]) for k in covered), default=0.0)
    exponent = 0 if form == "f32" or largest == 0.0 else max(math.frexp(largest)[1] - 15, -160)
    numbers = [_written(math.ldexp(wanted[k], -exponent), form) for k in covered]
    following = list(a)
    for k, (_, x) in zip(covered, numbers, strict=True):
        value = _float32(math.ldexp(x, exponent))
        total = None if value is None else _float32(a[k] + value)
        if total is None:
            return None
        following[k] = total
    rest = [
        struct.unpack("<f", struct.pack("<f", w - (b - c)))[0] for w, b, c in zip(wanted, following, a, strict=True)
    ]
    named = struct.pack(f"<{len(covered)}H", *covered) if is_named else None
    change = Change(named, exponent, b"".join(data for data, _ in numbers))
    return following, rest, change if length < 4 * len(a) else None


def _written(value: float, form: NumberFormat) -> tuple[bytes, float]:
    """A number as it travels, and what it stands for."""
    if form != "f8":
        largest, code = (FLOAT32_MAX, "<f") if form == "f32" else (65504.0, "<e")
        data = struct.pack(code, max(-largest, min(largest, value)))
        return data, struct.unpack(code, data)[0]
    size = min(abs(value), _EIGHTHS[-1])
    above = bisect.bisect_left(_EIGHTHS, size)
    near = sorted({max(above - 1, 0), above}, key=lambda byte: (abs(_EIGHTHS[byte] - size), byte % 2))[0]
    is_negative = math.copysign(1.0, value) < 0
    return bytes((near | 0x80 * is_negative,)), -_EIGHTHS[near] if is_negative else _EIGHTHS[near]


def _float32(value: float) -> float | None:
    """Rounded to float32; None where that is infinite."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return None
    return rounded
