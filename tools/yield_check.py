"""Whether an agent yielded: from glances at it during one load, what was measured and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from edge_client.watching.load import WINDOW_S
from edge_client.watching.machine import FRESH_S
from tools.yield_schedule import SAYS, Kind, Load
from tools.yield_watch import Glance

IDLE_S = 1.0  # how long a paused agent sleeps between two looks at the machine
SHARE_PAUSED = 10.0  # percent of a core that a paused agent may take
SLACK_S = 4.0  # a loaded machine is late with everything
SEEN_S: dict[Kind, float] = {"cpu": 2 * WINDOW_S, "memory": 0.0, "mains": 0.0}  # until a fresh reading tells the load
READ_BACK_S = 10.0  # a load of memory pushes out the agent's own code and weights, which are read from disk again
UNDER_WAY = 1  # step, which is finished first; the load itself may make it take many times as long as one in peace


class Cycle(msgspec.Struct, frozen=True, kw_only=True):
    """One load, as it was. Shares are percent of one core; None: it did not come so far."""

    kind: Kind
    load_s: float
    share_before: float
    share_paused: float | None
    share_after: float | None
    yielded_s: float | None  # from the load's beginning (memory: under the floor) until the agent said that it pauses
    resumed_s: float | None  # from the load's end until it said that it works again
    steps_paused: int  # changes of its file of steps while it said that it was paused
    is_kept: bool | None  # the first step afterwards went on in the same work; None: there was no such step
    steps_late: int  # that ended after the load could be known, before it said that it pauses
    is_disturbed: bool  # programs that are not of this soak needed the CPU


@dataclass
class Seen:
    """Glances during one cycle, and when its load began and ended (monotonic seconds)."""

    load: Load
    others_limit: float  # percent of all cores
    cores: int
    local_steps: int  # of a round
    memory_floor_mb: float
    glances: list[Glance] = field(default_factory=list)
    began_s: float = float("inf")
    ended_s: float = float("inf")


def measure(seen: Seen) -> Cycle:
    """What the glances show."""
    before = [glance for glance in seen.glances if glance.at_s < seen.began_s]
    rest = [glance for glance in seen.glances if glance.at_s >= seen.began_s]
    said, began_s = SAYS[seen.load.kind], seen.began_s
    paused = next((n for n, glance in enumerate(rest) if (glance.reason or "").startswith(said)), None)
    again = None if paused is None else next((n for n in range(paused, len(rest)) if not rest[n].reason), None)
    still = [] if paused is None else rest[paused:again]
    after = [] if again is None else rest[again:]
    if seen.load.kind == "memory":  # it takes a while to take it
        began_s = next((glance.at_s for glance in rest if glance.free_mb < seen.memory_floor_mb), began_s)
    return Cycle(
        kind=seen.load.kind,
        load_s=min(seen.ended_s, rest[-1].at_s) - seen.began_s if rest else 0.0,
        share_before=share(before) or 0.0,
        share_paused=share(still),
        share_after=share(after),
        yielded_s=None if paused is None else max(0.0, rest[paused].at_s - began_s),
        resumed_s=None if again is None else rest[again].at_s - seen.ended_s,
        steps_paused=sum(a.steps != b.steps for a, b in pairwise(still)),
        is_kept=_is_kept(still, after, seen.local_steps),
        steps_late=_steps_late(rest[: None if paused is None else paused + 1], began_s + known_after_s(seen.load.kind)),
        is_disturbed=_is_disturbed(seen),
    )


def share(glances: Sequence[Glance]) -> float | None:
    """CPU time over time, percent of one core."""
    if len(glances) < 2 or (passed_s := glances[-1].at_s - glances[0].at_s) < 1.0:
        return None
    return 100.0 * (glances[-1].cpu_s - glances[0].cpu_s) / passed_s


def known_after_s(kind: Kind) -> float:
    """How long after a load's beginning every reading tells it, in seconds."""
    return SEEN_S[kind] + FRESH_S + SLACK_S


def has_two_steps(glances: Sequence[Glance]) -> bool:
    """True where the agent finished a step, and then another one."""
    return sum(a.steps != b.steps for a, b in pairwise(glances)) >= 2


def _steps_late(glances: Sequence[Glance], known_s: float) -> int:
    """The steps that ended after `known_s`."""
    late = [glance.steps for glance in glances if glance.at_s >= known_s]
    return sum(b.done - a.done if a.work == b.work else b.done for a, b in pairwise(late))


def _is_kept(paused: Sequence[Glance], after: Sequence[Glance], local_steps: int) -> bool | None:
    if not paused or paused[-1].steps.done >= local_steps:
        return None
    left = paused[-1].steps
    following = next((glance.steps for glance in after if glance.steps != left), None)
    return None if following is None else following.work == left.work and following.done > left.done


def _is_disturbed(seen: Seen) -> bool:
    """True where somebody else, un-niced, needed the CPU before the load or after it."""
    calm = (
        [glance for glance in seen.glances if glance.at_s < seen.began_s],
        [glance for glance in seen.glances if glance.at_s > seen.ended_s],
    )
    return any(peak(glances, seen.cores) > 0.8 * seen.others_limit for glances in calm)


def peak(glances: Sequence[Glance], cores: int) -> float:
    """The highest load of the machine's un-niced programs over `WINDOW_S`, percent of all cores."""
    highest, first = 0.0, 0
    for last, glance in enumerate(glances):
        while glances[first + 1].at_s <= glance.at_s - WINDOW_S if first + 1 < last else False:
            first += 1
        if (passed_s := glance.at_s - glances[first].at_s) >= WINDOW_S:
            highest = max(highest, 100.0 * (glance.busy_s - glances[first].busy_s) / (passed_s * cores))
    return highest


def violations(cycle: Cycle, quiet_s: float) -> list[str]:
    """What must not be, as sentences."""
    more_s: dict[Kind, float] = {"cpu": quiet_s + 2 * WINDOW_S, "memory": READ_BACK_S, "mains": 0.0}
    to_resume_s = FRESH_S + IDLE_S + SLACK_S + more_s[cycle.kind]
    found = []
    if cycle.yielded_s is None:
        found.append(f"{cycle.kind}: the agent did not pause within {cycle.load_s:.0f} s")
    elif cycle.steps_late > UNDER_WAY:
        found.append(
            f"{cycle.kind}: it finished {cycle.steps_late} steps after {known_after_s(cycle.kind):g} s of the load; "
            f"allowed: {UNDER_WAY}, the one under way"
        )
    if cycle.steps_paused:
        found.append(f"{cycle.kind}: it took steps {cycle.steps_paused} times while it said that it was paused")
    if cycle.share_paused is not None and cycle.share_paused > SHARE_PAUSED:
        found.append(f"{cycle.kind}: paused it took {cycle.share_paused:.1f}% of a core; allowed: {SHARE_PAUSED:.0f}%")
    if cycle.is_kept is False:
        found.append(f"{cycle.kind}: the steps of the round were lost in the pause")
    if cycle.yielded_s is not None and not cycle.is_disturbed:
        if cycle.resumed_s is None:
            found.append(f"{cycle.kind}: it did not work again")
        elif cycle.resumed_s > to_resume_s:
            found.append(f"{cycle.kind}: it worked again after {cycle.resumed_s:.1f} s; allowed: {to_resume_s:.1f} s")
        elif cycle.kind == "cpu" and cycle.resumed_s < quiet_s - WINDOW_S:
            found.append(
                f"{cycle.kind}: it worked again after {cycle.resumed_s:.1f} s, before {quiet_s:.0f} s of quiet"
            )
    return found
