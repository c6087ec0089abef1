"""An update without a receipt outlives its agent: the same bytes go out again, and no disk stops a round."""

from __future__ import annotations

import numpy as np

from aggregator.config import RunConfig
from edge_client.state import Sending, Settled, waiting
from shared.faults import Fault, Faults, Hop, Strike
from shared.transport import Received
from tests.agents import ONE_ROUND, said, steps_of
from tests.outboxes import DiskThatIsFullFor, FullDisk, file_in, outbox_in
from tests.small_fleet import LinearTrainer, SmallFleet
from tests.test_faults import accepted_updates


def sent_updates(fleet: SmallFleet) -> list[bytes]:
    """Everything that comes in on the update topic from now on, in the list that is returned."""
    watcher = fleet.network.transport("watcher")
    watcher.subscribe("kseed/demo/update/ann")
    watcher.start()
    seen: list[bytes] = []
    turn = fleet.turn

    def watched() -> None:
        turn()
        while (event := watcher.poll(0.0)) is not None:
            if isinstance(event, Received):
                seen.append(event.payload)

    fleet.turn = watched  # type: ignore[method-assign]
    return seen


def test_killed_agent_sends_the_same_bytes_again_and_they_count_once(tmp_path):
    lost = Strike(Fault.LOSE, topic_part="receipt/ann", hop=Hop.DOWN)
    fleet = SmallFleet(tmp_path, RunConfig(**{**ONE_ROUND, "quorum": 2}), faults=Faults(strikes=(lost,)))
    seen = sent_updates(fleet)
    agent = fleet.join("ann", outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_until(lambda: isinstance(agent.state.work, Sending) and bool(seen))
    for _ in range(20):
        fleet.turn()
    assert isinstance(agent.state.work, Sending)  # its receipt was lost
    fleet.kill("ann")
    trainer = LinearTrainer("ann")
    again = fleet.join("ann", trainer, outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_until(lambda: isinstance(again.state.work, Settled))
    assert "round 0: update duplicate" in said(fleet)
    assert trainer.loads == 0
    assert seen == [seen[0]] * 2
    fleet.join("bob")
    fleet.run_to_the_end()
    assert [sorted(updates) for updates in accepted_updates(fleet.store.path).values()] == [["ann", "bob"]] * 2
    assert not file_in(tmp_path / "state").exists()


def test_agent_killed_before_the_broker_had_the_update_brings_it_in_its_next_life(tmp_path):
    fleet = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    agent = fleet.join("ann", outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_until(lambda: steps_of(agent) == 5)
    fleet.network.stop_broker()
    for _ in range(20):
        fleet.turn()
    assert isinstance(agent.state.work, Sending)
    update = agent.state.work.update
    fleet.kill("ann")
    fleet.network.start_broker()
    fleet.join("ann", outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_to_the_end()
    assert accepted_updates(fleet.store.path)[0]["ann"] == update


def test_full_disk_under_the_outbox_does_not_stop_the_training(tmp_path):
    calm = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    calm.join("ann")
    calm.run_to_the_end()
    (tmp_path / "full").mkdir()
    fleet = SmallFleet(tmp_path / "full", RunConfig(**ONE_ROUND))
    outbox, lines = outbox_in(tmp_path / "state", FullDisk())
    fleet.join("ann", outbox=outbox)
    fleet.run_to_the_end()
    assert len(lines) == 2
    assert np.array_equal(fleet.coefficients, calm.coefficients)


def test_an_agent_tries_again_to_write_its_update_while_it_waits_for_the_receipt(tmp_path):
    fleet = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    outbox, lines = outbox_in(tmp_path / "state", DiskThatIsFullFor(1))
    agent = fleet.join("ann", outbox=outbox)
    fleet.run_until(lambda: bool(agent.state.plan))
    fleet.network.kill("aggregator")  # and nobody sends a receipt
    while not lines:
        agent.run_once(0.0)
    agent.run_once(0.0)
    assert lines[-1].endswith(" now")
    assert outbox.read() == waiting(agent.state)
