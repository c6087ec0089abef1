"""What the owner lets the agent take: a low priority, a part of the CPU time, so much memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import msgspec
import psutil

from edge_client.watching.reading import MB
from shared.errors import UserError

MAX_NICE = 19


class Caps(msgspec.Struct, frozen=True):
    """What the agent may take at most."""

    nice: int = 10  # added to the priority it was started with: 0 is none of it, 19 the most
    cpu_percent: float = 100.0  # of the time, work is done; the rest of it the agent rests between two steps
    memory_mb: float = 0.0  # that the agent may allocate, in 10^6 bytes (Linux); 0: no cap

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.nice <= MAX_NICE:
            raise UserError(f"nice is {self.nice}; allowed are 0 (as started) to {MAX_NICE} (lowest priority).")
        if not 1 <= self.cpu_percent <= 100:
            raise UserError(f"cpu_percent is {self.cpu_percent}; allowed are 1 to 100.")
        if self.memory_mb != 0 and not 500 <= self.memory_mb < 1e9:
            raise UserError(f"memory_mb is {self.memory_mb}; allowed are 0 (no cap) and 500 or more: torch takes that.")

    def rest_s(self, spent_s: float) -> float:
        """How long to rest after `spent_s` seconds of work."""
        return spent_s * (100.0 / self.cpu_percent - 1.0)


def apply(caps: Caps, say: Callable[[str], None]) -> None:
    """Set priority and memory cap of this process. Before any thread starts: on Linux each has a priority of its own.

    What this system does not have is said, and no error.
    """
    if caps.nice:
        _lower_priority(caps.nice, say)
    if caps.memory_mb:
        _limit_memory(int(caps.memory_mb * MB), say)


def _lower_priority(nice: int, say: Callable[[str], None]) -> None:
    try:
        if sys.platform == "win32":
            psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
        else:
            os.nice(nice)
    except (OSError, psutil.Error) as error:
        say(f"warning: the priority stays as it was: {error}")


def _limit_memory(most_bytes: int, say: Callable[[str], None]) -> None:
    """RLIMIT_DATA counts private pages that may be written: what is allocated, and weights mapped so from their files;
    not code, files mapped for reading alone, or the memory of a GPU.
    """
    if sys.platform != "linux":
        say("warning: memory_mb is kept on Linux only; here it does nothing.")
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most_bytes = most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard)
    if soft == resource.RLIM_INFINITY or soft > most_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, hard))
