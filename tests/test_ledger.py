"""The bytes of today on disk, and a whole agent that keeps to its budget."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from aggregator.config import RunConfig
from edge_client.byte_budget import ByteLimits
from edge_client.ledger import Ledger, wire_bytes
from edge_client.state_files import Disk, Owner
from edge_client.status import Layers
from shared.transport import TrafficCount
from tests.small_fleet import SmallFleet

OWNER = Owner("in-process", "demo", "ann")
NOON = datetime(2026, 11, 20, 12, 0)
LATE = datetime(2026, 11, 20, 23, 59)  # few pings are left in the day


class Wire:
    """A transport that only counts: what `spend` says, in all layers."""

    def __init__(self) -> None:
        self.bytes = 0

    def spend(self, count: int) -> None:
        self.bytes += count

    def traffic(self) -> TrafficCount:
        n = self.bytes
        return TrafficCount(n, 0, 2 * n, 0, 2 * n, 0, 3 * n, 0)


def ledger(wire: Wire, folder: Path | None, now: datetime = NOON, **more: object) -> Ledger:
    return Ledger(wire, lambda: now, folder=folder, owner=OWNER, **more)  # type: ignore[arg-type]


def file_of(folder: Path) -> Path:
    return folder / OWNER.folder_name / "bytes"


def test_a_day_goes_on_where_an_earlier_life_of_it_stopped(tmp_path: Path) -> None:
    wire = Wire()
    first = ledger(wire, tmp_path)
    wire.spend(100)
    assert first.today() == Layers("2026-11-20", 100, 0, 200, 0, 300, 0)
    first.save()
    again = ledger(Wire(), tmp_path)
    assert again.today() == Layers("2026-11-20", 100, 0, 200, 0, 300, 0)
    assert ledger(Wire(), tmp_path, NOON + timedelta(days=1)).today() == Layers("2026-11-21", 0, 0, 0, 0, 0, 0)


def test_a_killed_agent_forgets_little(tmp_path: Path) -> None:
    wire = Wire()
    killed = ledger(wire, tmp_path)
    for _ in range(100):
        wire.spend(100)
        killed.today()
    kept = wire_bytes(ledger(Wire(), tmp_path).today())
    assert 30_000 - 4096 - 300 < kept <= 30_000


def test_a_clock_that_is_wrong_for_a_while_costs_today_nothing_of_its_count(tmp_path: Path) -> None:
    wire = Wire()
    first = ledger(wire, tmp_path)
    wire.spend(100)
    first.today()
    first.save()
    now, wire = datetime(1970, 1, 1), Wire()  # booted without a battery for the clock
    again = Ledger(wire, lambda: now, folder=tmp_path, owner=OWNER)  # type: ignore[arg-type]
    wire.spend(10)
    assert again.today() == Layers("1970-01-01", 10, 0, 20, 0, 30, 0)
    again.save()
    now = NOON
    wire.spend(1)
    assert again.today() == Layers("2026-11-20", 101, 0, 202, 0, 303, 0)
    again.save()
    assert wire_bytes(ledger(Wire(), tmp_path).today()) == 303


@pytest.mark.parametrize("damage", [b"", b"{}", b"junk\n" * 9, None])
def test_a_damaged_count_is_set_aside_in_a_line_and_the_day_begins_at_0(tmp_path: Path, damage: bytes | None) -> None:
    wire, said = Wire(), []
    first = ledger(wire, tmp_path)
    wire.spend(100)
    first.today()
    first.save()
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    assert wire_bytes(ledger(Wire(), tmp_path, say=said.append).today()) == 0
    assert len(said) == 1
    assert said[0].startswith("warning: ignored the bytes of today in ")
    assert path.with_name("bytes.set-aside").exists()


def test_a_disk_that_refuses_is_said_and_nothing_else_happens(tmp_path: Path) -> None:
    class Full(Disk):
        def write(self, file: int, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    wire, said = Wire(), []
    full = ledger(wire, tmp_path, say=said.append, disk=Full())
    wire.spend(100)
    full.today()
    full.save()
    assert said == [f"warning: the bytes of today cannot be written to {file_of(tmp_path)}: No space left on device"]
    assert wire_bytes(full.today()) == 300


def test_the_outermost_layer_that_is_known_counts() -> None:
    assert wire_bytes(Layers("", 1, 2, 3, 4, 5, 6)) == 11
    assert wire_bytes(Layers("", 1, 2, 3, 4, None, None)) == 7
    assert wire_bytes(Layers("", 1, 2, None, None, None, None)) == 3


# A fleet in one process counts payloads alone.


def small(folder: Path, **settings: object) -> SmallFleet:
    """A run of a few short rounds that any one device closes."""
    shape: dict[str, object] = {"seeds": 256, "local_steps": 6, "quorum": 1, "batch_size": 1, "deadline_s": 1e6}
    shape |= {"scalar_format": "f32", "change_format": "f32"}
    return SmallFleet(folder, RunConfig(**{**shape, **settings}))  # type: ignore[arg-type]


def thrifty(fleet: SmallFleet, device: str, limits: ByteLimits, folder: Path, now: list[datetime]) -> Ledger:
    """Let a device join with a budget."""
    agent = fleet.join(device)
    made = Ledger(agent._transport, lambda: now[0], limits=limits, folder=folder, owner=OWNER, say=fleet.log.append)
    agent._ledger = made
    return made


def test_a_day_without_bytes_is_quiet_until_midnight_and_then_goes_on(tmp_path: Path) -> None:
    fleet = small(tmp_path, rounds=12)
    now = [LATE]
    kept = thrifty(fleet, "ann", ByteLimits(day_bytes=3_000), tmp_path, now)
    fleet.join("bob")
    agent = fleet.agents["ann"]
    fleet.run_until(lambda: agent.state.pause is not None)
    assert agent.state.pause is not None
    assert agent.state.pause.startswith("byte budget: ")
    assert agent.state.pause.endswith("; goes on at midnight")
    for _ in range(5):
        fleet.turn()
    spent, round_then = wire_bytes(kept.today()), fleet.service.state.progress.round
    assert spent <= 3_000
    fleet.run_until(lambda: fleet.service.state.progress.round >= round_then + 3)  # bob's
    assert wire_bytes(kept.today()) == spent  # no plan, no change
    now[0] += timedelta(days=1)
    fleet.run_until(lambda: agent.state.pause is None)
    fleet.run_to_the_end()
    assert wire_bytes(kept.today()) > 0


def test_a_budget_that_is_spent_survives_a_restart(tmp_path: Path) -> None:
    fleet = small(tmp_path, rounds=30)
    now = [LATE]
    thrifty(fleet, "ann", ByteLimits(day_bytes=3_000), tmp_path, now)
    fleet.join("bob")
    fleet.run_until(lambda: fleet.agents["ann"].state.pause is not None)
    fleet.kill("ann")
    thrifty(fleet, "ann", ByteLimits(day_bytes=3_000), tmp_path, now)
    agent = fleet.agents["ann"]
    fleet.turn()
    fleet.turn()
    assert agent.state.pause is not None
    assert agent.state.pause.startswith("byte budget: ")


def test_a_round_beyond_round_bytes_is_not_worked_on_and_the_reason_is_in_the_presence(tmp_path: Path) -> None:
    fleet = small(tmp_path, rounds=3, local_steps=50)
    thrifty(fleet, "ann", ByteLimits(round_bytes=1_000), tmp_path, [NOON])
    fleet.join("bob")
    agent = fleet.agents["ann"]
    fleet.run_until(lambda: agent.state.pause is not None)
    assert agent.state.pause is not None
    assert "round_bytes is 1000; goes on with a plan of fewer steps" in agent.state.pause
    fleet.run_until(lambda: fleet.service.state.progress.phase == "finished")
    assert agent._tally.losses == []
