"""A change of coefficients in bytes and back: the one in a plan, and the one in a first-order update.

Adding it is a float32 addition per coefficient, the same on every side, whatever was rounded away before it was
written; the writer remembers that and sends it another time (PROTOCOL.md, sections 5.7 and 9.10). No I/O.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shared.errors import PeerError
from shared.messages import Change, NumberFormat, Plan
from shared.numbers import NUMBER_BYTES, numbers_from_bytes, numbers_to_bytes
from shared.ranges import MAX_EXPONENT, MIN_EXPONENT
from shared.refusals import Refusal
from shared.seeds import draw
from shared.wire import seeds_from_bytes, seeds_to_bytes

FEW_BITS = (4, 2, 1)
NOTHING = Change(b"", 0, b"")
_TOP = 15  # the largest value is scaled into [2**14, 2**15), where halves of both widths are still finite


def write_change(seeds: NDArray[np.int64] | None, values: NDArray[np.float64], form: NumberFormat) -> Change:
    """float64 (n,), finite and within float32, as they travel for these seeds.

    seeds: int64 (n,), strictly increasing. None: the reader knows them (`read_change`).
    """
    exponent = 0
    largest = float(np.abs(values).max(initial=0.0))
    if form != "f32" and largest > 0.0:
        exponent = max(math.frexp(largest)[1] - _TOP, MIN_EXPONENT)
    named = None if seeds is None else seeds_to_bytes(seeds)
    return Change(named, exponent, numbers_to_bytes(np.ldexp(values, -exponent), form))


def write_few_bits(values: NDArray[np.float64], bits: int) -> Change:
    """All K coefficients in 4, 2 or 1 bits each: float64 (K,), finite and within float32.

    Number q stands for (2 q + 1 - 2**bits) * 2**exponent: no value is 0, and the largest are clamped. The exponent is
    the one with the least squared error, so a writer should remember what it could not say.
    """
    if bits not in FEW_BITS:
        raise ValueError(f"{bits} bits; allowed: {FEW_BITS}")
    length = math.sqrt(math.fsum((values * values).tolist()) / len(values))
    middle = math.frexp(length)[1] if length else MIN_EXPONENT  # which float32 rounds to 0
    top, best = 2**bits - 1, (math.inf, 0, np.zeros(len(values), np.uint8))
    for exponent in range(middle - bits - 2, middle + 1):
        exponent = min(max(exponent, MIN_EXPONENT), MAX_EXPONENT)
        q = np.clip(np.floor(np.ldexp(values, -exponent - 1)) + 2 ** (bits - 1), 0, top)
        left = values - np.ldexp(2 * q - top, exponent)
        best = min(best, (float((left * left).sum()), exponent, q.astype(np.uint8)), key=lambda one: one[0])
    _, exponent, q = best
    places = np.arange(8 // bits, dtype=np.uint8) * bits
    return Change(None, exponent, np.bitwise_or.reduce(q.reshape(-1, 8 // bits) << places, axis=1).tobytes())


def read_change(
    change: Change, form: NumberFormat, pool: int, known: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Seeds int64 (n,) and values float32 (n,) of a change in a run with K = `pool`.

    known: the seeds of a change that names none and has not K values (`drawn_seeds`).
    Raises PeerError: MALFORMED, NON_FINITE, SEED_OUTSIDE_POOL or COEFFICIENT_COUNT.
    """
    bits = _bits(change, pool)
    if bits is not None and (known is None or len(known) * NUMBER_BYTES[form] != len(change.values)):
        numbers = _unpacked(change.values, bits)
    else:
        numbers = numbers_from_bytes(change.values, form)
    with np.errstate(over="ignore"):
        values = np.ldexp(numbers.astype(np.float64), change.exponent).astype(np.float32)
    if not np.isfinite(values).all():
        raise PeerError(Refusal.NON_FINITE, f"float32 cannot hold a number times 2^{change.exponent}")
    if change.seeds is not None:
        seeds = seeds_from_bytes(change.seeds, pool)
    elif known is not None and len(values) == len(known):
        seeds = known
    else:
        seeds = np.arange(pool, dtype=np.int64)
    if len(values) != len(seeds):
        raise PeerError(Refusal.COEFFICIENT_COUNT, f"{len(values)} values for {len(seeds)} seeds")
    return seeds, values


def _bits(change: Change, pool: int) -> int | None:
    """How many bits each of all K numbers has, if fewer than 8."""
    bits = len(change.values) * 8 // pool
    is_packed = change.seeds is None and bits in FEW_BITS and len(change.values) * 8 == bits * pool
    return bits if is_packed else None


def _unpacked(data: bytes, bits: int) -> NDArray[np.float32]:
    """The odd integers in packed bits, the lowest bits of a byte first, float32 (K,)."""
    places = np.arange(8 // bits, dtype=np.uint8) * bits
    q = (np.frombuffer(data, dtype=np.uint8)[:, None] >> places) & (2**bits - 1)
    odd: NDArray[np.float32] = (2.0 * q.reshape(-1) - (2**bits - 1)).astype(np.float32)
    return odd


def add_change(
    coefficients: NDArray[np.float32], seeds: NDArray[np.int64], values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Coefficients (K,) with `values` (n,) added at `seeds` (n,), in float32. Raises PeerError where one overflows."""
    following = coefficients.copy()
    with np.errstate(over="ignore"):
        following[seeds] += values
    if not np.isfinite(following).all():
        raise PeerError(Refusal.NON_FINITE, "the change makes a coefficient infinite")
    return following


def drawn_seeds(plan: Plan, pool: int) -> NDArray[np.int64] | None:
    """The seeds that every device of a round draws, in ascending order, int64 (n,); None where they differ.

    Raises PeerError where the plan's levels are not those of K = `pool`.
    """
    if not plan.common_seeds:
        return None
    return np.unique(draw(plan.nonce, None, plan.local_steps, pool, plan.levels))
