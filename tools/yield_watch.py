"""What an agent does, seen from outside: its log, its CPU time from /proc, and the file that grows with every step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from edge_client.kept_steps import RECORD_BYTES
from edge_client.watching.load import TICKS_PER_S, system_time
from edge_client.watching.reading import MB

PAUSED, WORKING = "paused: ", "working again"


@dataclass(frozen=True)
class Steps:
    """The file of kept steps: which work it belongs to, and how many reports it has."""

    work: bytes = b""
    done: int = 0


@dataclass(frozen=True)
class Glance:
    """An agent at one time."""

    at_s: float  # monotonic
    reason: str | None  # why it is paused, None: it works
    cpu_s: float  # that it took since its start, all threads, also in the kernel
    busy_s: float  # un-niced CPU time of the whole machine
    free_mb: float  # memory of the whole machine that is available, 10^6 bytes
    steps: Steps


class Watch:
    """Glances at one agent. `steps`: its file of kept steps."""

    def __init__(self, pid: int, log: Path, steps: Path) -> None:
        self._pid, self._log, self._path = pid, log, steps
        self._read = 0
        self._rest = b""
        self.reason: str | None = None

    def glance(self, now_s: float) -> Glance:
        """The agent now. The log is read before the steps: none may come after it says that it pauses."""
        self._follow()
        machine = system_time(Path("/proc"), "Linux")
        free_mb = psutil.virtual_memory().available / MB
        return Glance(now_s, self.reason, self.cpu_s(), machine.busy_s if machine else 0.0, free_mb, self._steps())

    def cpu_s(self) -> float:
        """utime and stime of /proc/PID/stat."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def _follow(self) -> None:
        with self._log.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in (line.decode(errors="replace") for line in lines):
            if PAUSED in line:
                self.reason = line.partition(PAUSED)[2]
            elif line.endswith(WORKING):
                self.reason = None

    def _steps(self) -> Steps:
        if not self._path.exists():
            return Steps()
        with self._path.open("rb") as file:
            work = file.readline() + file.readline()
            return Steps(work, (os.fstat(file.fileno()).st_size - len(work)) // RECORD_BYTES)
