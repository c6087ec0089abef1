"""How many bytes the owner allows per day and per round, and what follows: a pure function, no clock, no disk.

A round that has begun is finished and sent: what its plan cost is spent, and half a round helps nobody. So the question
is asked once per round, before its first step. Where the day's bytes run out all the same, its update goes out once,
and nothing else is heard or said twice: the limit is passed by an update and its receipt at most. Who cannot afford
another round today stops listening to plans, which go on costing: spreading rounds over the day instead would cost a
whole snapshot (16 KB) at each return.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from shared.errors import UserError

DAY_S = 86_400
# A ping and its answer over TLS, with their acknowledgements, measured at the IP layer.
PING_BYTES = 210
PING_PART = 0.1  # of a day's bytes may go into keeping the connection
SHORTEST_KEEPALIVE_S, LONGEST_KEEPALIVE_S = 60, 1800  # routers forget a silent connection, most after half an hour
PAST_ROUNDS = 8  # that an estimate looks at
# A round that was never seen, at most: a scalar of 4 bytes up, a seed and a coefficient down, and everything around.
_STEP_BYTES, _ROUND_BYTES = 10, 1000
_SNAPSHOT_BYTES = 1000  # around its coefficients
# Becoming quiet, over TLS: the presence that says so, its echo, and a plan that is on its way already.
_QUIET_BYTES = 700

Stage = Literal["open", "kept", "sending", "sent"]  # of a round; see Wanted


class ByteLimits(msgspec.Struct, frozen=True):
    """[budget]: bytes on the wire, both ways, all layers that this system counts; 0: no limit."""

    day_bytes: int = 0  # of a local day
    round_bytes: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("day_bytes", "round_bytes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give a number of bytes, or 0 for no limit.")


class PastRound(msgspec.Struct, frozen=True):
    """What a round cost."""

    steps: int
    wire_bytes: int  # both ways


@dataclass(frozen=True)
class Wanted:
    """The round that could begin, or is under way.

    stage: open: no update is made yet; kept: an earlier life made one, and only a plan can tell whether it counts now;
    sending: it is made; sent: the broker has it, and the receipt is missing.
    """

    key: tuple[int, bytes]  # number and nonce
    round_bytes: int  # estimated
    catch_up_bytes: int  # of the snapshot, where the model state is not here
    stage: Stage = "open"


@dataclass(frozen=True)
class Standing:
    """What was decided last."""

    day: str = ""
    begun: tuple[int, bytes] | None = None  # the round that may be finished
    pause: str | None = None  # why no round may begin, and what ends that; it names what was true at first, and stays
    is_quiet: bool = False  # until the day is over: no plans, and no update twice


def decide(
    limits: ByteLimits,
    day: str,
    spent_bytes: int,
    seconds_left: float,
    wanted: Wanted | None,
    standing: Standing,
    keepalive_s: int,
) -> Standing:
    """Whether the round that is wanted may begin or go on; `wanted` is None where there is none.

    day: the local date; spent_bytes: of it; seconds_left: until midnight.
    """
    if standing.day != day:
        standing = Standing(day, standing.begun)
    is_spent = standing.is_quiet or 0 < limits.day_bytes <= spent_bytes
    stage = None if wanted is None else wanted.stage
    if wanted is not None and stage == "kept":
        return Standing(day, wanted.key)
    if wanted is not None and (stage == "sending" or (wanted.key == standing.begun and _may_end(wanted, is_spent))):
        return Standing(day, wanted.key, is_quiet=is_spent)
    if is_spent:
        return standing if standing.pause else Standing(day, None, _day_text(limits, spent_bytes), is_quiet=True)
    if wanted is None or stage == "sent":
        return Standing(day, standing.begun)
    cost = wanted.round_bytes
    if limits.round_bytes and cost > limits.round_bytes:
        text = f"byte budget: a round takes about {cost} bytes, round_bytes is {limits.round_bytes}"
        return Standing(day, standing.begun, f"{text}; goes on with a plan of fewer steps")
    idle_bytes = math.ceil(PING_BYTES * seconds_left / keepalive_s)
    rest_bytes = wanted.catch_up_bytes + idle_bytes + _QUIET_BYTES
    if limits.day_bytes and spent_bytes + cost + rest_bytes > limits.day_bytes:
        return Standing(day, None, _day_text(limits, spent_bytes, cost + wanted.catch_up_bytes), is_quiet=True)
    return Standing(day, wanted.key)


def _may_end(wanted: Wanted, is_spent: bool) -> bool:
    """Whether the round that has begun goes on: not to send what the broker has, nor to fetch the model over again."""
    return wanted.stage == "open" and not (is_spent and wanted.catch_up_bytes)


def _day_text(limits: ByteLimits, spent_bytes: int, cost: int = 0) -> str:
    needs = f", a round takes about {cost}" if cost else ""
    return f"byte budget: {spent_bytes} of {limits.day_bytes} bytes of today are used{needs}; goes on at midnight"


def round_estimate(past: Sequence[PastRound], local_steps: int) -> int:
    """Bytes that a round of `local_steps` will cost at most: the dearest of those that were, or a first guess."""
    if not past:
        return _ROUND_BYTES + _STEP_BYTES * local_steps
    return max(one.wire_bytes + _STEP_BYTES * max(0, local_steps - one.steps) for one in past[-PAST_ROUNDS:])


def snapshot_estimate(seeds: int) -> int:
    """Bytes that fetching the state of a model with so many coefficients costs."""
    return 4 * seeds + _SNAPSHOT_BYTES


def keepalive_s(limits: ByteLimits, configured_s: int) -> int:
    """Seconds between pings: the configured, or more where a day's pings would take over `PING_PART` of the budget."""
    if not limits.day_bytes:
        return configured_s
    wanted = math.ceil(DAY_S * PING_BYTES / (PING_PART * limits.day_bytes))
    return max(configured_s, min(max(wanted, SHORTEST_KEEPALIVE_S), LONGEST_KEEPALIVE_S))
