"""The agent as a service, on the in-process network: pauses, deadlines, endings and bad peers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_client.events import Rebuilt
from edge_client.progress import activity
from edge_client.state import Limits
from shared.errors import UserError
from shared.messages import Presence, Receipt
from shared.refusals import Refusal
from shared.wire import encode
from tests.agents import BrokenTrainer, presence_of, said, small, steps_of
from tests.small_fleet import LinearTrainer, base_weights
from tests.test_faults import accepted_updates


def test_rebuild_happens_once_per_round(tmp_path):
    fleet = small(tmp_path)
    trainer = LinearTrainer("ann")
    fleet.join("ann", trainer)
    fleet.run_to_the_end()
    assert trainer.rebuilds == [0, 1, 2, 3, 4]
    assert Rebuilt(4, b"").version == 4
    assert np.array_equal(trainer.coefficients, fleet.coefficients)


# Pausing.


def test_closed_gate_stops_within_a_step_shows_why_and_goes_on_where_it_was(tmp_path):
    fleet = small(tmp_path)
    reasons: list[str | None] = [None]
    agent = fleet.join("ann", gate=lambda: reasons[0])
    fleet.run_until(lambda: steps_of(agent) == 2)
    reasons[0] = "on battery. Work goes on when it is plugged in."
    for _ in range(50):
        fleet.turn()
    assert steps_of(agent) == 2
    assert presence_of(fleet, "ann").note == reasons[0]
    assert activity(agent.state, agent._jobs.report) == f"paused: {reasons[0]}"
    reasons[0] = None
    fleet.run_to_the_end()
    assert presence_of(fleet, "ann") == Presence(False, 1, 1, 1, "kseed test", "")
    assert said(fleet).count("paused: on battery") == 1
    assert said(fleet).count("working again") == 1
    assert len(accepted_updates(fleet.store.path)[0]["ann"].scalars) == 2 * 6  # f16


def test_model_is_not_loaded_while_the_gate_is_closed(tmp_path):
    fleet = small(tmp_path)
    reasons: list[str | None] = ["memory"]
    trainer = LinearTrainer("ann")
    fleet.join("ann", trainer, gate=lambda: reasons[0])
    for _ in range(50):
        fleet.turn()
    assert trainer.loads == 0
    reasons[0] = None
    fleet.run_to_the_end()
    assert trainer.loads == 1


# Rounds that end without this device.


def test_device_that_is_too_slow_for_a_round_drops_it_and_follows(tmp_path):
    fleet = small(tmp_path)
    reasons: list[str | None] = [None]
    slow = fleet.join("slow", gate=lambda: reasons[0])
    fleet.run_until(lambda: steps_of(slow) == 2)
    reasons[0] = "busy"
    fleet.join("ann")
    fleet.run_until(lambda: fleet.service.state.progress.round == 2)
    reasons[0] = None
    fleet.run_to_the_end()
    assert "round 1 has begun; dropping the work of the round before" in said(fleet, "slow")
    assert slow.state.held == fleet.agents["ann"].state.held


def test_slow_device_sends_what_it_has_before_the_deadline(tmp_path):
    fleet = small(tmp_path, local_steps=200, deadline_s=2.0, rounds=2)
    fleet.join("ann")
    fleet.run_to_the_end()
    rounds = accepted_updates(fleet.store.path)
    for number in (0, 1):
        assert 10 < len(rounds[number]["ann"].scalars) // 4 < 40
    assert "the deadline is near: sending what there is" in said(fleet)


# The end.


def test_leaving_finishes_the_step_says_goodbye_and_keeps_the_connection_clean(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann")
    fleet.run_until(lambda: steps_of(agent) == 3)
    agent.leave()
    fleet.turn()
    assert agent.ending is not None
    assert (agent.ending.exit_code, agent.ending.text) == (0, "left run 'demo'")
    assert not presence_of(fleet, "ann").online
    assert fleet.network._sessions["ann"].link is None


def test_broker_that_stays_away_ends_the_agent(tmp_path):
    fleet = small(tmp_path)
    fleet.network.stop_broker()
    agent = fleet.join("ann", limits=Limits(connect_timeout_s=3.0))
    fleet.run_until(lambda: agent.ending is not None)
    assert agent.ending is not None
    assert agent.ending.exit_code == 4
    assert fleet.now_s == pytest.approx(3.0, abs=0.2)


def test_waiting_agent_joins_when_broker_and_run_come(tmp_path):
    fleet = small(tmp_path)
    fleet.network.stop_broker()
    fleet.join("ann", limits=Limits(connect_timeout_s=None, run_timeout_s=None))
    for _ in range(2000):
        fleet.turn()
    fleet.network.start_broker()
    fleet.run_to_the_end()
    assert "is finished at version 4" in fleet.agents["ann"].ending.text  # type: ignore[union-attr]


def test_wrong_model_ends_the_agent_with_the_difference(tmp_path):
    fleet = small(tmp_path)
    other = base_weights()
    other["weight"][0, 0] += 1
    agent = fleet.join("ann", LinearTrainer("ann", other))
    fleet.run_until(lambda: agent.ending is not None)
    assert agent.ending is not None
    assert agent.ending.exit_code == 2
    assert agent.ending.text.startswith(
        "this model is not the one of run 'demo': the tensors are alike, but the weights"
    )
    assert not presence_of(fleet, "ann").online
    assert accepted_updates(fleet.store.path) == {}


def test_data_that_turns_out_unusable_ends_the_agent_in_one_line(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann", BrokenTrainer("load", UserError("reviews.jsonl line 7 has no field 'label'")))
    fleet.run_until(lambda: agent.ending is not None)
    assert agent.ending is not None
    assert (agent.ending.exit_code, agent.ending.text) == (2, "reviews.jsonl line 7 has no field 'label'")
    assert not presence_of(fleet, "ann").online


def test_bug_in_training_still_says_goodbye(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann", BrokenTrainer("train", ZeroDivisionError("a bug")))
    fleet.service.turn(0.0)
    with pytest.raises(ZeroDivisionError):
        while True:
            fleet.service.turn(0.0)
            agent.run()
    assert not presence_of(fleet, "ann").online


# Two agents with one id.


def test_second_agent_of_one_id_ends_the_first_and_goes_on(tmp_path):
    fleet = small(tmp_path, rounds=3)
    first = fleet.join("ann")
    fleet.run_until(lambda: fleet.service.state.progress.round == 1)
    second = fleet.join("ann")
    while first.run_once(0.0) or second.state.run is None:
        fleet.turn()
    assert first.ending is not None
    assert first.ending.exit_code == 3
    assert first.ending.text.startswith("another agent runs with the device id 'ann' in run 'demo'")
    assert presence_of(fleet, "ann").online
    fleet.run_to_the_end()
    assert second.ending is not None
    assert second.ending.exit_code == 0


def test_agent_that_comes_back_after_a_kill_is_no_second_agent(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann")
    fleet.run_until(lambda: steps_of(agent) == 2)
    fleet.kill("ann")
    again = fleet.join("ann")
    fleet.run_to_the_end()
    assert again.ending is not None
    assert again.ending.exit_code == 0


# Bad peers.

JUNK = (b"", b"\x01", b"\x01\x02", b"\x63\x02junk", b"\x01\x02\xc1", bytes(100), b"\x01\x06" + b"\x91" * 3000)


@pytest.mark.parametrize("kind", ["run", "plan", "snapshot", "receipt/ann", "presence/ann", "update/ann", "x"])
def test_junk_on_any_topic_changes_nothing(tmp_path, kind):
    fleet = small(tmp_path)
    rogue = fleet.network.transport("rogue")
    rogue.start()
    agent = fleet.join("ann")
    fleet.run_until(lambda: steps_of(agent) == 2)
    before = agent.state
    for payload in JUNK:
        rogue.publish(f"kseed/demo/{kind}", payload)
    assert agent.run_once(0.0)
    assert replace(agent.state, now_s=before.now_s, unix_ms=before.unix_ms) == before
    assert kind in ("x", "update/ann", "snapshot") or "ignored a kseed/demo/" in said(fleet)
    fleet.run_to_the_end()
    assert len(fleet.store.reports("demo")) == 4


def test_forged_receipts_of_other_rounds_change_nothing(tmp_path):
    fleet = small(tmp_path)
    rogue = fleet.network.transport("rogue")
    rogue.start()
    fleet.join("ann")
    for number in (0, 3, 99):
        rogue.publish("kseed/demo/receipt/ann", encode(Receipt(number, int(Refusal.STALE_ROUND), "")))
    fleet.run_to_the_end()
    assert [len(updates) for updates in accepted_updates(fleet.store.path).values()] == [1] * 4
