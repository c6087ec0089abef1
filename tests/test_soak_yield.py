"""`kseed soak-yield`: what its glances at an agent come to, that each violation is found, and a short one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.errors import UserError
from tests.brokers import needs_mosquitto
from tools.soak_yield import YieldSettings
from tools.yield_check import Cycle, Seen, measure, violations
from tools.yield_loads import can_unplug
from tools.yield_report import YieldReport, yield_text
from tools.yield_schedule import Kind, Load, schedule
from tools.yield_watch import Glance, Steps, Watch

ROOT = Path(__file__).parents[1]
LIMIT, CORES, STEPS, QUIET_S = 25.0, 2, 1000, 20.0
BEGAN_S, ENDED_S = 20.0, 50.0
CPU = "Other programs use 97% of the CPU, and 25% is the limit."

# --- a cycle, made of glances every 0.1 s: the agent works at 90% of a core and takes ten steps a second


def glances(
    *, pauses: float = 27.0, works: float = 76.0, paused_share: float = 0.01, late_steps: int = 0, loses: bool = False,
    others: float = 0.0, reason: str = CPU,
) -> Iterator[Glance]:  # fmt: skip
    cpu_s = busy_s = 0.0
    done, work = 0, b"round 3"
    for tick in range(900):
        at_s = tick / 10
        is_paused = pauses <= at_s < works
        busy_s += 0.1 * CORES * (0.9 if BEGAN_S <= at_s < ENDED_S else others)
        cpu_s += 0.1 * (paused_share if is_paused else 0.9)
        if loses and at_s == works:
            done, work = 0, b"round 4"
        done += not is_paused or (tick < pauses * 10 + 1 + late_steps and at_s > pauses)
        yield Glance(at_s, reason if is_paused else None, cpu_s, busy_s, 8000.0, Steps(work, done))


def cycle_of(*, kind: Kind = "cpu", **how: Any) -> Cycle:
    seen = Seen(Load(kind, BEGAN_S, ENDED_S - BEGAN_S), LIMIT, CORES, STEPS, 500.0)
    seen.began_s, seen.ended_s = BEGAN_S, ENDED_S
    seen.glances += glances(**how)
    return measure(seen)


def test_a_cycle_is_measured() -> None:
    cycle = cycle_of()
    assert (cycle.share_before, cycle.share_paused, cycle.share_after) == pytest.approx((90.0, 1.0, 90.0), abs=0.1)
    assert (cycle.yielded_s, cycle.resumed_s) == pytest.approx((7.0, 26.0), abs=0.11)
    assert (cycle.steps_paused, cycle.is_kept, cycle.is_disturbed) == (0, True, False)
    assert cycle.steps_late == 0
    assert violations(cycle, QUIET_S) == []


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"pauses": 99.0}, "cpu: the agent did not pause within 30 s"),
        ({"pauses": 36.0}, "cpu: it finished 14 steps after 14.5 s of the load; allowed: 1, the one under way"),
        ({"late_steps": 3}, "cpu: it took steps 3 times while it said that it was paused"),
        ({"paused_share": 0.2}, "cpu: paused it took 20.0% of a core; allowed: 10%"),
        ({"loses": True}, "cpu: the steps of the round were lost in the pause"),
        ({"works": 99.0}, "cpu: it did not work again"),
        ({"works": 86.0}, "cpu: it worked again after 36.0 s; allowed: 35.5 s"),
        ({"works": 60.0}, "cpu: it worked again after 10.0 s, before 20 s of quiet"),
        ({"reason": "Free memory is 400 MB"}, "cpu: the agent did not pause within 30 s"),
    ],
)
def test_each_violation_is_found(how: dict[str, Any], said: str) -> None:
    assert violations(cycle_of(**how), QUIET_S) == [said]


def test_the_step_under_way_may_take_as_long_as_the_load_makes_it() -> None:
    steps = [Steps(b"round 3", done) for done in (3, 4, 5)]

    def cycle(last: Steps) -> Cycle:
        seen = Seen(Load("cpu", BEGAN_S, 30.0), LIMIT, CORES, STEPS, 500.0, began_s=BEGAN_S, ended_s=60.0)
        for tick in range(900):
            at_s = tick / 10
            done = steps[0] if at_s < 10 else steps[1] if at_s < 45 else last
            seen.glances.append(Glance(at_s, CPU if 50 <= at_s < 82 else None, at_s * 0.01, at_s, 8000.0, done))
        return measure(seen)

    assert (cycle(steps[2]).steps_late, cycle(Steps(b"round 3", 6)).steps_late) == (1, 2)
    assert not [one for one in violations(cycle(steps[2]), QUIET_S) if "under way" in one]
    assert [one for one in violations(cycle(Steps(b"round 3", 6)), QUIET_S) if "under way" in one]


def test_when_others_need_the_cpu_too_the_time_of_resuming_says_nothing() -> None:
    cycle = cycle_of(works=86.0, others=0.3)
    assert cycle.is_disturbed
    assert violations(cycle, QUIET_S) == []


def test_a_round_that_was_complete_when_the_pause_came_has_nothing_to_lose() -> None:
    seen = Seen(Load("cpu", BEGAN_S, ENDED_S - BEGAN_S), LIMIT, CORES, 200, 500.0)
    seen.began_s, seen.ended_s = BEGAN_S, ENDED_S
    seen.glances += glances(loses=True)
    assert measure(seen).is_kept is None


def test_a_load_of_memory_begins_when_the_floor_is_passed() -> None:
    seen = Seen(Load("memory", BEGAN_S, ENDED_S - BEGAN_S), LIMIT, CORES, STEPS, 500.0)
    seen.began_s, seen.ended_s = BEGAN_S, ENDED_S
    told = glances(pauses=26.0, works=51.0, reason="Free memory is 400 MB (system)")
    seen.glances += [Glance(g.at_s, g.reason, g.cpu_s, 0.0, 400.0 if g.at_s > 25.0 else 900.0, g.steps) for g in told]
    cycle = measure(seen)
    assert cycle.yielded_s == pytest.approx(0.9)
    assert violations(cycle, QUIET_S) == []


# --- the agent, seen from outside


def test_log_and_steps_are_followed(tmp_path: Path) -> None:
    log, steps = tmp_path / "log", tmp_path / "steps"
    log.write_bytes(b"joined\n")
    watch = Watch(os.getpid(), log, steps)
    first = watch.glance(0.0)
    assert (first.reason, first.steps) == (None, Steps())
    assert first.cpu_s > 0
    steps.write_bytes(b"{}\nsum\n" + bytes(28 * 3 + 5))
    with log.open("ab") as file:
        file.write(b"paused: Free memory is 4 MB.\nwor")
        file.flush()
        assert watch.glance(1.0).reason == "Free memory is 4 MB."
        file.write(b"king again\n")
        file.flush()
        second = watch.glance(2.0)
    assert (second.reason, second.steps) == (None, Steps(b"{}\nsum\n", 3))


# --- schedule, settings, text


def test_a_seed_makes_the_same_loads_again_and_every_kind_comes() -> None:
    kinds: tuple[Kind, ...] = ("cpu", "memory", "mains")
    loads = schedule(7, 1800.0, QUIET_S, kinds)
    assert schedule(7, 1800.0, QUIET_S, kinds) == loads
    assert schedule(8, 1800.0, QUIET_S, kinds) != loads
    assert len(loads) > 20
    assert {load.kind for load in schedule(7, 1.0, QUIET_S, kinds)} == set(kinds)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minutes": 0.0}, "--minutes is 0"),
        ({"quiet_s": -1.0}, "--quiet is -1"),
        ({"others_percent": 101.0}, "--others-percent is 101"),
        ({"kinds": ("rain",)}, "--load is 'rain'; allowed: cpu, memory, mains."),
        ({"model": Path("nowhere")}, "--model is 'nowhere'"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        YieldSettings(**{"out": tmp_path, "seed": 1, "minutes": 1.0, "quiet_s": 5.0, "others_percent": 25.0, **change})


def test_the_summary_has_a_line_per_load_and_ends_with_the_verdict() -> None:
    def text(cycles: list[Cycle], wrong: list[str]) -> str:
        return yield_text(
            YieldReport(
                seed=3, minutes=1.0, quiet_s=20.0, others_percent=25.0, cycles=cycles, rounds=4, violations=wrong
            )
        )

    fine = text([cycle_of(), cycle_of(pauses=29.0)], [])
    assert "cpu          2" in fine
    assert "8.0 (9.0)" in fine
    assert fine.endswith("each with all its steps\nPASSED")
    assert text([cycle_of()], ["cpu: late"]).endswith("VIOLATED  cpu: late\nFAILED with seed 3: cpu: late")


# --- a short one: what does not depend on who else uses the CPU


@pytest.mark.soak
@pytest.mark.broker
@needs_mosquitto
@pytest.mark.skipif(not can_unplug(), reason="only root may show a process another /sys/class/power_supply")
def test_an_agent_at_work_stops_when_the_plug_is_pulled_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--load", "mains", "--minutes", "0.5", "--others-percent", "100", "--quiet", "1", "--out", str(out))
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "soak-yield", *words], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    report = msgspec.json.decode((out / "report.json").read_bytes(), type=YieldReport)
    assert {cycle.kind for cycle in report.cycles} == {"mains"}
    assert report.violations == []
    assert any(cycle.is_kept for cycle in report.cycles)
