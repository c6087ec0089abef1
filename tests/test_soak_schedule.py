"""What a person can ask of a soak, and the schedule of kills that comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import UserError
from tools.soak import SoakSettings
from tools.soak_schedule import AGGREGATOR, BROKER, Cut, Kill, schedule
from tools.soak_world import AGENTS


def test_more_kills_than_seconds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--kills is 61; allowed: 0 to one a second, 60\."):
        SoakSettings(tmp_path, 1, 1.0, 61)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_minutes_are_refused(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(UserError, match="--minutes is"):
        SoakSettings(tmp_path, 1, minutes, 0)


def test_a_seed_makes_the_same_schedule_again_and_another_seed_another_one() -> None:
    first = schedule(7, 100.0, 30, AGENTS)
    assert schedule(7, 100.0, 30, AGENTS) == first
    assert schedule(8, 100.0, 30, AGENTS) != first


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_has_every_kill_in_order_and_within_its_time(seed: int) -> None:
    happenings = schedule(seed, 100.0, 30, AGENTS)
    kills = [happening for happening in happenings if isinstance(happening, Kill)]
    assert len(kills) == 30
    assert {kill.target for kill in kills} == {AGGREGATOR, BROKER, *AGENTS}
    assert any(isinstance(happening, Cut) for happening in happenings)
    times = [happening.at_s for happening in happenings]
    assert times == sorted(times)
    assert times[0] >= 0.0
    assert times[-1] <= 100.0
