"""What the agent shows: lines that stay and, on a terminal, a live line that is rewritten in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from typing_extensions import assert_never

from edge_client.jobs import HeldOutReport, Report, StepReport
from edge_client.state import Evaluating, Fetching, Rebuilding, Sending, Settled, State, Training, Waiting
from shared.transport import TrafficCount

REDRAW_S = 0.1  # a terminal over a slow link should not be the bottleneck
CLEAR_LINE = "\r\x1b[K"


@dataclass(frozen=True)
class Status:
    """What the live line shows."""

    run: str
    round: int | None
    activity: str  # "step 3/20", "waiting", "paused: on battery"
    loss: float | None  # of the last step, nats per token
    memory_bytes: int | None  # of this process
    traffic: TrafficCount


def status_line(status: Status) -> str:
    """The live line, as text."""
    parts = [status.run]
    if status.round is not None:
        parts.append(f"round {status.round}")
    parts.append(status.activity)
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.memory_bytes is not None:
        parts.append(f"memory {byte_text(status.memory_bytes)}")
    sent, received = status.traffic.ip_sent_bytes, status.traffic.ip_received_bytes
    if sent is None or received is None:  # this platform counts payloads alone
        sent, received = status.traffic.payload_sent_bytes, status.traffic.payload_received_bytes
    parts.append(f"up {byte_text(sent)}, down {byte_text(received)}")
    return " | ".join(parts)


def byte_text(count: int) -> str:
    """A number of bytes for people, in powers of 1000."""
    if count < 1000:
        return f"{count} B"
    amount = float(count)
    for unit in ("kB", "MB", "GB"):
        amount /= 1000
        if amount < 999.5 or unit == "GB":
            break
    return f"{amount:.1f} {unit}" if amount < 100 else f"{amount:.0f} {unit}"


class Screen:
    """A text stream: lines that stay and, on a terminal, one line below them that is rewritten in place."""

    def __init__(self, stream: TextIO, *, is_terminal: bool, log: Callable[[str], None] = lambda line: None) -> None:
        """log: gets the lines that stay too."""
        self._stream = stream
        self._log = log
        self._is_terminal = is_terminal
        self._live = ""
        self._drawn_s = float("-inf")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._log(text)
        if self._is_terminal and self._live:
            self._stream.write(f"{CLEAR_LINE}{text}\n{self._live}")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def is_due(self, now_s: float) -> bool:
        """True where a live line would be drawn: on a terminal, at most every `REDRAW_S` seconds."""
        return self._is_terminal and now_s - self._drawn_s >= REDRAW_S

    def show(self, text: str, now_s: float) -> None:
        """Rewrite the live line if that `is_due`."""
        if not self.is_due(now_s):
            return
        live = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be rewritten
        self._drawn_s = now_s
        if live != self._live:
            self._live = live
            self._stream.write(f"{CLEAR_LINE}{live}")
            self._stream.flush()

    def end(self) -> None:
        """Take the live line away."""
        if self._is_terminal and self._live:
            self._stream.write(CLEAR_LINE)
            self._stream.flush()
        self._live = ""


def activity(state: State, report: Report | None) -> str:
    """What the agent is doing, in a few words. `report`: the last one of the job under way."""
    if state.pause is not None:
        return f"paused: {state.pause}"
    if not state.link.is_connected:
        return f"no connection to {state.identity.broker}"
    if state.plan is None:
        return "waiting for the run" if state.run is None else "waiting for a plan"
    if state.plan.phase == "paused":
        return "the run is paused"
    match state.work:
        case Training() | Evaluating():
            return _report_text(report)
        case Fetching():
            return "fetching the model state"
        case Rebuilding():
            return "rebuilding"
        case Sending():
            return "waiting for the receipt"
        case Settled() | Waiting():
            is_over = state.plan.phase == "finished"
            return "the run is finished; waiting for it to go on" if is_over else "waiting for the next round"
        case _:
            assert_never(state.work)


def _report_text(report: Report | None) -> str:
    if isinstance(report, StepReport):
        return f"step {report.step}/{report.steps}"
    if isinstance(report, HeldOutReport):
        return f"held-out {report.done}/{report.examples}"
    return "starting"
