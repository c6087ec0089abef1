"""An aggregator's loop on the in-process network, with a clock and devices that a test moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator.service import Service
from aggregator.state import State
from aggregator.store import Store
from shared.faults import Faults
from shared.loopback import LoopbackNetwork
from shared.messages import Receipt, Update
from shared.refusals import Refusal
from shared.topics import parse_topic
from shared.transport import Received
from shared.wire import decode, encode
from tests.runs import START_MS, spec_of


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_ms = START_MS

    def __call__(self) -> int:
        return self.now_ms


class Device:
    """A device that a test plays; it remembers what it was told."""

    def __init__(self, network: LoopbackNetwork, name: str) -> None:
        self.name = name
        self.transport = network.transport(name)
        for kind in ("run", "plan", "snapshot", f"receipt/{name}"):
            self.transport.subscribe(f"kseed/night/{kind}")
        self.transport.start()
        self.heard: list[Any] = []

    def listen(self) -> list[Any]:
        """Everything that waits."""
        heard = []
        while (event := self.transport.poll(0)) is not None:
            if isinstance(event, Received):
                topic = parse_topic(event.topic)
                assert topic is not None
                heard.append(decode(topic.kind, event.payload))
        self.heard += heard
        return heard

    def send(self, update: Update) -> None:
        self.send_bytes(encode(update))

    def send_bytes(self, payload: bytes, *, retain: bool = False) -> None:
        self.transport.publish(f"kseed/night/update/{self.name}", payload, retain=retain)

    @property
    def codes(self) -> list[Refusal]:
        return [Refusal(message.code) for message in self.heard if isinstance(message, Receipt)]


class Setting:
    """A store, a network, an aggregator and its clock."""

    def __init__(self, folder: Path, faults: Faults | None = None, **settings: Any) -> None:
        self.path = folder / "kseed.sqlite3"
        self.network = LoopbackNetwork(faults)
        self.clock = Clock()
        self.lines: list[str] = []
        self.metrics = folder / "metrics.jsonl"
        self.store = Store.open(self.path, may_create=True)
        self.store.create(spec_of(**settings), START_MS)
        self.service = self.start_service()

    def start_service(self) -> Service:
        transport = self.network.transport("aggregator", manual_acknowledge=True)
        service = Service(self.store, "night", transport, self.clock, self.lines.append, self.metrics)
        service.start()
        return service

    def restart(self) -> None:
        """Kill the aggregator and start it again on the same store."""
        self.network.kill("aggregator")
        self.store.close()
        self.store = Store.open(self.path)
        self.service = self.start_service()

    def run(self, *devices: Device, turns: int = 3) -> None:
        for _ in range(turns):
            self.service.turn(0)
            for device in devices:
                device.listen()

    @property
    def state(self) -> State:
        return self.service.state

    @property
    def log(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.store.close()
