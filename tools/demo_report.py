"""What the demo ends with: gain and cost, as numbers and as text. Values in, values out; no I/O but `read_lines`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from aggregator.reports import RoundReport
from edge_client.tally import RoundMetrics
from tools.bandwidth_report import PAPER_BYTES

MUST_FALL_TO = 0.5  # of the held-out loss, for the demo to count as a success

T = TypeVar("T")


class Score(msgspec.Struct, frozen=True):
    """What a model does on the held-out examples of the demo, and what it answers to one of them."""

    loss: float  # nats per token
    accuracy: float  # in [0, 1]
    answer: str


class ByteCount(msgspec.Struct, frozen=True):
    """Bytes of one device. `socket` counts TCP payload, so MQTT too; None where the platform cannot tell."""

    payload_up: float
    payload_down: float
    socket_up: float | None
    socket_down: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that a finished demo shows; written beside its files as report.json."""

    model: str
    dtype: str
    devices: int
    rounds: int
    local_steps: int
    batch_size: int
    examples: int  # held out from every device
    question: str
    before: Score
    after: Score
    per_round: ByteCount  # mean over client-rounds after a device's first
    joining: ByteCount  # mean over devices of their first line: the join and the first round together
    client_rounds: int  # how many lines `per_round` is the mean of
    tuning_s: float  # from the first plan to the last version
    total_s: float  # from the demo's start
    files: dict[str, str]

    @property
    def has_gained(self) -> bool:
        """True when the held-out loss has at least halved."""
        return self.after.loss <= MUST_FALL_TO * self.before.loss


@dataclass(frozen=True)
class Cost:
    """`per_round`, `joining` and `client_rounds` of the report."""

    per_round: ByteCount
    joining: ByteCount
    client_rounds: int


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """The whole lines of a JSONL metrics file, [] where there is none yet. A line without its end is still written."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [msgspec.json.decode(line, type=kind) for line in lines]


def cost_of(devices: Sequence[Sequence[RoundMetrics]]) -> Cost:
    """The byte counts of a run. `devices`: the metrics of each device in order.

    A device's first line holds what joining costs once (run, manifest, snapshot), so it is kept apart. A line without
    steps, such as the evaluation of the last version, is no client-round.
    Raises ValueError where no device took part in a second round.
    """
    first = [lines[0] for lines in devices if lines]
    later = [line for lines in devices for line in lines[1:] if line.steps]
    if not later:
        raise ValueError("no device has finished a second round, so there is nothing to take a mean of")
    return Cost(_mean_bytes(later), _mean_bytes(first), len(later))


def _mean_bytes(lines: Sequence[RoundMetrics]) -> ByteCount:
    def mean(pick: Callable[[RoundMetrics], int | None]) -> float | None:
        known = [count for line in lines if (count := pick(line)) is not None]
        return sum(known) / len(known) if len(known) == len(lines) else None

    up, down = mean(lambda line: line.payload_sent_bytes), mean(lambda line: line.payload_received_bytes)
    assert up is not None and down is not None
    return ByteCount(up, down, mean(lambda line: line.socket_sent_bytes), mean(lambda line: line.socket_received_bytes))


def progress_line(report: RoundReport, rounds: int) -> str:
    """One closed round, for people who watch."""
    parts = [f"round {report.round + 1:>3} of {rounds}"]
    if report.train_loss is not None:
        parts.append(f"train loss {report.train_loss:.3f}")
    if report.held_out_loss is not None:
        parts.append(f"the devices' held-out loss before it {report.held_out_loss:.3f}")
    if report.outcome != "combined":
        parts.append(f"NOTHING COMBINED: {report.outcome}")
    elif report.counted < report.accepted:
        parts.append(f"{report.accepted - report.counted} of {report.accepted} updates left out")
    parts.append(f"{report.seconds:.1f} s")
    return ", ".join(parts)


def report_text(report: Report) -> str:
    """The demo's last lines."""
    before, after = report.before, report.after
    verdict = "" if report.has_gained else "   NOT HALVED: the demo failed"
    rows = [
        "",
        f"{report.model} in {report.dtype}, {report.devices} devices, {report.rounds} rounds of {report.local_steps} "
        f"steps with batch {report.batch_size}",
        f"  held-out loss      {before.loss:.3f} -> {after.loss:.3f} nats per token{verdict}",
        f"  held-out accuracy  {before.accuracy:.1%} -> {after.accuracy:.1%}"
        f"   ({report.examples} examples that no device has)",
        f"  question           {report.question!r}",
        f"  answer before      {before.answer!r}",
        f"  answer after       {after.answer!r}",
        "",
        f"{f'Bytes per client-round (mean of {report.client_rounds})':<34} {'up':>8} {'down':>8} {'sum':>8}",
        *_byte_rows(report.per_round),
        f"  {'the paper (200 steps, K = 4096)':<32} {PAPER_BYTES:>26}",
        "A device's first round, with the join",
        *_byte_rows(report.joining),
        "",
        f"Seconds: {report.tuning_s:.0f} of tuning, {report.total_s:.0f} in all",
        *(f"  {name:<18} {path}" for name, path in report.files.items()),
    ]
    return "\n".join(rows)


def _byte_rows(count: ByteCount) -> Iterable[str]:
    yield _byte_row("payload", count.payload_up, count.payload_down)
    yield _byte_row("on the socket", count.socket_up, count.socket_down)


def _byte_row(name: str, up: float | None, down: float | None) -> str:
    if up is None or down is None:
        return f"  {name:<32} unknown on this platform"
    return f"  {name:<32} {up:>8.0f} {down:>8.0f} {up + down:>8.0f}"
