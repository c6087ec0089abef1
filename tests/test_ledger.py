"""The bytes of today on disk, and a whole agent that keeps to its budget."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from aggregator.config import RunConfig
from edge_client.agent import Agent
from edge_client.byte_budget import ByteLimits
from edge_client.ledger import Ledger, wire_bytes
from edge_client.outbox import Outbox
from edge_client.state import Sending
from edge_client.state_files import Disk, Owner
from edge_client.status import Layers
from shared.transport import TrafficCount
from tests.agents import steps_of
from tests.outboxes import outbox_in
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
    return SmallFleet(folder, RunConfig(**{**shape, **settings}))  # type: ignore[arg-type]


def thrifty(
    fleet: SmallFleet, device: str, limits: ByteLimits, folder: Path, now: list[datetime], outbox: Outbox | None = None
) -> Ledger:
    """Let a device join with a budget."""
    agent = fleet.join(device, outbox=outbox)
    made = Ledger(agent._transport, lambda: now[0], limits=limits, folder=folder, owner=OWNER, say=fleet.log.append)
    agent._ledger = made
    return made


def test_a_day_without_bytes_is_quiet_until_midnight_and_then_goes_on(tmp_path: Path) -> None:
    fleet = small(tmp_path, rounds=12)
    now = [LATE]
    kept = thrifty(fleet, "ann", ByteLimits(day_bytes=4_000), tmp_path, now)
    fleet.join("bob")
    agent = fleet.agents["ann"]
    fleet.run_until(lambda: agent.state.pause is not None)
    assert agent.state.pause is not None
    assert agent.state.pause.startswith("byte budget: ")
    assert agent.state.pause.endswith("; goes on at midnight")
    for _ in range(5):
        fleet.turn()
    spent, round_then = wire_bytes(kept.today()), fleet.service.state.progress.round
    assert spent <= 4_000
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


def spent_in_mid_round(folder: Path, quorum: int = 1) -> tuple[SmallFleet, Agent, Ledger, list[datetime]]:
    """Ann is in the middle of a round, and something has just taken the rest of her day's bytes."""
    fleet = small(folder, rounds=30, local_steps=40, quorum=quorum)
    now = [LATE]
    kept = thrifty(fleet, "ann", ByteLimits(day_bytes=40_000), folder, now)
    agent = fleet.agents["ann"]
    fleet.run_until(lambda: steps_of(agent) == 5)
    agent._transport.publish("kseed/elsewhere", bytes(40_000))
    return fleet, agent, kept, now


def test_a_round_that_has_begun_when_the_day_is_spent_is_finished_and_sent_and_the_next_one_waits(
    tmp_path: Path,
) -> None:
    fleet, agent, kept, now = spent_in_mid_round(tmp_path)
    number, before = fleet.service.state.progress.round, wire_bytes(kept.today())
    assert before > 40_000
    fleet.run_until(lambda: agent.state.pause is not None)
    assert agent.state.pause is not None and agent.state.pause.startswith("byte budget: ")
    assert agent.state.accepted == number
    fleet.join("bob")
    fleet.run_until(lambda: fleet.service.state.progress.round >= number + 3)
    assert agent.state.plan is not None and agent.state.plan.round == number
    update_bytes, note_bytes = 4 * 40 + 60, 2 * 150  # that of the pause in the presence, said and heard
    assert 0 < wire_bytes(kept.today()) - before < update_bytes + note_bytes
    now[0] += timedelta(days=1)
    fleet.run_until(lambda: agent.state.accepted is not None and agent.state.accepted > number)


def test_an_update_without_a_receipt_is_not_sent_again_and_again_past_the_limit(tmp_path: Path) -> None:
    fleet, agent, kept, now = spent_in_mid_round(tmp_path)
    fleet.network.kill("aggregator")
    fleet.service.turn = lambda timeout_s: None  # type: ignore[assignment, misc]
    fleet.run_until(lambda: agent.state.pause is not None)
    after = wire_bytes(kept.today())
    for _ in range(20):
        fleet.now_s += 60.0
        fleet.turn()
    assert wire_bytes(kept.today()) == after
    now[0] += timedelta(days=1)
    del fleet.service.turn
    fleet.serve()
    fleet.run_until(lambda: agent.state.accepted is not None)


def test_an_update_of_an_earlier_life_is_sent_past_the_limit(tmp_path: Path) -> None:
    fleet, agent, kept, now = spent_in_mid_round(tmp_path, quorum=2)
    number = fleet.service.state.progress.round
    agent._outbox = outbox_in(tmp_path / "state")[0]
    fleet.run_until(lambda: isinstance(agent.state.work, Sending))
    kept.save()
    fleet.kill("ann")
    outbox = outbox_in(tmp_path / "state")[0]
    assert outbox.read() is not None
    thrifty(fleet, "ann", ByteLimits(day_bytes=40_000), tmp_path, now, outbox=outbox)
    agent = fleet.agents["ann"]
    fleet.run_until(lambda: agent.state.accepted == number)
    fleet.run_until(lambda: agent.state.pause is not None)


def test_a_pause_of_another_kind_does_not_keep_plans_coming_that_no_bytes_are_left_for(tmp_path: Path) -> None:
    fleet = small(tmp_path, rounds=30)
    kept = thrifty(fleet, "ann", ByteLimits(day_bytes=3_000), tmp_path, [LATE])
    agent = fleet.agents["ann"]
    agent._gate = lambda: "it is hot"
    fleet.join("bob")
    fleet.run_until(lambda: fleet.service.state.progress.phase == "finished")
    assert agent.state.pause == "it is hot"
    assert wire_bytes(kept.today()) < 3_000
