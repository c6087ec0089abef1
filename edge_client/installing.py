"""The agent as a systemd service: what its unit says, from the settings that it will run with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from edge_client.config import AGGREGATOR_SECTIONS, EdgeConfig
from shared.config import load
from shared.errors import UserError
from shared.service_unit import Service, login

GPU_GROUPS = ("video", "render")  # who may open a GPU's devices: /dev/dri, and all of a Jetson's
MEMORY_MARGIN, MEMORY_MOST = 1.25, 1.5  # times memory_mb: what RLIMIT_DATA does not see, such as code and cached files

# Left out, because it would take the GPU away or stop compiled kernels:
#   PrivateDevices, DevicePolicy, DeviceAllow: /dev/nvidia*, /dev/nvhost*, /dev/nvmap, /dev/dri; their names and numbers
#     differ from driver to driver. ProtectClock restricts devices, too.
#   MemoryDenyWriteExecute: numba, Triton and CUDA write machine code and run it.
#   PrivateUsers: the devices of a Jetson are opened by group.
#   ProtectProc, ProcSubset: /proc/stat and /proc/meminfo are what the agent pauses by, and NVML lists processes.
# WatchdogSec: a local step may take minutes, and a model longer to load; the agent watches its own network thread.


def agent_service(name: str, config_file: Path, *, is_system: bool, user: str | None) -> Service:
    """The service that runs `kseed-edge up` with this file. user: the login of a system service.

    The environment of the installing shell is not the service's, so the file alone must do. Raises UserError.
    """
    config_file = config_file.absolute()
    config = load(EdgeConfig, file=config_file, env={}, flags={}, other_sections=AGGREGATOR_SECTIONS)
    if not config.agent.run:
        raise UserError(f"{config_file}: agent.run is missing; give the run's name as run under [agent].")
    user = login(is_system, user)
    return Service(
        name=name,
        description="kseed agent: tunes a language model with the data on this device, and sends scalars only",
        command=(sys.executable, "-m", "edge_client.cli", "up", "--config", str(config_file)),
        user=user,
        groups=_gpu_groups() if is_system else (),
        environment=_environment(is_system),
        settings=tuple(_resources(config)),
        folder=Path.cwd() if any(not path.is_absolute() for path in _sources(config)) else None,
        reads=tuple(_reads(config_file, config)),
        writes=tuple(_writes(config)),
    )


def _gpu_groups() -> tuple[str, ...]:
    import grp  # not on Windows

    known = {group.gr_name for group in grp.getgrall()}  # one that is missing would keep the service from starting
    return tuple(name for name in GPU_GROUPS if name in known)


def _environment(is_system: bool) -> dict[str, str]:
    """Nice is the unit's, from the first instruction on; numba and Triton keep what they compiled."""
    shared = {"KSEED_CAPS_NICE": "0", "NUMBA_CACHE_DIR": "%C/kseed/numba", "TRITON_CACHE_DIR": "%C/kseed/triton"}
    if not is_system:
        return shared
    return {**shared, "HOME": "%S/kseed", "XDG_STATE_HOME": "%S", "XDG_CACHE_HOME": "%C/kseed"}


def _resources(config: EdgeConfig) -> Iterator[str]:
    """[caps], kept by the kernel; and first to go when the machine is short of memory."""
    caps = config.caps
    yield f"Nice={caps.nice}"
    yield "CPUWeight=20"
    yield "IOSchedulingClass=idle"
    yield "OOMScoreAdjust=500"
    if caps.cpu_percent < 100:
        cores = config.kernel.threads or os.cpu_count() or 1
        yield f"CPUQuota={max(1, round(caps.cpu_percent * cores))}%"
    if caps.memory_mb:
        yield f"MemoryHigh={int(caps.memory_mb * 1e6 * MEMORY_MARGIN)}"
        yield f"MemoryMax={int(caps.memory_mb * 1e6 * MEMORY_MOST)}"


def _reads(config_file: Path, config: EdgeConfig) -> Iterator[Path]:
    yield from (config_file, Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), Path(__file__))
    broker = config.broker
    yield from filter(None, (broker.ca_file, broker.cert_file, broker.key_file, broker.password_file))
    yield from (path.absolute() for path in _sources(config))


def _sources(config: EdgeConfig) -> list[Path]:
    """Data and model, where they are files: these settings may also name something on a hub."""
    named = (config.data.source, config.data.held_out_source, config.model.source)
    return [Path(source) for source in named if source and Path(source).exists()]


def _writes(config: EdgeConfig) -> Iterator[Path]:
    """Folders that the agent writes to, besides the service's own."""
    if config.agent.state_dir is not None:
        yield config.agent.state_dir.absolute()
    if config.agent.metrics is not None:
        yield config.agent.metrics.absolute().parent
