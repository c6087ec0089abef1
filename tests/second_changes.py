"""Changes of coefficients, written from PROTOCOL.md alone (sections 5.7 and 9.9): numbers, reading, publishing."""

from __future__ import annotations

import itertools
import math
import struct

from second_msgpack import Refused, need

WIDTHS = {"f32": 4, "f16": 2, "f8": 1}
LARGEST = {"f32": 3.4028234663852886e38, "f16": 65504.0, "f8": 57344.0}


def finite(data, form):
    """The numbers in `data`."""
    if form == "f8":  # an f16 whose lower byte is 0
        data, form = b"".join(bytes((0, byte)) for byte in data), "f16"
    values = list(struct.unpack(f"<{len(data) // WIDTHS[form]}{'f' if form == 'f32' else 'e'}", data))
    need(all(map(math.isfinite, values)), "NON_FINITE")
    return values


def write(value, form):
    """One number, clamped and rounded to nearest even."""
    value = max(-LARGEST[form], min(LARGEST[form], value))
    if form != "f8":
        return struct.pack("<f" if form == "f32" else "<e", value)
    sign, rest = 0x80 if math.copysign(1, value) < 0 else 0, abs(value)
    ordered = sorted(range(0x7C), key=lambda byte: (abs(finite(bytes((byte,)), "f8")[0] - rest), byte & 1))
    return bytes((sign | ordered[0],))


def f32_or(value, code):
    """`value` rounded to f32; refused with `code` where that is infinite."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        raise Refused(code) from None


def read(change, form, pool, known):
    """Seeds and values of a change."""
    data = change["values"]
    is_known = known is not None and len(data) == len(known) * WIDTHS[form]
    if change["seeds"] is None and not is_known and len(data) in (pool // 2, pool // 4, pool // 8):
        bits = 8 * len(data) // pool
        codes = [byte >> place & (1 << bits) - 1 for byte in data for place in range(0, 8, bits)]
        odd = [2 * q + 1 - (1 << bits) for q in codes]
        return list(range(pool)), [f32_or(math.ldexp(x, change["exponent"]), "NON_FINITE") for x in odd]
    need(len(data) % WIDTHS[form] == 0)
    values = [f32_or(math.ldexp(x, change["exponent"]), "NON_FINITE") for x in finite(change["values"], form)]
    if change["seeds"] is not None:
        seeds = list(struct.unpack(f"<{len(change['seeds']) // 2}H", change["seeds"]))
        need(all(before < after for before, after in itertools.pairwise(seeds)))
        need(all(seed < pool for seed in seeds), "SEED_OUTSIDE_POOL")
    else:
        seeds = known if known is not None and len(known) == len(values) else list(range(pool))
    need(len(seeds) == len(values), "COEFFICIENT_COUNT")
    return seeds, values


def added(a, seeds, values):
    """What a device makes of a change."""
    a = list(a)
    for k, value in zip(seeds, values, strict=True):
        a[k] = f32_or(a[k] + value, "NON_FINITE")
    return a


def publish(a, carried, total, form, drawn):
    """The next coefficients, what is carried then, and the plan's change; None where f32 cannot hold them."""
    pool, size = len(a), WIDTHS[form]
    want = [c + s for c, s in zip(carried, total, strict=True)]
    if any(not abs(x) <= LARGEST["f32"] for x in want + [x + w for x, w in zip(a, want, strict=True)]):
        return None
    moved = [k for k in range(pool) if total[k] != 0]
    covers = [(moved, (2 + size) * len(moved))]
    if drawn is not None and not set(moved) - set(drawn):
        covers.append((drawn, size * len(drawn)))
    covers.append((list(range(pool)), size * pool))
    seeds, length = min(covers, key=lambda cover: cover[1])
    peak, exponent = max([abs(want[k]) for k in seeds], default=0.0), 0
    if form != "f32" and peak > 0:
        while peak >= 2.0**15 or (peak < 2.0**14 and exponent > -160):
            step = 1 if peak >= 2.0**15 else -1
            peak, exponent = peak / 2.0**step, exponent + step
    data = b"".join(write(math.ldexp(want[k], -exponent), form) for k in seeds)
    is_named = covers[0] == (seeds, length)
    change = {
        "seeds": struct.pack(f"<{len(seeds)}H", *seeds) if is_named else None,
        "exponent": exponent,
        "values": data,
    }
    try:
        after = added(a, *read(change, form, pool, seeds))
    except Refused:
        return None
    left = [f32_or(w - (new - old), None) for w, new, old in zip(want, after, a, strict=True)]
    return after, left, change if length < 4 * pool else None
