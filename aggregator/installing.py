"""The aggregator as a systemd service: what its unit says, from the settings that it will run with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from aggregator.config import EDGE_SECTIONS, ServeConfig
from shared.config import load
from shared.service_unit import Service, login
from shared.topics import check_id

# No GPU, no compiled kernels, no look at other processes: all that the agent must go without.
SETTINGS = ("PrivateDevices=yes", "ProtectClock=yes", "ProtectProc=invisible", "ProcSubset=pid", "PrivateUsers=yes")


def aggregator_service(run: str, name: str, config_file: Path, *, is_system: bool, user: str | None) -> Service:
    """The service that runs `kseed-aggregator serve RUN` with this file. user: the login of a system service.

    The environment of the installing shell is not the service's, so the file alone must do. Raises UserError.
    """
    check_id("the run's name", run)
    config_file = config_file.absolute()
    config = load(ServeConfig, file=config_file, env={}, flags={}, other_sections=("run", *EDGE_SECTIONS))
    return Service(
        name=name,
        description=f"kseed aggregator of the run {run}",
        command=(sys.executable, "-m", "aggregator.cli", "serve", run, "--config", str(config_file)),
        user=login(is_system, user),
        environment={"XDG_DATA_HOME": "%S"} if is_system else {},
        settings=("MemoryDenyWriteExecute=yes", *(SETTINGS if is_system else ())),
        reads=tuple(_reads(config_file, config)),
        writes=tuple(_writes(config)),
    )


def _reads(config_file: Path, config: ServeConfig) -> Iterator[Path]:
    yield from (config_file, Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), Path(__file__))
    broker = config.broker
    yield from filter(None, (broker.ca_file, broker.cert_file, broker.key_file, broker.password_file))


def _writes(config: ServeConfig) -> Iterator[Path]:
    for file in filter(None, (config.aggregator.store, config.aggregator.metrics)):
        yield file.absolute().parent
