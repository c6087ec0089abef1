"""The aggregator dies at every single write, commit, publication and acknowledgement of a run, one by one, and resumes.

Dying is: from that instant on nothing of the process happens any more, and the store's files are what they are then.
The files are copied at that instant, so not even sqlite's orderly closing helps. Each run must end with the
coefficients and the receipts of the run that nothing happened to, and its journal must fold to them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.service import Service
from aggregator.store import Store
from aggregator.verification import verify
from shared.changes import write_change
from shared.loopback import LoopbackNetwork
from shared.messages import Plan, Receipt, Update
from shared.refusals import Refusal
from shared.topics import parse_topic
from shared.transport import Received
from shared.wire import decode, encode, scalars_to_bytes
from tests.crash_points import Death, Fuse, FusedConnection, FusedTransport
from tests.runs import START_MS, spec_of, update_of

OTHER_MODEL = b"o" * 16
Key = tuple[str, int]  # device, round
FIRST_ORDER = (2, 3)


class World:
    """A network, devices that send until they are told, an operator, and an aggregator that may die."""

    def __init__(
        self,
        folder: Path,
        story: list[list[tuple[str, Update]]],
        fatal: list[int],
        forgetful: bool = False,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.forgetful = forgetful  # the broker forgets the aggregator's session when it dies, and what waits in it
        self.lives = 0
        self.fuse = Fuse(fatal, self._copy)
        self.network = LoopbackNetwork()
        self.story = story  # what is sent together, then what is sent when all of that is answered, ..
        self.pending: dict[Key, bytes] = {}
        self.told: dict[Key, list[Refusal]] = {}
        self.plans: list[Plan] = []
        self.path = folder / "0.sqlite3"
        with Store.open(self.path, may_create=True) as store:
            store.create(spec_of(**settings), START_MS)
            store.command("night", "pause", "for a test", START_MS)
            store.command("night", "resume", "", START_MS)
        names = sorted({device for together in story for device, _ in together})
        self.devices = {name: self.network.transport(name) for name in names}
        for name, transport in self.devices.items():
            transport.subscribe("kseed/night/plan")
            transport.subscribe(f"kseed/night/receipt/{name}")
            transport.start()
        self._start()

    def _copy(self) -> None:
        self.lives += 1
        self.path = self.folder / f"{self.lives}.sqlite3"
        for suffix in ("", "-wal"):
            source = self.folder / f"{self.lives - 1}.sqlite3{suffix}"
            if source.exists():
                shutil.copy(source, f"{self.path}{suffix}")

    def _start(self) -> None:
        self.store = Store.open(self.path)
        # A commit is in the file without it, and only the death of the machine would show the difference.
        self.store._do("PRAGMA synchronous = OFF")
        self.store._connection = FusedConnection(self.store._connection, self.fuse)  # type: ignore[assignment]
        transport = FusedTransport(self.network.transport("aggregator", manual_acknowledge=True), self.fuse)
        self.service = Service(self.store, "night", transport, lambda: START_MS, lambda _: None)  # type: ignore[arg-type]
        self.service.start()

    def turn(self) -> None:
        try:
            self.service.turn(0)
        except Death:
            self.network.kill("aggregator")
            if self.forgetful:
                self.network.expire_session("aggregator")
            self._start()
            self._listen()
            for key in self.pending:  # devices see that it took a while, and send again
                self._send(key)
        self._listen()
        if not self.pending and self.story and self.plans:
            together = self.story[0]
            if all(update.round <= self.plans[-1].round for _, update in together):
                del self.story[0]
                for device, update in together:
                    self.pending[device, update.round] = encode(update)
                    self._send((device, update.round))

    def _listen(self) -> None:
        for name, transport in self.devices.items():
            while (event := transport.poll(0)) is not None:
                if isinstance(event, Received):
                    self._hear(name, event)

    def _send(self, key: Key) -> None:
        device, _ = key
        self.devices[device].publish(f"kseed/night/update/{device}", self.pending[key])

    def _hear(self, name: str, event: Received) -> None:
        topic = parse_topic(event.topic)
        assert topic is not None
        message = decode(topic.kind, event.payload)
        if isinstance(message, Plan):
            self.plans.append(message)
        else:
            assert isinstance(message, Receipt)
            self.told.setdefault((name, message.round), []).append(Refusal(message.code))
            self.pending.pop((name, message.round), None)

    def play(self) -> World:
        for _ in range(400):
            self.turn()
            is_over = self.service.state.progress.phase == "finished" and self.plans[-1].phase == "finished"
            if is_over and not self.story and not self.pending and self.network.is_quiet:
                return self
        raise AssertionError(f"the run does not end: {self.service.state.progress}, {self.pending}, {self.told}")

    @property
    def receipts(self) -> dict[Key, set[str]]:
        """What every device knows at the end. ACCEPTED and DUPLICATE say the same: it counts."""
        return {key: {"counts" if code.is_success else code.name for code in codes} for key, codes in self.told.items()}


def update(number: int, seed: int, **fields: Any) -> Update:
    """Of a device; those of `FIRST_ORDER` send a change in place of scalars."""
    made = np.random.default_rng([number, seed]).normal(size=3)
    work: dict[str, Any] = {"scalars": scalars_to_bytes(made, "f16")}
    if seed in FIRST_ORDER:
        work = {"scalars": b"", "change": write_change(np.array([seed, 9, 200]), made / 1e3, "f16")}
    return update_of(number, **{**work, "samples": 1 + seed, **fields})


def one_after_the_other() -> list[list[tuple[str, Update]]]:
    """Two rounds: c has another model, d is late, and e is bad."""
    return [
        [("c", update(0, 3, model_digest=OTHER_MODEL))],
        [("e", update(0, 5, samples=10**7))],
        [("a", update(0, 1))],
        [("b", update(0, 2))],
        [("d", update(0, 4))],
        [("b", update(1, 2))],
        [("c", update(1, 3))],
        [("a", update(1, 1))],
    ]


def all_together() -> list[list[tuple[str, Update]]]:
    """Two rounds whose updates share transactions."""
    return [[(name, update(number, seed)) for seed, name in enumerate("abc")] for number in (0, 1)]


STORIES = {"one after the other": one_after_the_other, "all together": all_together}
SETTINGS = {"rounds": 2, "quorum": 3, "late": "fold", "step": "normalised", "algorithm": "fedkseed-pro"}
SETTINGS |= {"scalar_format": "f16", "change_format": "f8", "first_order": "accept"}


@pytest.fixture(params=STORIES)
def story(request: pytest.FixtureRequest) -> Callable[[], list[list[tuple[str, Update]]]]:
    return STORIES[request.param]


@pytest.fixture
def calm(story: Any, tmp_path: Path) -> Iterator[World]:
    (tmp_path / "calm").mkdir()
    world = World(tmp_path / "calm", story(), [], **SETTINGS).play()
    yield world
    world.store.close()


def compared(folder: Path, story: Any, fatal: list[int], calm: World, forgetful: bool) -> World:
    folder.mkdir()
    world = World(folder, story(), fatal, forgetful, **SETTINGS).play()
    world.fuse.fatal.clear()
    state, wanted = world.service.state, calm.service.state
    assert state.coefficients == wanted.coefficients, world.fuse.deaths
    assert (state.carried, state.algorithm_state) == (wanted.carried, wanted.algorithm_state), world.fuse.deaths
    assert world.receipts == calm.receipts, world.fuse.deaths
    found = verify(world.store, "night")
    assert found.difference is None, world.fuse.deaths
    world.store.close()
    shutil.rmtree(folder)
    return world


def test_the_calm_run_passes_every_kind_of_point(calm: World, story: Any) -> None:
    expected = {"BEGIN", "INSERT", "UPDATE", "COMMIT", "receipt", "plan", "snapshot", "run", "acknowledgement"}
    assert {point.split()[1] for point in calm.fuse.passed} == expected
    if story is one_after_the_other:
        assert calm.receipts["c", 0] == {"counts", "DIVERGED"}
        assert calm.receipts["e", 0] == {"WEIGHT_OUT_OF_RANGE"}
        assert calm.receipts["d", 0] == {"counts"}
    state = calm.service.state
    assert any(state.coefficients) and any(state.carried)
    assert state.algorithm_state.worth.agreement_rounds == 2


def test_death_at_any_point_changes_neither_coefficients_nor_receipts(calm: World, story: Any, tmp_path: Path) -> None:
    assert len(calm.fuse.passed) > 70
    for number, point in enumerate(calm.fuse.passed):
        assert compared(tmp_path / "w", story, [number], calm, forgetful=True).fuse.deaths == [point]


def test_a_second_death_soon_after_the_first_changes_nothing_either(calm: World, story: Any, tmp_path: Path) -> None:
    points = len(calm.fuse.passed)
    for point in range(0, points, 3):
        fatal = [point, (7 * point) % 23]
        assert compared(tmp_path / "w", story, fatal, calm, forgetful=False).fuse.deaths


def test_a_machine_that_dies_in_a_commit_keeps_it_whole_or_not_at_all(tmp_path: Path) -> None:
    """Of the write-ahead log any part may be on the disk until the commit returns."""
    path = tmp_path / "s.sqlite3"
    with Store.open(path, may_create=True) as store:
        store.create(spec_of(quorum=2, scalar_format="f16"), START_MS)
        network = LoopbackNetwork()
        service = Service(store, "night", network.transport("aggregator"), lambda: START_MS, lambda _: None)
        service.start()
        service.turn(0)
        before = store.state("night")
        log = Path(f"{path}-wal")
        start = log.stat().st_size
        for name in "ab":
            device = network.transport(name)
            device.start()
            device.publish(f"kseed/night/update/{name}", encode(update(0, 1)))
        service.turn(0)  # closes the round: one commit
        after = store.state("night")
        assert (before.progress.round, after.progress.round) == (0, 1)
        seen = set()
        end = log.stat().st_size
        for size in [*range(start, end, 1024), end - 1, end]:
            torn = tmp_path / "torn.sqlite3"
            shutil.copy(path, torn)
            Path(f"{torn}-wal").write_bytes(log.read_bytes()[:size])
            with Store.open(torn) as reopened:
                state = reopened.state("night")
                assert state in (before, after)
                assert verify(reopened, "night").difference is None
                seen.add(state.progress.round)
            for leftover in tmp_path.glob("torn*"):
                leftover.unlink()
    assert seen == {0, 1}
