"""Real loads: programs that burn the CPU, one that takes memory, and a mains plug that is pulled out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from edge_client.watching.reading import MB
from tools.yield_schedule import Kind

SUPPLIES = Path("/sys/class/power_supply")
_BURN = "while True: sum(range(100_000))"
# Bit by bit, so that this is a load of the memory and not of the CPU, until so little is left (bytes).
_TAKE = """
import sys, time
taken = []
while True:
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    if free > int(sys.argv[1]):
        taken.append(b"1" * 32_000_000)
    time.sleep(0.05)
"""
_FLOOR, _BELOW = 0.8, 0.97  # of what is free beside the agent, which works again at 1.1 times its floor; of the floor
_BATTERY = {"type": "Battery", "present": "1", "energy_now": "40000000", "energy_full": "50000000"}


class Loads:
    """The loads of one soak. `folder` holds the supplies that the agent sees instead of the machine's."""

    def __init__(self, folder: Path, agent_mb: float) -> None:
        """agent_mb: what the agent takes at most, 10^6 bytes."""
        self._folder = folder
        self.memory_floor_mb = _FLOOR * (psutil.virtual_memory().available / MB - agent_mb)
        for name, facts in (("AC", {"type": "Mains"}), ("BAT0", _BATTERY)):
            (folder / name).mkdir(parents=True)
            for key, value in facts.items():
                (folder / name / key).write_text(f"{value}\n")
        self._plug(True)

    def seen_by(self, command: Sequence[str]) -> list[str]:
        """`command` in a mount namespace of its own, where these supplies are the machine's."""
        mount = f'mount --bind "$0" {SUPPLIES} && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mount, str(self._folder), *command]

    def _plug(self, is_plugged: bool) -> None:
        (self._folder / "AC" / "online").write_text(f"{int(is_plugged)}\n")
        (self._folder / "BAT0" / "status").write_text("Charging\n" if is_plugged else "Discharging\n")

    @contextmanager
    def on(self, kind: Kind) -> Iterator[None]:
        """While it lasts, the load is there."""
        if kind == "mains":
            self._plug(False)
            try:
                yield
            finally:
                self._plug(True)
            return
        words = [_BURN] if kind == "cpu" else [_TAKE, str(int(_BELOW * self.memory_floor_mb * MB))]
        count = os.cpu_count() or 1 if kind == "cpu" else 1
        running = [subprocess.Popen([sys.executable, "-c", *words]) for _ in range(count)]
        try:
            yield
        finally:
            for process in running:
                process.kill()
                process.wait()


def can_unplug() -> bool:
    """Whether a process may be shown other supplies than the machine's: root on Linux may."""
    if not SUPPLIES.is_dir() or os.geteuid() != 0:
        return False
    tried = subprocess.run(["unshare", "--mount", "mount", "--bind", "/", "/mnt"], capture_output=True)
    return tried.returncode == 0
