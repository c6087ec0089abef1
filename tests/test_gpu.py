"""What the GPU says: a Jetson on its tree, and NVML as it answers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_client.watching.gpu import JetsonGpu, NoGpu, NvmlGpu, find_gpu
from edge_client.watching.memory import is_unified
from edge_client.watching.reading import Reading
from tests.sysfs.machines import desktop, jetson_orin_5, machine


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
