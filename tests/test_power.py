"""Watts from the best source there is, and joules, on the trees of `tests.sysfs.machines`."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.watching.energy import MAX_GAP_S, EnergyMeter
from edge_client.watching.power import PowerMeter, board, discharge
from edge_client.watching.reading import Reading
from tests.sysfs.machines import (
    Tree,
    battery,
    desktop,
    jetson_agx_orin,
    jetson_nano_4,
    jetson_orin_5,
    jetson_orin_6,
    laptop,
    laptop_unplugged,
    laptop_with_two_batteries,
    machine,
)


def test_rails_are_read_in_watts_and_not_counted_twice(tmp_path: Path) -> None:
    assert board(jetson_orin_6(tmp_path / "6").sys) == Reading(pytest.approx(7.568, abs=1e-3), "W", "rail VDD_IN")
    assert board(jetson_nano_4(tmp_path / "4").sys) == Reading(3.25, "W", "rail POM_5V_IN")
    agx = board(jetson_agx_orin(tmp_path / "agx").sys)
    assert agx == Reading(pytest.approx(10.0), "W", "rails VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0")
    assert board(desktop(tmp_path / "desktop").sys) is None


def test_rails_of_parts_alone_are_no_power_of_the_machine(tmp_path: Path) -> None:
    tree = jetson_agx_orin(tmp_path)
    (tree.sys / "class/hwmon/hwmon3/in2_label").write_text("NC\n")
    assert board(tree.sys) is None


def test_discharge_is_read_from_power_or_from_current_and_voltage(tmp_path: Path) -> None:
    assert discharge(laptop(tmp_path / "a").sys) is None
    both = discharge(laptop_with_two_batteries(tmp_path / "b").sys)
    assert both == Reading(9.0, "W", "discharge of BAT1")
    old = battery("Discharging", current_now="-1000000", voltage_now="11000000")
    assert discharge(Tree(tmp_path / "c").supplies({"BAT0": old}).sys) == Reading(11.0, "W", "discharge of BAT0")
    assert discharge(Tree(tmp_path / "d").supplies({"BAT0": battery("Discharging")}).sys) is None


def counter(tree: Tree, microjoules: int, number: int = 0) -> Tree:
    files = {"name": f"package-{number}", "energy_uj": str(microjoules)}
    return tree.add(f"sys/class/powercap/intel-rapl:{number}", files)


def test_energy_counters_of_the_processor_are_turned_into_power(tmp_path: Path) -> None:
    tree = counter(laptop(tmp_path), 10_000_000)
    meter = PowerMeter(tree.sys)
    assert meter.read(0.0).value is None
    counter(tree, 70_000_000)
    found = meter.read(4.0)
    assert found == Reading(15.0, "W", "RAPL package-0, the processor alone")
    counter(tree, 1_000)  # the counter began again
    assert meter.read(8.0) == found
    counter(tree, 8_001_000)
    assert meter.read(12.0).value == pytest.approx(2.0)


def test_two_sockets_are_added(tmp_path: Path) -> None:
    tree = counter(counter(laptop(tmp_path), 0), 0, number=1)
    meter = PowerMeter(tree.sys)
    meter.read(0.0)
    counter(counter(tree, 3_000_000), 5_000_000, number=1)
    assert meter.read(1.0).value == pytest.approx(8.0)


def test_a_counter_that_root_alone_may_read_is_unknown(tmp_path: Path) -> None:
    tree = laptop(tmp_path)
    (tree.sys / "class/powercap/intel-rapl:0/energy_uj").unlink()
    assert PowerMeter(tree.sys).read(0.0).value is None


def test_a_gpu_that_tells_its_power_adds_to_the_processors_and_not_to_the_machines(tmp_path: Path) -> None:
    gpu = Reading(70.5, "W", "NVML, the GPU alone")
    tree = counter(laptop(tmp_path / "laptop"), 0)
    meter = PowerMeter(tree.sys)
    assert meter.read(0.0, gpu) == gpu
    counter(tree, 10_000_000)
    assert meter.read(1.0, gpu) == Reading(80.5, "W", "RAPL package-0, the processor alone + NVML, the GPU alone")
    assert PowerMeter(laptop_unplugged(tmp_path / "b").sys).read(0.0, gpu).value == 12.5


def test_energy_is_power_over_time_where_power_is_known() -> None:
    meter = EnergyMeter()
    for now_s, watts in ((0.0, 10.0), (2.0, 20.0), (3.0, None), (4.0, 20.0), (5.0, 20.0)):
        meter.add(now_s, watts)
    assert (meter.total_j(), meter.known_s) == (50.0, 3.0)
    meter.add(5.0 + MAX_GAP_S + 1, 20.0)  # the machine slept
    assert meter.total_j() == 50.0


def test_energy_is_unknown_without_power() -> None:
    meter = EnergyMeter()
    assert meter.total_j() is None
    meter.add(0.0, None)
    meter.add(1.0, None)
    assert meter.total_j() is None


def test_a_jetson_adds_its_energy_up_while_it_is_read(tmp_path: Path) -> None:
    watched = machine(jetson_orin_5(tmp_path))
    for second in range(11):
        watched.read(float(second))
    assert watched.energy.total_j() == pytest.approx(75.68, abs=0.01)
