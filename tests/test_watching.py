"""Load, power, energy, link and GPU; and whole machines, on the trees of `tests.sysfs.machines`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_client.watching import link
from edge_client.watching.energy import MAX_GAP_S, EnergyMeter
from edge_client.watching.gpu import JetsonGpu, NoGpu, NvmlGpu, find_gpu
from edge_client.watching.load import WINDOW_S, CpuTime, OthersLoad, own_time_s, system_time
from edge_client.watching.machine import FRESH_S, LINK_S, Machine, Readings, free_disk
from edge_client.watching.memory import is_unified
from edge_client.watching.power import PowerMeter, board, discharge
from edge_client.watching.reading import Reading
from tests.sysfs.machines import (
    MACHINES,
    Tree,
    battery,
    container,
    desktop,
    jetson_agx_orin,
    jetson_nano_4,
    jetson_orin_5,
    jetson_orin_6,
    laptop,
    laptop_unplugged,
    laptop_with_two_batteries,
)


def machine(tree: Tree, **settings: Any) -> Machine:
    settings = {"ask": lambda interface: None, "own_s": lambda: 0.0, **settings}
    return Machine(sys_root=tree.sys, proc_root=tree.proc, system="Linux", disk=tree.root, **settings)


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


# Power and energy.


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


# The GPU.


def test_a_jetson_has_one_memory_and_its_load_is_that_of_others_while_we_are_not_there(tmp_path: Path) -> None:
    tree = jetson_orin_5(tmp_path)
    readings = machine(tree, device="cuda").read(0.0)
    assert readings.gpu_memory_available.value == readings.memory_available.value
    assert readings.gpu_others == Reading(31.2, "%", "load of 17000000.ga10b")
    at_work = JetsonGpu(tree.sys, lambda: True).read({1}, readings.memory_available)
    assert at_work.others.value is None and "does not tell" in at_work.others.source
    assert is_unified(tree.proc) and not is_unified(desktop(tmp_path / "desktop").proc)


def test_the_gpu_is_not_watched_by_an_agent_that_works_on_the_cpu(tmp_path: Path) -> None:
    readings = machine(desktop(tmp_path)).read(0.0)
    assert str(readings.gpu_others) == "unknown (this agent works on cpu)"


class NvmlError(Exception):
    """As `pynvml.NVMLError`."""


class NotFound(NvmlError):
    """As `pynvml.NVMLError_NotFound`."""


class Nvml:
    """Answers as `pynvml` does (nvidia-ml-py 12): the driver itself needs a GPU. What is None is NotSupported."""

    NVMLError, NVMLError_NotFound, NVML_TEMPERATURE_GPU = NvmlError, NotFound, 0

    def __init__(
        self, *, gpu: int | None = None, pids: tuple[int, ...] = (), samples: Any = (), free: int | None = None
    ):
        self.gpu, self.pids, self.samples, self.free = gpu, pids, samples, free
        self.milliwatts: int | None = None
        self.handles: list[object] = []
        self.since: list[int] = []

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.handles.append(index)
        return "gpu"

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.handles.append(name)
        return "gpu"

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> Any:
        return SimpleNamespace(free=self._supported(self.free))

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        raise NvmlError("Not Supported")

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return self._supported(self.milliwatts)

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        return SimpleNamespace(gpu=self._supported(self.gpu))

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetProcessUtilization(self, gpu: str, since_us: int) -> list[Any]:
        self.since.append(since_us)
        if not self.samples:
            raise NotFound("Not Found")
        return [SimpleNamespace(pid=pid, timeStamp=at, smUtil=percent) for pid, at, percent in self.samples]

    @staticmethod
    def _supported(value: int | None) -> int:
        if value is None:
            raise NvmlError("Not Supported")
        return value


UNUSED: Reading[float] = Reading(None, "MB", "")


def test_what_nvml_does_not_support_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = NvmlGpu(Nvml(), 0, lambda: False).read({1}, UNUSED)
    assert [one.value for one in (found.memory_available, found.others, found.temperature, found.power)] == [None] * 4
    assert found.others.source == "NVML: Not Supported"


def test_before_we_use_the_gpu_all_its_load_is_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml(gpu=60, free=2_000_000_000)
    nvml.milliwatts = 70_500
    found = NvmlGpu(nvml, 0, lambda: False).read({1}, UNUSED)
    assert (found.others.value, found.memory_available.value) == (60, 2000)
    assert found.power == Reading(70.5, "W", "NVML, the GPU alone")


def test_the_load_of_others_is_told_by_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml(gpu=99, pids=(7, 8, 9), samples=[(7, 100, 90), (8, 100, 10), (8, 200, 30), (9, 150, 5)])
    gpu = NvmlGpu(nvml, 0, lambda: True)
    assert gpu.read({7}, UNUSED).others.value == 25
    nvml.samples = ()
    assert gpu.read({7}, UNUSED).others.value == 0
    assert nvml.since == [0, 200]


def test_in_a_container_that_hides_our_id_the_load_is_unknown_and_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml(gpu=99, pids=(31337,), samples=[(31337, 100, 99)])
    assert NvmlGpu(nvml, 0, lambda: True).read({7}, UNUSED).others.value is None


@pytest.mark.parametrize(
    ("visible", "index", "handle"), [("", 1, 1), ("2,0", 1, 0), ("GPU-8f3c", 0, "GPU-8f3c"), ("MIG-1", 0, "MIG-1")]
)
def test_the_gpu_is_the_one_that_torch_means(
    monkeypatch: pytest.MonkeyPatch, visible: str, index: int, handle: object
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = Nvml()
    NvmlGpu(nvml, index, lambda: False)
    assert nvml.handles == [handle]


def test_without_nvidia_ml_py_the_gpu_is_unknown_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = find_gpu("cuda:0", sys_root=tmp_path, is_unified=False)
    assert isinstance(gpu, NoGpu)
    assert str(gpu.read(set(), UNUSED).others) == "unknown (nvidia-ml-py is not installed)"


def test_a_gpu_that_nvml_cannot_find_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise NvmlError("Driver Not Loaded")

    nvml = Nvml()
    nvml.nvmlInit = fails  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    gpu = find_gpu("cuda", sys_root=tmp_path, is_unified=False)
    assert str(gpu.read(set(), UNUSED).memory_available) == "unknown (NVML: Driver Not Loaded)"


def test_a_container_without_sysfs_is_read_without_a_word_too_much(tmp_path: Path) -> None:
    readings = machine(container(tmp_path)).read(0.0)
    assert str(readings.memory_available) == "60 MB (limit of control group /)"
    assert readings.metered.value is None and readings.cpu_others.value is None
