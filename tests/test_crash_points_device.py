"""An agent dies at every single write, sync, rename and publication of a run, one by one, and is started again.

Two kinds of death: the process's, after which the disk holds all that was written, and the machine's, after which it
may lack whatever was not synced. Each run must end with the coefficients and the accepted updates, to the byte, of the
run that nothing happened to, and nobody may be told of a conflict.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from aggregator.config import RunConfig
from edge_client import session
from edge_client.agent import Agent, Clock
from edge_client.kept_steps import KeptSteps, ResumingTrainer
from edge_client.outbox import Outbox
from edge_client.progress import Screen
from edge_client.state import Identity
from edge_client.state_files import Disk, Owner
from shared.wire import encode
from tests.agents import ONE_ROUND
from tests.crash_points import Death, Fuse, FusedTransport
from tests.small_fleet import LinearTrainer, SmallFleet
from tests.test_faults import accepted_updates

OWNER = Owner("in-process", "demo", "ann")
SETTINGS = {**ONE_ROUND, "local_steps": 3, "rounds": 2, "quorum": 2, "min_updates": 2, "evaluate_every": 1}


class FusedDisk(Disk):
    """Each call is a point before and after, and a write also one in its middle."""

    def __init__(self, fuse: Fuse) -> None:
        self._fuse = fuse
        # What a machine that dies now may have lost: files beyond a size, by their number, and changes of names.
        self.unsynced: dict[int, int] = {}
        self.undo: list[Callable[[], object]] = []

    def write(self, file: int, data: bytes) -> None:
        status = os.fstat(file)
        self.unsynced[status.st_ino] = min(status.st_size, self.unsynced.get(status.st_ino, status.st_size))
        self._fuse.point("before write")
        super().write(file, data[: len(data) // 2])
        self._fuse.point("in write")
        super().write(file, data[len(data) // 2 :])
        self._fuse.point("after write")

    def sync(self, file: int) -> None:
        self._fuse.point("before sync")
        super().sync(file)
        self.unsynced.pop(os.fstat(file).st_ino, None)
        if stat.S_ISDIR(os.fstat(file).st_mode):
            self.undo.clear()
        self._fuse.point("after sync")

    def replace(self, source: Path, target: Path) -> None:
        self._fuse.point("before rename")
        old = target.read_bytes() if target.exists() else None
        super().replace(source, target)
        self.undo.append(lambda: target.unlink() if old is None else target.write_bytes(old))
        self._fuse.point("after rename")

    def remove(self, path: Path) -> None:
        self._fuse.point("before removal")
        if path.exists():
            old = path.read_bytes()
            self.undo.append(lambda: path.write_bytes(old))
        super().remove(path)
        self._fuse.point("after removal")


class World:
    """A fleet whose ann dies."""

    def __init__(self, folder: Path, fatal: list[int], *, machine: random.Random | None = None) -> None:
        folder.mkdir()
        self.folder = folder / "state"
        self.machine = machine
        self.fuse = Fuse(fatal, self._die)
        self.fleet = SmallFleet(folder, RunConfig(**SETTINGS))
        self.screens: list[StringIO] = []
        self.fleet.join("bob")
        self.ann = self._start()

    def _die(self) -> None:
        if self.machine is None:
            return
        for path in self.folder.glob("*/*"):
            status = path.stat()
            synced = self.disk.unsynced.get(status.st_ino, status.st_size)
            os.truncate(path, self.machine.randint(synced, status.st_size))
        if self.machine.random() < 0.5:
            for undo in self.disk.undo[::-1]:
                undo()

    def _start(self) -> Agent:
        self.disk = FusedDisk(self.fuse)
        fleet = self.fleet
        self.screens.append(StringIO())
        screen = Screen(self.screens[-1], is_terminal=False)
        kept = KeptSteps(self.folder, OWNER, screen.say, lambda: 20 * fleet.now_s, self.disk)
        identity = Identity("demo", "ann", 1000 + len(self.screens), "kseed test", "in-process")
        transport: Any = FusedTransport(fleet.network.transport("ann", will=session.will(identity)), self.fuse)
        agent = Agent(
            identity,
            transport,
            ResumingTrainer(LinearTrainer("ann"), kept, identity.agent, screen.say),
            clock=Clock(lambda: fleet.now_s, fleet.unix_ms),
            screen=screen,
            outbox=Outbox(self.folder, OWNER, screen.say, self.disk),
        )
        agent.start()
        return agent

    def play(self) -> World:
        for _ in range(3000):
            self.fleet.turn()
            try:
                if self.ann.ending is None and not self.ann.run_once(0.0):
                    self.ann.close()
            except Death:
                self.fleet.network.kill("ann")
                self.ann = self._start()
            if self.ann.ending is not None and self.fleet.agents["bob"].ending is not None:
                self.fleet.store.close()
                return self
        raise AssertionError(f"the run does not end: {self.fuse.deaths}\n{self.said}\n{self.fleet.log[-9:]}")

    @property
    def said(self) -> str:
        return "--- started again\n".join(screen.getvalue() for screen in self.screens)

    @property
    def accepted(self) -> dict[tuple[int, str], bytes]:
        rounds = accepted_updates(self.fleet.store.path)
        return {(number, device): encode(update) for number, of in rounds.items() for device, update in of.items()}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("device") / "calm", []).play()


def same(calm: World, world: World) -> None:
    story = f"{world.fuse.deaths}\n{world.said}"
    assert world.accepted == calm.accepted, story
    assert "conflict" not in world.said.lower(), story
    assert "set aside" not in world.said, story


def test_the_calm_run_passes_every_kind_of_point(calm: World) -> None:
    kinds = {point.split()[1] for point in calm.fuse.passed}
    assert kinds == {"write", "sync", "rename", "removal", "presence", "update"}
    assert sorted(calm.accepted) == [(0, "ann"), (0, "bob"), (1, "ann"), (1, "bob")]
    assert calm.said.count("update accepted") == 2


def test_death_of_the_process_at_any_point_changes_no_byte_of_an_update(calm: World, tmp_path: Path) -> None:
    assert len(calm.fuse.passed) > 60
    resumed = again = 0
    for number, point in enumerate(calm.fuse.passed):
        world = World(tmp_path / str(number), [number]).play()
        assert world.fuse.deaths == [point]
        same(calm, world)
        resumed += "going on after step" in world.said
        again += "sending the update that was made before" in world.said
    assert resumed > 10
    assert again > 5


def test_death_of_the_machine_at_any_point_changes_no_byte_of_an_update(calm: World, tmp_path: Path) -> None:
    for number, point in enumerate(calm.fuse.passed):
        world = World(tmp_path / str(number), [number], machine=random.Random(number)).play()
        assert world.fuse.deaths == [point]
        same(calm, world)


def test_a_second_death_soon_after_the_first_changes_nothing_either(calm: World, tmp_path: Path) -> None:
    deaths = 0
    for number in range(0, len(calm.fuse.passed), 2):
        world = World(tmp_path / str(number), [number, (7 * number) % 17]).play()
        deaths += len(world.fuse.deaths)
        same(calm, world)
    assert deaths > 0.9 * len(calm.fuse.passed)
