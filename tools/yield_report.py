"""What a soak of an agent that yields ends with, as values and as text."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import get_args

import msgspec

from tools.yield_check import Cycle
from tools.yield_schedule import Kind


class YieldReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that it shows; written beside its files as report.json."""

    seed: int
    minutes: float
    quiet_s: float  # that the agent waits after others needed the CPU
    others_percent: float  # of all cores, that others may take
    cycles: list[Cycle]
    rounds: int  # whose update was accepted
    violations: list[str]

    @property
    def is_well(self) -> bool:
        """True when nothing was violated."""
        return not self.violations


def yield_text(report: YieldReport) -> str:
    """For people: a line per kind of load, the median and the worst of each time."""
    lines = [
        f"soak-yield with seed {report.seed}: {len(report.cycles)} loads in {report.minutes:g} minutes; "
        f"the agent lets others have {report.others_percent:g}% of the CPU, and is quiet for {report.quiet_s:g} s",
        "",
        f"{'load':<8}{'times':>6}   {'% of a core: before':>19}{'paused':>8}{'after':>7}   "
        f"{'s to pause':>11}   {'s to work again':>15}   {'steps while paused':>18}",
    ]
    for kind in get_args(Kind):
        if cycles := [cycle for cycle in report.cycles if cycle.kind == kind]:
            lines.append(
                f"{kind:<8}{len(cycles):>6}   {_middle(c.share_before for c in cycles):>19}"
                f"{_middle(c.share_paused for c in cycles):>8}{_middle(c.share_after for c in cycles):>7}   "
                f"{_both(c.yielded_s for c in cycles):>11}   "
                f"{_both(c.resumed_s for c in cycles if not c.is_disturbed):>15}   "
                f"{sum(c.steps_paused for c in cycles):>18}"
            )
    kept = [cycle.is_kept for cycle in report.cycles if cycle.is_kept is not None]
    disturbed = sum(cycle.is_disturbed for cycle in report.cycles)
    lines += [
        "",
        "times: median (worst)",
        f"the work of the round went on where it was after {sum(kept)} of {len(kept)} pauses that came within a round",
        f"{report.rounds} rounds accepted, each with all its steps",
    ]
    if disturbed:
        lines.append(f"{disturbed} times somebody else needed the CPU, too: when work went on was not judged then")
    lines += [f"VIOLATED  {violation}" for violation in report.violations[:20]]
    lines.append("PASSED" if report.is_well else f"FAILED with seed {report.seed}: {report.violations[0]}")
    return "\n".join(lines)


def _middle(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.1f}" if known else "?"


def _both(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.1f} ({max(known):.1f})" if known else "?"
