"""Processes that a tool starts, watches and ends: each with a log file, none left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UnavailableError

STOP_TIMEOUT_S = 6.0  # for all together
TAIL_LINES = 15
SCRIPTS = {"kseed-aggregator": "aggregator.cli", "kseed-edge": "edge_client.cli"}


@dataclass(frozen=True, eq=False)
class Child:
    """A process and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        """The last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        return "\n".join(lines[-TAIL_LINES:])


class Crew:
    """The processes of one tool. Use it through `crew()`, which ends them."""

    def __init__(self) -> None:
        self.children: list[Child] = []  # in the order of their start

    def start(self, name: str, command: Sequence[str], log: Path, settings: Mapping[str, str]) -> Child:
        """Start `command` with `settings` added to the environment; output goes to `log`."""
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **settings}
            )
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def check(self) -> None:
        """Raise UnavailableError, with the tail of its log, if a process ended with an exit code other than 0."""
        for child in self.children:
            if child.process.poll():
                raise _ended_badly(child)

    def finish(self, child: Child, timeout_s: float) -> None:
        """Wait for the end of `child`. Raises UnavailableError if it does not come, or comes with an exit code."""
        try:
            code = child.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise UnavailableError(
                f"{child.name} did not end within {timeout_s:.0f} s; its log {child.log} ends with:\n{child.tail()}"
            ) from None
        if code:
            raise _ended_badly(child)

    def stop(self) -> None:
        """Ask those still running to end, all at once, and kill who does not."""
        running = [child.process for child in self.children if child.process.poll() is None]
        for process in running:
            process.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for process in running:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ended_badly(child: Child) -> UnavailableError:
    return UnavailableError(
        f"{child.name} ended with exit code {child.process.returncode}; its log {child.log} ends with:\n{child.tail()}"
    )


@contextmanager
def crew() -> Iterator[Crew]:
    """A crew whose processes end with the block: on success, error, ctrl-C and SIGTERM alike."""
    members = Crew()

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, end)
    try:
        yield members
    finally:
        for number in before:  # a second ctrl-C must not cut this short
            signal.signal(number, signal.SIG_IGN)
        members.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def script(name: str) -> list[str]:
    """The command line of one of kseed's own commands, from the environment this process runs in."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    return [found] if found else [sys.executable, "-m", SCRIPTS[name]]


def flags(options: Mapping[str, object]) -> list[str]:
    """The words of a command line: `--name value` for each."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
