"""From accepted updates back to steps: the seeds that the devices drew, and what each step adds to its coefficient.

A round may have 100,000 devices, so many are replayed at once, and never all of them. `shared.seeds.draw` and
`shared.steprule.deltas` define what comes out; here are their fast twins for many devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from aggregator.algorithms import Contribution
from shared.changes import read_change
from shared.messages import Plan, Run, Update
from shared.philox import philox4x32
from shared.seeds import DRAW_STREAM, draw, draw_key, level_weights
from shared.steprule import deltas_of_many
from shared.wire import scalars_from_bytes

MAX_STEPS_AT_ONCE = 2**17  # of all devices of a chunk: about 20 MB of numbers on their way
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_NONE = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Work:
    """One accepted update, the plan that it followed, and how many rounds later it counts."""

    device: str
    update: Update
    plan: Plan
    staleness: int = 0


def replayed(works: Iterable[Work], facts: Run) -> Iterator[Contribution]:
    """The contributions of `works`, in their order. Raises PeerError where an update does not read.

    Each yielded contribution stands alone; about MAX_STEPS_AT_ONCE steps and one change are in memory at a time.
    """
    iterator = iter(works)
    for first in iterator:
        at_once = max(1, MAX_STEPS_AT_ONCE // first.plan.local_steps)
        chunk = [first, *islice(iterator, at_once - 1)]
        done: dict[int, Contribution] = {}
        for plan in {id(work.plan): work.plan for work in chunk}.values():
            places = [place for place, work in enumerate(chunk) if work.plan is plan and work.update.change is None]
            done.update(zip(places, _together([chunk[place] for place in places], plan, facts), strict=True))
        for place, work in enumerate(chunk):
            if work.update.change is None:
                yield done[place]
            else:  # only now: 12 K bytes each
                seeds, values = read_change(work.update.change, facts.scalar_format, facts.seeds)
                yield Contribution(work.device, work.update.samples, seeds, _NONE, values, work.staleness)


def draw_of_many(
    nonce: bytes, devices: Sequence[str], steps: int, seeds: int, levels: bytes | None
) -> NDArray[np.int64]:
    """`shared.seeds.draw` for many devices: int64 (devices, steps), a row per device."""
    keys = np.array([draw_key(nonce, device) for device in devices], dtype=np.uint64)[:, None]
    counter = np.zeros((1, steps, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(steps, dtype=np.uint32)
    counter[..., 3] = DRAW_STREAM
    drawn = philox4x32(counter, (keys & _LOW, keys >> _HALF))  # (devices, steps, 4)
    if levels is None:
        return drawn[..., 0].astype(np.int64) & (seeds - 1)
    cumulative = np.cumsum(level_weights()[np.frombuffer(levels, dtype=np.uint8)])
    ranks = _top_64_bits(drawn[..., 0].astype(np.uint64), drawn[..., 1].astype(np.uint64), int(cumulative[-1]))
    return np.searchsorted(cumulative, ranks.astype(np.int64), side="right").astype(np.int64)


def _top_64_bits(low: NDArray[np.uint64], high: NDArray[np.uint64], factor: int) -> NDArray[np.uint64]:
    """((low + 2^32 high) * factor) div 2^64 in 32-bit limbs; low and high below 2^32, factor below 2^34."""
    factor_low, factor_high = np.uint64(factor & 0xFFFFFFFF), np.uint64(factor >> 32)
    one, other = high * factor_low, low * factor_high
    carry = ((low * factor_low) >> _HALF) + (one & _LOW) + (other & _LOW)
    top: NDArray[np.uint64] = high * factor_high + (one >> _HALF) + (other >> _HALF) + (carry >> _HALF)
    return top


def _together(works: Sequence[Work], plan: Plan, facts: Run) -> Iterator[Contribution]:
    if not works:
        return
    rows = [scalars_from_bytes(work.update.scalars, facts.scalar_format) for work in works]
    lengths = np.array([row.size for row in rows], dtype=np.int64)
    steps = int(lengths.max())
    scalars = np.zeros((len(rows), steps), dtype=np.float32)
    for place, row in zip(scalars, rows, strict=True):
        place[: row.size] = row
    if plan.common_seeds:
        drawn = np.broadcast_to(draw(plan.nonce, None, steps, facts.seeds, plan.levels), (len(rows), steps))
    else:
        drawn = draw_of_many(plan.nonce, [work.device for work in works], steps, facts.seeds, plan.levels)
    deltas = deltas_of_many(plan.step, scalars, lengths)
    for number, work in enumerate(works):
        n = lengths[number]
        contribution = (drawn[number, :n], rows[number], deltas[number, :n], work.staleness)
        yield Contribution(work.device, work.update.samples, *contribution)
