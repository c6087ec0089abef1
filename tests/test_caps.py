"""What the agent may take: priority, memory, part of the time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_client.caps import Caps
from shared.errors import UserError
from tests.agents import small, steps_of
from tests.small_fleet import TURN_S, SmallFleet

ROOT = Path(__file__).parent.parent


def in_a_process(program: str) -> str:
    """Output of a Python program of its own: caps cannot be taken off again."""
    head = "from edge_client.caps import Caps, apply\n"
    done = subprocess.run([sys.executable, "-c", head + program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has classes and no nice values")
def test_priority_is_lowered_for_threads_to_come() -> None:
    program = (
        "import os, threading\nbefore = os.nice(0)\napply(Caps(nice=7), print)\n"
        "thread = threading.Thread(target=lambda: print(os.nice(0) - before))\nthread.start(); thread.join()"
    )
    assert in_a_process(program) == "7"
    assert in_a_process("import os\nbefore = os.nice(0)\napply(Caps(nice=0), print)\nprint(os.nice(0) - before)") == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_memory_above_the_cap_is_refused_and_the_program_lives_on() -> None:
    program = """
apply(Caps(memory_mb=500), print)
try:
    bytearray(600_000_000)
except MemoryError:
    print("refused")
print(len(bytearray(50_000_000)))
"""
    assert in_a_process(program).split() == ["refused", "50000000"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_a_tighter_limit_from_outside_stays() -> None:
    program = """
import resource
resource.setrlimit(resource.RLIMIT_DATA, (600_000_000, 700_000_000))
apply(Caps(memory_mb=2000), print)
print(resource.getrlimit(resource.RLIMIT_DATA))
"""
    assert in_a_process(program) == "(600000000, 700000000)"


@pytest.mark.parametrize(("percent", "rest_s"), [(100.0, 0.0), (50.0, 2.0), (20.0, 8.0)])
def test_rest_makes_work_the_part_of_time_that_is_allowed(percent: float, rest_s: float) -> None:
    assert Caps(cpu_percent=percent).rest_s(2.0) == pytest.approx(rest_s)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nice": 20}, "nice is 20; allowed are 0"),
        ({"nice": -1}, "nice is -1"),
        ({"cpu_percent": 0.0}, "cpu_percent is 0.0; allowed are 1 to 100"),
        ({"cpu_percent": float("nan")}, "cpu_percent is nan"),
        ({"memory_mb": 100.0}, "memory_mb is 100.0; allowed are 0"),
        ({"memory_mb": float("inf")}, "memory_mb is inf"),
    ],
)
def test_caps_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Caps(**settings)


# In the agent.


def test_agent_rests_after_each_step_and_still_hears(tmp_path: Path) -> None:
    fleet = small(tmp_path)
    rest_turns = 10
    agent = fleet.join("ann", rest_s=lambda spent_s: rest_turns * TURN_S)
    fleet.run_until(lambda: steps_of(agent) == 2)
    for _ in range(rest_turns - 1):
        fleet.turn()
        assert steps_of(agent) == 2
    fleet.turn()
    fleet.turn()
    assert steps_of(agent) == 3
    agent.leave()
    fleet.turn()
    assert agent.ending is not None


def rounds(fleet: SmallFleet, folder: Path, watts: float | None) -> list[dict[str, Any]]:
    """The metrics of each round, on a machine that takes `watts`."""
    file = folder / "metrics.jsonl"
    fleet.join("ann", energy_j=lambda: None if watts is None else watts * fleet.now_s, metrics=file)
    fleet.run_to_the_end()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_energy_of_the_rounds_adds_up_to_that_of_the_run(tmp_path: Path) -> None:
    fleet = small(tmp_path)
    began_ms = fleet.unix_ms()
    found = rounds(fleet, tmp_path, watts=10.0)
    assert all(one["energy_j"] > 0 for one in found if one["steps"])
    taken_s = (found[-1]["ended_at_ms"] - began_ms) / 1000
    assert sum(one["energy_j"] for one in found) == pytest.approx(10.0 * taken_s)


def test_energy_is_null_where_power_is_unknown(tmp_path: Path) -> None:
    assert {one["energy_j"] for one in rounds(small(tmp_path), tmp_path, watts=None)} == {None}
