"""Every reason to pause, from the files of a machine to what people read: in the status, the log and the presence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from edge_client.agent import Agent
from edge_client.board import LOG, Board
from edge_client.gate import Gate
from edge_client.logbook import Logbook, tail
from edge_client.policy import Cause, Limits, Moment, Wish
from edge_client.telling import Teller, read_status
from tests.agents import presence_of, small, steps_of
from tests.small_fleet import SmallFleet
from tests.sysfs.machines import (
    NO_MAINS,
    Tree,
    battery,
    desktop,
    jetson_orin_5,
    jetson_orin_6,
    laptop,
    machine,
)

NOON = datetime(2026, 3, 1, 12, 0)


class Scene:
    """An agent at work on the machine of a tree."""

    def __init__(self, folder: Path, tree: Tree, reason: Reason) -> None:
        self.tree, self.link, self.local, self.free_mb = tree, "no", NOON, 9000.0
        limits = reason.limits
        if reason.device == "cuda":
            gpu_load(self, 0)
        tree.cpu(1000, 0, 500, 8500)
        self.fleet: SmallFleet = small(folder / "run", deadline_s=10_000.0, local_steps=2000)
        self.board = Board(folder / "agent")
        watched = machine(tree, device=reason.device, ask=lambda interface: self.link)
        self.agent: Agent = self.fleet.join(
            "ann",
            gate=Gate(limits, watched.read, lambda: Moment(self.fleet.now_s, self.local), self.board.wish),
            log=Logbook(self.board.folder / LOG).add,
            teller=Teller(self.board, limits, watched.read, lambda line: None, 0),
        )

    def pass_time(self, seconds: float) -> None:
        until_s = self.fleet.now_s + seconds
        while self.fleet.now_s < until_s:
            self.fleet.turn()


@dataclass(frozen=True)
class Reason:
    build: Callable[[Path], Tree]
    happens: Callable[[Scene], object]
    ends: Callable[[Scene], object]
    said: str
    limits: Limits = Limits()  # noqa: RUF009
    device: str = "cpu"
    takes_s: float = 6.0  # loads are means over some seconds


def gpu_load(scene: Scene, per_mille: int) -> None:
    scene.tree.add("sys/class/devfreq/17000000.ga10b", {"device/load": str(per_mille)})


REASONS: dict[Cause, Reason] = {
    "memory": Reason(
        jetson_orin_6,
        lambda scene: scene.tree.memory(7_600_000, 400_000),
        lambda scene: scene.tree.memory(7_600_000, 3_000_000),
        "Free memory is 410 MB (system), under the floor of 500 MB. Work goes on at 550 MB.",
        device="cuda",
    ),
    "disk": Reason(
        laptop,
        lambda scene: setattr(scene, "free_mb", 412.0),
        lambda scene: setattr(scene, "free_mb", 9000.0),
        "Free disk space is 412 MB, under the floor of 500 MB. Work goes on at 550 MB.",
        Limits(),
    ),
    "heat": Reason(
        desktop,
        lambda scene: scene.tree.add(".", {"sys/class/hwmon/hwmon2/temp1_input": "91000"}),
        lambda scene: scene.tree.add(".", {"sys/class/hwmon/hwmon2/temp1_input": "60000"}),
        "The machine is at 91 °C (k10temp Tctl), above the limit of 85 °C. Work goes on at 75 °C.",
    ),
    "mains": Reason(
        laptop,
        lambda scene: scene.tree.supplies({"AC": NO_MAINS, "BAT0": battery("Discharging")}),
        lambda scene: laptop(scene.tree.root),
        "The machine runs on its battery at 80% (BAT0 is discharging). "
        "Work goes on when it is plugged in, or with pause_on_battery = false.",
    ),
    "charge": Reason(
        laptop,
        lambda scene: scene.tree.supplies({"BAT0": {"energy_now": "5000000"}}),
        lambda scene: scene.tree.supplies({"BAT0": {"energy_now": "12500000"}}),
        "The battery is at 10%, under the floor of 20%. Work goes on at 25%.",
    ),
    "hours": Reason(
        laptop,
        lambda scene: setattr(scene, "local", NOON.replace(hour=17)),
        lambda scene: setattr(scene, "local", NOON.replace(hour=9)),
        "It is 17:00, outside the allowed hours 9:00-17:00. Work goes on at 09:00.",
        Limits(hours="9:00-17:00"),
    ),
    "metered": Reason(
        laptop,
        lambda scene: setattr(scene, "link", "yes (guessed)"),
        lambda scene: setattr(scene, "link", "no"),
        "The network link costs money (NetworkManager says 'yes (guessed)' of wlan0). "
        "Work goes on on another link, or with pause_on_metered = false.",
        takes_s=61.0,
    ),
    "cpu": Reason(
        desktop,
        lambda scene: scene.tree.cpu(1000 + 600, 900, 500 + 200, 8500 + 300),
        lambda scene: scene.tree.cpu(1600, 900, 700, 8800 + 100_000),
        "Other programs use 40% of the CPU, and 25% is the limit. "
        "Work goes on when they have stayed under it for 30 seconds.",
        Limits(quiet_s=30),
        takes_s=36.0,
    ),
    "gpu": Reason(
        jetson_orin_5,
        lambda scene: gpu_load(scene, 900),
        lambda scene: gpu_load(scene, 0),
        "Other programs use 90% of the GPU, and 25% is the limit. "
        "Work goes on when they have stayed under it for 30 seconds.",
        Limits(quiet_s=30),
        device="cuda",
        takes_s=36.0,
    ),
    "owner": Reason(
        laptop,
        lambda scene: scene.board.want(Wish("pause", NOON.timestamp(), NOON.timestamp() + 5400)),
        lambda scene: scene.board.want(None),
        "Its owner paused it at 12:00. Work goes on at 13:30, or with kseed-edge resume.",
        Limits(enabled=False),
    ),
}


def test_every_cause_has_its_scene() -> None:
    assert set(REASONS) == set(get_args(Cause))


@pytest.mark.parametrize("cause", REASONS)
def test_a_pause_shows_in_status_log_and_presence_and_ends(
    tmp_path: Path, cause: Cause, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = REASONS[cause]
    scene = Scene(tmp_path, reason.build(tmp_path / "machine"), reason)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=scene.free_mb * 1e6))
    scene.fleet.run_until(lambda: steps_of(scene.agent) > 100)
    reason.happens(scene)
    scene.pass_time(reason.takes_s)
    steps = steps_of(scene.agent)
    scene.pass_time(2.0)
    status = read_status(scene.board)
    assert status is not None
    assert (status.state, status.text) == ("paused", f"paused: {reason.said}")
    assert tail(scene.board.folder / LOG, 1)[0].endswith(f" paused: {reason.said}")
    assert presence_of(scene.fleet, "ann").note == reason.said[:256]
    assert steps_of(scene.agent) == steps
    reason.ends(scene)
    scene.pass_time(reason.takes_s)
    assert tail(scene.board.folder / LOG, 1)[0].endswith(" working again")
    assert presence_of(scene.fleet, "ann").note == ""
    assert steps_of(scene.agent) > steps
    status = read_status(scene.board)
    assert status is not None and status.state == "working"


def test_a_pause_that_its_owner_gave_an_end_is_over_then(tmp_path: Path) -> None:
    reason = REASONS["owner"]
    scene = Scene(tmp_path, laptop(tmp_path / "machine"), reason)
    reason.happens(scene)
    scene.fleet.run_until(lambda: scene.agent.state.pause is not None)
    scene.local = NOON.replace(hour=13, minute=29)
    scene.pass_time(1.0)
    assert scene.agent.state.pause is not None
    scene.local = NOON.replace(hour=13, minute=30)
    scene.pass_time(1.0)
    assert scene.agent.state.pause is None
