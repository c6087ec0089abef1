"""What the benchmarks of the aggregator share: a run, its updates, and a network that is a list in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregator.config import RunConfig
from aggregator.operations import unix_ms
from aggregator.service import Service
from aggregator.spec import Spec, new_spec
from aggregator.store import Store
from shared.manifest import Manifest, RunBase, Tensor
from shared.messages import NumberFormat, Update
from shared.transport import Connected, Delivered, Event, Received, TrafficCount, Transport
from shared.wire import decode, encode, scalars_to_bytes

RUN = "bench"
STEPS = 200  # scalars per update, as in the paper
SEEDS = 4096
FORM: NumberFormat = "f32"  # the longest
_BASE = RunBase("bench/model", "bf16", Manifest((Tensor("w", (64, 64)),)), bytes(32))


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    updates: int  # per measurement of the throughput
    singles: int  # of the baseline: a commit per update
    devices: int  # of the large round
    replays: int  # of the baseline: one device after the other
    runs: int


FULL = Sizes(updates=20_000, singles=500, devices=100_000, replays=1_000, runs=5)
QUICK = Sizes(updates=2_000, singles=100, devices=2_000, replays=100, runs=3)


class Feed:
    """A network on which everything has arrived already; satisfies `shared.transport.Transport`."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[str, bytes]] = deque()  # device and payload of each update
        self._is_connected = False
        self._untold = 0
        self.receipts = 0
        self.acknowledged = 0
        self.plans: list[int] = []  # rounds

    def start(self) -> None:
        """Nothing to do."""

    def subscribe(self, topic_filter: str) -> None:
        """Everything comes anyway."""

    unsubscribe = subscribe

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Count it."""
        if "/receipt/" in topic:
            self.receipts += 1
        elif topic.endswith("/plan"):
            plan = decode("plan", payload)
            self.plans.append(plan.round)  # type: ignore[union-attr]
        self._untold += 1
        return self._untold

    def poll(self, timeout_s: float) -> Event | None:
        """The next update."""
        if not self._is_connected:
            self._is_connected = True
            return Connected("in-process", False)
        if self._untold:
            self._untold -= 1
            return Delivered(0)
        if not self.waiting:
            return None
        device, payload = self.waiting.popleft()
        return Received(f"kseed/{RUN}/update/{device}", payload, False, self._acknowledge)

    def _acknowledge(self) -> None:
        self.acknowledged += 1

    def traffic(self) -> TrafficCount:
        """Nothing on any wire."""
        return TrafficCount(0, 0, None, None)

    def close(self, timeout_s: float = 5.0) -> None:
        """Nothing to do."""


def spec(quorum: int) -> Spec:
    config = RunConfig(
        seeds=SEEDS, local_steps=STEPS, scalar_format=FORM, change_format=FORM, quorum=quorum, deadline_s=86_400.0
    )
    return new_spec(RUN, _BASE, config, pool_key=1, nonce_key=bytes(32))


def updates_of(count: int) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        scalars = rng.normal(size=STEPS).astype(np.float32)
        update = Update(0, 1 + number % 1000, 2.0, 3.0, None, bytes(16), scalars_to_bytes(scalars, FORM), None)
        made.append((f"device-{number:06d}", encode(update)))
    return made


@contextmanager
def served(folder: Path, quorum: int, network: Transport) -> Iterator[Service]:
    path = folder / "bench.sqlite3"
    for leftover in folder.glob("bench.sqlite3*"):
        leftover.unlink()
    with Store.open(path, may_create=True) as store:
        store.create(spec(quorum), unix_ms())
        service = Service(store, RUN, network, unix_ms, lambda _: None)
        service.start()
        service.turn(0)
        yield service
    for leftover in folder.glob("bench.sqlite3*"):
        leftover.unlink()
