"""Every reason to pause, from a machine's files to the sentence, on the trees of `tests.sysfs.machines`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from edge_client.gate import Gate, moment_now
from edge_client.policy import Limits, Moment
from tests.sysfs.machines import (
    MAINS,
    NO_MAINS,
    Tree,
    battery,
    container,
    desktop,
    jetson_orin_5,
    jetson_orin_6,
    laptop,
    laptop_unplugged,
    laptop_with_a_charge_limit,
    laptop_with_two_batteries,
    machine,
)

Change = Callable[[Tree], object]


class Watched:
    """A gate over a machine of files, and a clock that is ours."""

    def __init__(self, tree: Tree, limits: Limits | None = None, *, device: str = "cpu") -> None:
        self.now_s = 0.0
        self.local = datetime(2026, 3, 1, 23, 0)
        self.link = "no"
        watched = machine(tree, device=device, ask=lambda interface: self.link)
        limits = limits or Limits(disk_floor_mb=1)
        self._gate = Gate(limits, watched.read, lambda: Moment(self.now_s, self.local))

    def after(self, seconds: float) -> str:
        """What the gate says then; "" where work may go on."""
        self.now_s += seconds
        return self._gate() or ""


@pytest.mark.parametrize("build", [laptop, laptop_with_a_charge_limit, desktop, jetson_orin_5, jetson_orin_6])
def test_a_healthy_machine_works(tmp_path: Path, build: Callable[[Path], Tree]) -> None:
    assert Watched(build(tmp_path)).after(0) == ""


@pytest.mark.parametrize("build", [laptop_unplugged, laptop_with_two_batteries])
def test_a_machine_on_battery_waits_for_mains(tmp_path: Path, build: Callable[[Path], Tree]) -> None:
    tree = build(tmp_path)
    watched = Watched(tree)
    assert watched.after(0).startswith("The machine runs on its battery at ")
    tree.supplies({"AC": MAINS})
    assert watched.after(1) == ""


def test_a_mouse_that_runs_low_does_not_stop_a_desktop(tmp_path: Path) -> None:
    tree = desktop(tmp_path)
    watched = Watched(tree)
    tree.supplies({"hidpp_battery_0": {"capacity": "3"}})
    assert watched.after(1) == ""


def test_a_low_battery_waits_for_charge_also_on_mains(tmp_path: Path) -> None:
    tree = laptop(tmp_path).supplies({"BAT0": {"energy_now": "5000000"}})
    watched = Watched(tree)
    assert watched.after(0) == "The battery is at 10%, under the floor of 20%. Work goes on at 25%."
    tree.supplies({"BAT0": {"energy_now": "12000000"}})
    assert watched.after(1) != ""
    tree.supplies({"BAT0": {"energy_now": "12500000"}})
    assert watched.after(1) == ""


@pytest.mark.parametrize(
    ("build", "sensor", "name"),
    [
        (laptop, "sys/class/thermal/thermal_zone1/temp", "x86_pkg_temp"),
        (desktop, "sys/class/hwmon/hwmon2/temp1_input", "k10temp Tctl"),
        (jetson_orin_5, "sys/class/thermal/thermal_zone2/temp", "tj-therm"),
        (jetson_orin_6, "sys/class/thermal/thermal_zone3/temp", "tj-thermal"),
    ],
)
def test_a_hot_machine_waits_until_it_is_cool(
    tmp_path: Path, build: Callable[[Path], Tree], sensor: str, name: str
) -> None:
    tree = build(tmp_path)
    watched = Watched(tree)
    assert watched.after(0) == ""
    tree.add(".", {sensor: "91000"})
    assert watched.after(1) == f"The machine is at 91 °C ({name}), above the limit of 85 °C. Work goes on at 75 °C."
    tree.add(".", {sensor: "76000"})
    assert watched.after(1) != ""
    tree.add(".", {sensor: "75000"})
    assert watched.after(1) == ""


def test_little_memory_on_a_jetson_is_that_of_cpu_and_gpu(tmp_path: Path) -> None:
    tree = jetson_orin_6(tmp_path)
    watched = Watched(tree, device="cuda")
    assert watched.after(0) == ""
    tree.memory(7_600_000, 400_000)
    assert watched.after(1) == "Free memory is 410 MB (system), under the floor of 500 MB. Work goes on at 550 MB."
    tree.memory(7_600_000, 600_000)
    assert watched.after(1) == ""


def test_a_containers_own_limit_is_the_memory_that_counts(tmp_path: Path) -> None:
    tree = container(tmp_path)
    watched = Watched(tree)
    assert "Free memory is 60 MB (limit of control group /)" in watched.after(0)
    tree.add("sys/fs/cgroup", {"memory.current": "300000000"})
    assert watched.after(1) == ""


def test_little_disk_pauses(tmp_path: Path) -> None:
    limits = Limits(disk_floor_mb=1e12)
    assert "under the floor of 1000000000000 MB." in Watched(laptop(tmp_path), limits).after(0)


def test_hours_are_those_of_the_wall_clock(tmp_path: Path) -> None:
    watched = Watched(laptop(tmp_path), Limits(disk_floor_mb=1, hours="22:00-07:00"))
    assert watched.after(0) == ""
    watched.local = datetime(2026, 3, 2, 7, 0)
    assert watched.after(1) == "It is 07:00, outside the allowed hours 22:00-07:00. Work goes on at 22:00."
    watched.local = datetime(2026, 3, 2, 22, 0)
    assert watched.after(1) == ""


def test_a_telephones_hotspot_pauses_until_there_is_another_link(tmp_path: Path) -> None:
    tree = laptop(tmp_path)
    watched = Watched(tree)
    watched.link = "yes (guessed)"
    assert watched.after(0) == (
        "The network link costs money (NetworkManager says 'yes (guessed)' of wlan0). "
        "Work goes on on another link, or with pause_on_metered = false."
    )
    watched.link = "no"
    assert watched.after(60) == ""


def test_a_program_that_needs_the_cpu_gets_it_and_three_minutes_more(tmp_path: Path) -> None:
    tree = desktop(tmp_path).cpu(1000, 0, 500, 8500)
    watched = Watched(tree)
    assert watched.after(0) == ""
    tree.cpu(1000 + 600, 900, 500 + 200, 8500 + 300)  # 800 of 2000 ticks, and 900 of niced programs
    assert watched.after(5).startswith("Other programs use 40% of the CPU, and 25% is the limit.")
    tree.cpu(1600, 900, 700, 8800 + 17_500)
    assert watched.after(175) != ""
    tree.cpu(1600, 900, 700, 26_300 + 500)
    assert watched.after(5) == ""


def test_niced_work_of_others_is_no_reason_to_stop(tmp_path: Path) -> None:
    tree = desktop(tmp_path).cpu(1000, 0, 500, 8500)
    watched = Watched(tree)
    watched.after(0)
    tree.cpu(1000, 2000, 500, 8500)
    assert watched.after(5) == ""


def test_a_program_that_needs_the_jetsons_gpu_gets_it(tmp_path: Path) -> None:
    tree = jetson_orin_5(tmp_path)
    said = "Other programs use 31% of the GPU, and 25% is the limit."
    watched = Watched(tree, device="cuda")
    assert watched.after(0).startswith(said)
    tree.add("sys/class/devfreq/17000000.ga10b", {"device/load": "0"})
    assert watched.after(100).startswith(said)
    assert watched.after(80) == ""
    assert Watched(tree.add("sys/class/devfreq/17000000.ga10b", {"device/load": "900"})).after(0) == ""


def test_a_battery_that_comes_and_goes_is_followed(tmp_path: Path) -> None:
    tree = desktop(tmp_path)
    watched = Watched(tree)
    assert watched.after(0) == ""
    tree.supplies({"AC": NO_MAINS, "BAT0": battery("Discharging", capacity="60")})
    assert "on its battery at 60%" in watched.after(1)


def test_the_machines_own_clocks_go_forward() -> None:
    before, after = moment_now(), moment_now()
    assert before.now_s <= after.now_s
    assert abs((after.local - datetime.now()).total_seconds()) < 60
