"""/sys and /proc of several machines, cut down to the files that matter.

They are built from documented layouts (kernel documentation of the power supply, thermal, hwmon, powercap, devfreq and
cgroup interfaces; NVIDIA's Jetson guides; reports of users), and were not recorded on the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_client.watching.machine import Machine

Files = Mapping[str, str]

MAINS: Files = {"type": "Mains", "online": "1"}
NO_MAINS: Files = {"type": "Mains", "online": "0"}
MOUSE: Files = {"type": "Battery", "scope": "Device", "status": "Discharging", "capacity": "55", "present": "1"}
FULL: Files = {"energy_now": "40000000", "energy_full": "50000000", "capacity": "80"}


def battery(status: str, **more: str) -> Files:
    """A battery's files."""
    return {"type": "Battery", "present": "1", "status": status, **more}


@dataclass(frozen=True)
class Tree:
    """A machine's /sys and /proc in a folder."""

    root: Path

    @property
    def sys(self) -> Path:
        return self.root / "sys"

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    def add(self, folder: str, files: Files) -> Tree:
        """Write `files` (relative to `folder`), each with the newline that the kernel ends it with."""
        for name, content in files.items():
            path = self.root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n", encoding="utf-8")
        return self

    def supplies(self, supplies: Mapping[str, Files]) -> Tree:
        (self.sys / "class/power_supply").mkdir(parents=True, exist_ok=True)
        for name, files in supplies.items():
            self.add(f"sys/class/power_supply/{name}", files)
        return self

    def zones(self, zones: Mapping[str, str]) -> Tree:
        """Thermal zones by type, in millidegrees."""
        for index, (name, millidegrees) in enumerate(zones.items()):
            self.add(f"sys/class/thermal/thermal_zone{index}", {"type": name, "temp": millidegrees})
        return self

    def memory(self, total_kb: int, available_kb: int) -> Tree:
        rows = [f"MemTotal: {total_kb:>15} kB", "MemFree:   200000 kB", f"MemAvailable: {available_kb:>11} kB"]
        return self.add("proc", {"meminfo": "\n".join(rows)})

    def cpu(self, user: int, nice: int, system: int, idle: int, *, iowait: int = 0, irq: int = 0) -> Tree:
        """Ticks (1/100 s) since the start, over all cores."""
        line = f"cpu  {user} {nice} {system} {idle} {iowait} {irq} 0 0 0 0"
        return self.add("proc", {"stat": f"{line}\ncpu0{line[4:]}\nctxt 1"})

    def route(self, *interfaces: tuple[str, int]) -> Tree:
        """Default routes: interface and metric."""
        head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"
        local = "wlan0\t0001A8C0\t00000000\t0001\t0\t0\t50\t00FFFFFF\t0\t0\t0"
        rows = [f"{name}\t00000000\t0101A8C0\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0" for name, metric in interfaces]
        return self.add("proc", {"net/route": "\n".join([head, local, *rows])})


def laptop(root: Path) -> Tree:
    """On mains, charging, with a wireless mouse; the processor tells its heat and its energy."""
    tree = Tree(root).supplies({"AC": MAINS, "BAT0": battery("Charging", **FULL), "hidpp_battery_0": MOUSE})
    tree.zones({"acpitz": "42000", "x86_pkg_temp": "61000", "iwlwifi_1": "48000"})
    tree.add("sys/class/powercap/intel-rapl:0", {"name": "package-0", "energy_uj": "5000000"})
    tree.add("sys/class/powercap/intel-rapl:0:0", {"name": "core", "energy_uj": "4000000"})
    return tree.memory(16_000_000, 9_000_000).cpu(1000, 0, 500, 8500).route(("wlan0", 600))


def laptop_unplugged(root: Path) -> Tree:
    """The same, on its battery."""
    outflow = {"power_now": "12500000", "voltage_now": "12000000"}
    return laptop(root).supplies({"AC": NO_MAINS, "BAT0": battery("Discharging", **FULL, **outflow)})


def laptop_with_a_charge_limit(root: Path) -> Tree:
    """On mains, and the firmware holds the battery at 80%."""
    return laptop(root).supplies({"BAT0": battery("Not charging", **FULL)})


def laptop_with_two_batteries(root: Path) -> Tree:
    """Unplugged: the inner one waits while the outer one is drained."""
    inner = battery("Unknown", energy_now="4000000", energy_full="23000000", capacity="17", power_now="0")
    outer = battery("Discharging", energy_now="46000000", energy_full="77000000", capacity="60", power_now="9000000")
    return laptop(root).supplies({"AC": NO_MAINS, "BAT0": inner, "BAT1": outer})


def desktop(root: Path) -> Tree:
    """No battery but the mouse's; an AMD processor tells its heat under hwmon alone."""
    tree = Tree(root).supplies({"hidpp_battery_0": MOUSE})
    tree.add("sys/class/hwmon/hwmon0", {"name": "nvme", "temp1_input": "71850", "temp1_label": "Composite"})
    tree.add("sys/class/hwmon/hwmon2", {"name": "k10temp", "temp1_input": "58250", "temp1_label": "Tctl"})
    return tree.memory(32_000_000, 20_000_000).cpu(1000, 0, 500, 8500).route(("enp5s0", 100))


def jetson_orin_5(root: Path) -> Tree:
    """Jetson Orin NX, JetPack 5 (kernel 5.10): zones named *-therm, GPU 17000000.ga10b."""
    zones = {"CPU-therm": "49562", "GPU-therm": "47093", "tj-therm": "49562", "PMIC-Die": "100000"}
    return _orin(root, zones, gpu="17000000.ga10b", load="312")


def jetson_orin_6(root: Path) -> Tree:
    """Jetson Orin Nano, JetPack 6 (kernel 5.15): zones named *-thermal, GPU 17000000.gpu; some zones refuse."""
    zones = {"cpu-thermal": "51406", "gpu-thermal": "52343", "cv0-thermal": "", "tj-thermal": "52343"}
    return _orin(root, zones, gpu="17000000.gpu", load="0")


def _orin(root: Path, zones: Mapping[str, str], *, gpu: str, load: str) -> Tree:
    tree = Tree(root).zones(zones).memory(7_600_000, 3_100_000).cpu(1000, 0, 500, 8500).route(("eth0", 100))
    tree.add("sys/class/hwmon/hwmon3", {"name": "ina3221", **_rail(1, "VDD_IN", 5032, 1504)})
    tree.add("sys/class/hwmon/hwmon3", {**_rail(2, "VDD_CPU_GPU_CV", 5032, 400), **_rail(3, "VDD_SOC", 5032, 280)})
    tree.add("sys/class/hwmon/hwmon3", {"in7_label": "sum of shunt voltages", "in7_input": "100"})
    tree.add(f"sys/class/devfreq/{gpu}", {"device/load": load, "cur_freq": "306000000"})
    return tree.add("proc", {"device-tree/compatible": "nvidia,p3768-0000+p3767-0003\0nvidia,tegra234\0"})


def _rail(channel: int, name: str, millivolts: int, milliamperes: int) -> Files:
    return {
        f"in{channel}_label": name,
        f"in{channel}_input": str(millivolts),
        f"curr{channel}_input": str(milliamperes),
    }


def jetson_agx_orin(root: Path) -> Tree:
    """Jetson AGX Orin: two INA3221 and no rail that all others hang on."""
    tree = jetson_orin_5(root).add("sys/class/hwmon/hwmon3", _rail(1, "VDD_GPU_SOC", 20000, 200))
    tree.add("sys/class/hwmon/hwmon3", {**_rail(2, "VDD_CPU_CV", 20000, 100), **_rail(3, "VIN_SYS_5V0", 5000, 800)})
    second = {"name": "ina3221", **_rail(1, "NC", 0, 0), **_rail(2, "VDDQ_VDD2_1V8AO", 5000, 100)}
    return tree.add("sys/class/hwmon/hwmon4", second)


def jetson_nano_4(root: Path) -> Tree:
    """Jetson Nano, JetPack 4: the INA3221 under iio, in milliwatts."""
    tree = Tree(root).zones({"CPU-therm": "38000", "PMIC-Die": "100000"}).memory(4_000_000, 1_500_000)
    rails = {"rail_name_0": "POM_5V_IN", "in_power0_input": "3250", "rail_name_1": "POM_5V_GPU"}
    tree.add("sys/bus/iio/devices/iio:device0", {**rails, "in_power1_input": "80"})
    return tree.add("proc", {"device-tree/compatible": "nvidia,p3450-0000\0nvidia,tegra210\0"})


def container(root: Path) -> Tree:
    """A container: no sysfs but a control group with 1 GB, of which 940 MB are taken."""
    tree = Tree(root).memory(64_000_000, 50_000_000)
    tree.add("proc", {"self/cgroup": "0::/"})
    return tree.add("sys/fs/cgroup", {"memory.max": "1000000000", "memory.current": "940000000"})


def machine(tree: Tree, **settings: Any) -> Machine:
    """What an agent sees of that tree: Linux, no NetworkManager, no CPU time of its own; `settings` differ."""
    usual = {"ask": lambda interface: None, "own_s": lambda: 0.0}
    return Machine(sys_root=tree.sys, proc_root=tree.proc, system="Linux", disk=tree.root, **{**usual, **settings})


MACHINES: Mapping[str, Callable[[Path], Tree]] = {
    "laptop": laptop,
    "laptop unplugged": laptop_unplugged,
    "laptop with a charge limit": laptop_with_a_charge_limit,
    "laptop with two batteries": laptop_with_two_batteries,
    "desktop": desktop,
    "Jetson Orin NX, JetPack 5": jetson_orin_5,
    "Jetson Orin Nano, JetPack 6": jetson_orin_6,
    "Jetson AGX Orin, JetPack 5": jetson_agx_orin,
    "Jetson Nano, JetPack 4": jetson_nano_4,
    "container": container,
}
