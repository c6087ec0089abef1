"""Load, link, disk and memory; and whole machines, on the trees of `tests.sysfs.machines`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_client.watching import link
from edge_client.watching.load import WINDOW_S, CpuTime, OthersLoad, own_time_s, system_time
from edge_client.watching.machine import FRESH_S, LINK_S, Readings, free_disk
from edge_client.watching.reading import Reading
from tests.sysfs.machines import MACHINES, Tree, container, laptop, laptop_unplugged, machine


def seen(readings: Readings) -> tuple[object, ...]:
    """Battery %, on battery, °C, W, MB free: rounded."""
    numbers = (readings.battery, readings.temperature, readings.power, readings.memory_available)
    charge, heat, watts, free = (None if one.value is None else round(one.value, 1) for one in numbers)
    return charge, readings.on_battery.value, heat, watts, free


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("laptop", (80, False, 61, None, 9216)),
        ("laptop unplugged", (80, True, 61, 12.5, 9216)),
        ("laptop with a charge limit", (80, False, 61, None, 9216)),
        ("laptop with two batteries", (50, True, 61, 9, 9216)),
        ("desktop", (None, False, 58.2, None, 20480)),
        ("Jetson Orin NX, JetPack 5", (None, None, 49.6, 7.6, 3174.4)),
        ("Jetson Orin Nano, JetPack 6", (None, None, 52.3, 7.6, 3174.4)),
        ("Jetson AGX Orin, JetPack 5", (None, None, 49.6, 10.0, 3174.4)),
        ("Jetson Nano, JetPack 4", (None, None, 38, 3.2, 1536)),
        ("container", (None, None, None, None, 60)),
    ],
)
def test_machines_are_read_as_they_are(tmp_path: Path, name: str, expected: tuple[object, ...]) -> None:
    assert seen(machine(MACHINES[name](tmp_path)).read(0.0)) == expected


def test_every_machine_of_the_collection_is_read() -> None:
    marks = test_machines_are_read_as_they_are.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in marks[0].args[1]} == set(MACHINES)


def test_readings_are_used_again_for_half_a_second(tmp_path: Path) -> None:
    tree = laptop(tmp_path)
    watched = machine(tree)
    before = watched.read(0.0)
    laptop_unplugged(tmp_path)
    assert watched.read(FRESH_S - 0.1) is before
    assert watched.read(FRESH_S).on_battery.value is True


# CPU load of others.


def others(*times: tuple[float, float, float], every_s: float = WINDOW_S) -> list[Reading[float]]:
    """Readings where the machine's busy and whole time and our own time are as given, seconds."""
    now = iter(times)
    current = [next(now)]
    load = OthersLoad(lambda: CpuTime(current[0][0], current[0][1]), lambda: current[0][2])
    found = [load.read(0.0)]
    for index, one in enumerate(now, start=1):
        current[0] = one
        found.append(load.read(index * every_s))
    return found


def test_load_of_others_is_all_work_but_our_own() -> None:
    first, second = others((100, 1000, 50), (106, 1010, 53))
    assert first.value is None
    assert second.value == pytest.approx(30)


def test_our_own_work_is_no_load() -> None:
    assert others((100, 1000, 50), (110, 1010, 60))[1].value == 0


def test_a_counter_that_runs_behind_is_no_negative_load() -> None:
    assert others((100, 1000, 50), (109, 1010, 60))[1].value == 0


def test_a_load_is_a_mean_over_some_seconds() -> None:
    found = others((0, 0, 0), (5, 5, 0), (5, 10, 0), every_s=WINDOW_S / 2)
    assert [one.value for one in found] == [None, None, 50]


def test_a_machine_without_cpu_time_is_unknown(tmp_path: Path) -> None:
    assert system_time(tmp_path, "Linux") is None
    assert OthersLoad(lambda: None, lambda: 0.0).read(0.0).value is None


def test_niced_and_idle_time_is_nobodys_need(tmp_path: Path) -> None:
    tree = Tree(tmp_path).cpu(100, 5000, 50, 3000, iowait=400, irq=7)
    assert system_time(tree.proc, "Linux") == CpuTime(1.57, 85.57)


@pytest.mark.skipif(sys.platform != "linux", reason="niced time is told apart on Linux alone")
@pytest.mark.skipif(os.nice(0) > 0, reason="the tests were started with nice, so no child of theirs is without")
def test_our_own_time_counts_children_and_leaves_niced_time_out() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: sum(range(100000))\nprint('done', flush=True)\ninput()"
    spent = []
    for nice in (0, 5):
        before_s = own_time_s()
        child = subprocess.Popen(
            ["nice", "-n", str(nice), sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        spent.append(own_time_s() - before_s)
        child.communicate(b"\n")
    assert spent[0] >= 0.4
    assert spent[1] < spent[0] - 0.2


# The link.


@pytest.mark.parametrize(
    ("answer", "value"),
    [("yes", True), ("yes (guessed)", True), ("no", False), ("no (guessed)", False), ("unknown", None), ("", None)],
)
def test_what_network_manager_says_of_the_default_route_counts(tmp_path: Path, answer: str, value: bool | None) -> None:
    asked = []
    tree = Tree(tmp_path).route(("wwan0", 700), ("wlan0", 600))
    found = link.metered(tree.proc, lambda interface: asked.append(interface) or answer)  # type: ignore[func-returns-value]
    assert (found.value, asked) == (value, ["wlan0"])


def test_without_route_or_network_manager_the_link_is_unknown(tmp_path: Path) -> None:
    assert link.metered(tmp_path, lambda _: "yes").value is None
    found = link.metered(Tree(tmp_path).route(("eth0", 1)).proc, lambda _: None)
    assert found.value is None and "nmcli" in found.source


def program(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of nmcli."""
    folder.mkdir()
    (folder / "nmcli").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "nmcli").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_nmcli_is_asked_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", 'test "$*" = "--get-values GENERAL.METERED device show wlan0" && echo "yes"', monkeypatch)
    assert link.ask_network_manager("wlan0") == "yes"
    assert link.ask_network_manager("eth0") is None  # exit status 1
    monkeypatch.setenv("PATH", str(tmp_path))
    assert link.ask_network_manager("wlan0") is None


def test_the_link_is_asked_about_once_a_minute_and_not_for_a_broker_on_this_machine(tmp_path: Path) -> None:
    asked = []
    tree = laptop(tmp_path)

    def ask(interface: str) -> str:
        asked.append(interface)
        return "yes"

    watched = machine(tree, ask=ask)
    assert [watched.read(now_s).metered.value for now_s in (0.0, 10.0, LINK_S)] == [True] * 3
    assert len(asked) == 2
    assert machine(tree, ask=ask, broker="127.0.0.1").read(0.0).metered.value is False
    assert len(asked) == 2


# Disk.


def test_free_disk_is_that_of_the_folder_or_of_what_will_hold_it(tmp_path: Path) -> None:
    here, there = free_disk(tmp_path), free_disk(tmp_path / "not" / "yet")
    assert here.value == pytest.approx(there.value or 0, rel=0.1) and (here.value or 0) > 0
    assert there.source == f"disk of {tmp_path}"


def test_a_container_without_sysfs_is_read_without_a_word_too_much(tmp_path: Path) -> None:
    readings = machine(container(tmp_path)).read(0.0)
    assert str(readings.memory_available) == "60 MB (limit of control group /)"
    assert readings.metered.value is None and readings.cpu_others.value is None
