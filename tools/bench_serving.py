"""The benchmarks of the aggregator that need a broker: through mosquitto, and the memory of an idle `serve`."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from aggregator.operations import ANSWERS_IN_FLIGHT, unix_ms
from aggregator.store import Store
from shared.config import BrokerConfig
from shared.mqtt import MqttTransport
from shared.transport import Delivered
from tools.bench import Measured
from tools.bench_feed import RUN, Sizes, served, spec, updates_of
from tools.broker import find_mosquitto, start_broker


def through_mosquitto(sizes: Sizes, folder: Path) -> list[Measured]:
    """Updates that wait in a real broker: from connecting to the last commit and receipt. Nothing without mosquitto."""
    if find_mosquitto() is None:
        return []
    updates = updates_of(sizes.updates // 2)
    values = tuple(_drained_per_second(folder / f"mosquitto-{run}", updates) for run in range(sizes.runs))
    return [Measured("the same out of mosquitto, its processor time included", "updates/s", values)]


def _drained_per_second(folder: Path, updates: list[tuple[str, bytes]]) -> float:
    broker = start_broker(folder, kind="mosquitto")
    config = BrokerConfig(host=broker.host, port=broker.port)
    client_id = f"kseed-aggregator-{RUN}"
    try:
        absent = MqttTransport(config, client_id, manual_acknowledge=True)
        absent.subscribe(f"kseed/{RUN}/update/+")
        absent.publish("kseed/any", b"")  # once it is answered, so is the subscription
        absent.start()
        _await_delivered(absent, 1)
        absent.close()
        flood = MqttTransport(config, "flood", most_in_flight=ANSWERS_IN_FLIGHT)
        flood.start()
        for device, payload in updates:
            flood.publish(f"kseed/{RUN}/update/{device}", payload)
        _await_delivered(flood, len(updates))
        flood.close()
        transport = MqttTransport(
            config, client_id, manual_acknowledge=True, most_in_flight=ANSWERS_IN_FLIGHT, saves_bytes=False
        )
        with served(folder, len(updates) + 1, transport) as service:
            began_s = time.perf_counter()
            while len(service.state.updates) < len(updates) or service._answers.unsettled:
                service.turn(0.1)
            transport.close()
            return len(updates) / (time.perf_counter() - began_s)
    finally:
        broker.stop()
        shutil.rmtree(folder)


def _await_delivered(transport: MqttTransport, count: int) -> None:
    while count:
        count -= isinstance(transport.poll(10.0), Delivered)


def idle_memory(sizes: Sizes, folder: Path) -> Measured:
    """Resident memory of `kseed-aggregator serve` with an open round and a connection."""
    import psutil

    path = folder / "idle.sqlite3"
    for leftover in folder.glob("idle.sqlite3*"):
        leftover.unlink()
    with Store.open(path, may_create=True) as store:
        store.create(spec(2), unix_ms())
    broker = start_broker(folder / "broker")
    values = []
    try:
        for _ in range(sizes.runs):
            arguments = ["serve", RUN, "--store", str(path), "--broker", f"{broker.host}:{broker.port}"]
            command = [sys.executable, "-m", "aggregator.cli", *arguments]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if "connected" in line:
                    break
            _wait_until_open(path)
            values.append(psutil.Process(process.pid).memory_info().rss / 1e6)
            process.terminate()
            process.wait()
            process.stdout.close()
    finally:
        broker.stop()
    return Measured("idle aggregator, connected, resident memory", "MB", tuple(values), "<= 60")


def _wait_until_open(path: Path) -> None:
    connection = sqlite3.connect(path)
    while b'"open"' not in bytes(connection.execute("SELECT progress FROM runs").fetchone()[0]):
        time.sleep(0.05)
    connection.close()
