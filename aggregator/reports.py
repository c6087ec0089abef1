"""What a closed round did, as the store keeps it and people read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from shared.transport import TrafficCount

Outcome = Literal["combined", "no majority", "not finite"]
Traffic = TrafficCount  # the aggregator's own bytes since the report before


class RoundReport(msgspec.Struct, frozen=True, kw_only=True):
    """Closing round `round` made version `round + 1`. Losses are weighted by samples over the counted devices."""

    round: int
    outcome: Outcome
    detail: str = ""  # why nothing was combined, for people
    opened_at_ms: int  # unix milliseconds
    closed_at_ms: int
    accepted: int  # updates in the round, late ones of earlier rounds included
    counted: int  # those that were combined
    late: int = 0  # those of earlier rounds
    first_order: int = 0  # of the combined ones, those with a change in place of scalars
    model_digest: str | None = None  # of the fleet's model of version `round`, hex; None: no majority
    left_out: int  # those whose model digest differs
    samples: int
    steps: int  # scalars of the counted updates
    train_loss: float | None  # nats per token
    held_out_loss: float | None  # of version `round`, nats per token
    held_out_accuracy: float | None  # of version `round`
    step: float  # step_rms, or lr of the plain rule
    scalar_rms: float | None  # of the counted scalars
    change_rms: float  # RMS change of a weight
    update_bytes: int  # payloads of the accepted updates

    @property
    def seconds(self) -> float:
        """From the round's opening to its closing."""
        return (self.closed_at_ms - self.opened_at_ms) / 1000


def best(reports: Sequence[RoundReport]) -> RoundReport | None:
    """The report with the lowest held-out loss, the earliest of equals: its version is its `round`."""
    measured = [report for report in reports if report.held_out_loss is not None]
    return min(measured, key=lambda report: (report.held_out_loss, report.round)) if measured else None


def round_line(report: RoundReport, rounds: int) -> str:
    """One line for the log."""
    parts = [f"round {report.round} of {rounds} closed: {report.counted} of {report.accepted} updates"]
    if report.outcome != "combined":
        parts.append(f"NOTHING COMBINED ({report.outcome}: {report.detail})")
    elif report.left_out:
        parts.append(f"{report.left_out} left out")
    if report.first_order:
        parts.append(f"{report.first_order} of them first-order")
    if report.late:
        parts.append(f"{report.late} late")
    parts.append(f"train loss {number(report.train_loss)}")
    if report.held_out_loss is not None:
        parts.append(f"held-out loss {number(report.held_out_loss)} before")
    if report.held_out_accuracy is not None:
        parts.append(f"accuracy {report.held_out_accuracy:.3f}")
    parts += [f"step {report.step:.3g}", f"{report.update_bytes} B of updates", f"{report.seconds:.1f} s"]
    return ", ".join(parts)


def number(value: float | None) -> str:
    """A loss for people."""
    return "-" if value is None else f"{value:.4f}"
