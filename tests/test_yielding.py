"""`kseed-edge` as a process: it says why it waits, and takes next to nothing while others need the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from aggregator.config import RunConfig
from tests.brokers import needs_mosquitto
from tests.programs import created, ended, read_until, started, tiny_folder
from tools.broker import RunningBroker

pytestmark = [needs_mosquitto, pytest.mark.broker, pytest.mark.skipif(sys.platform != "linux", reason="POSIX signals")]
CONFIG = RunConfig(seeds=256, rounds=1000, local_steps=1000, batch_size=2, quorum=1, deadline_s=86_400.0)


@contextmanager
def agent_at_work(
    folder: Path, data: Path, broker: RunningBroker, *words: object, **settings: str
) -> Iterator[subprocess.Popen[str]]:
    """An agent in a run that is served, with its gate on."""
    where = f"{broker.host}:{broker.port}"
    store = created(folder / "store.sqlite", tiny_folder(folder / "tiny"), CONFIG)
    started("serve", "spring", "--store", store, "--broker", where, program="aggregator.cli")
    run = ("join", "spring", "--broker", where, "--data", data, "--max-length", "40", "--wait", "--device", "ann")
    agent = started(*run, "--gate", *words, PYTHONUNBUFFERED="1", **settings)
    yield agent
    agent.send_signal(signal.SIGTERM)
    assert ended(agent)[0] == 0


def test_agent_outside_its_hours_says_so_and_leaves_when_asked(
    tmp_path: Path, data: Path, mosquitto: RunningBroker
) -> None:
    later = datetime.now() + timedelta(hours=2)
    span = f"{later:%H:%M}-{later + timedelta(hours=1):%H:%M}"
    with agent_at_work(tmp_path, data, mosquitto, "--hours", span, KSEED_GATE_OTHERS_CPU_PERCENT="0") as agent:
        read_until(agent, f"outside the allowed hours {span}. Work goes on at {later:%H:%M}.")


@pytest.mark.skipif(os.nice(0) > 0, reason="the tests were started with nice, and niced programs need nothing")
def test_agent_yields_to_programs_that_need_the_cpu(tmp_path: Path, data: Path, mosquitto: RunningBroker) -> None:
    burn = [sys.executable, "-c", "while True: sum(range(100000))"]
    burners = [subprocess.Popen(burn) for _ in range(psutil.cpu_count() or 1)]
    try:
        with agent_at_work(tmp_path, data, mosquitto) as agent:
            read_until(agent, "of the CPU, and 25% is the limit. Work goes on when they have stayed under it for 3")
            share = psutil.Process(agent.pid).cpu_percent(interval=5.0)
            assert share < 10.0, f"{share}% of a core while it waits"
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
