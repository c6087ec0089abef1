"""The agent as a service, on the in-process network: pauses, deadlines, endings, bad peers, and what it shows."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from aggregator.config import RunConfig
from edge_client.agent import Agent
from edge_client.events import Rebuilt
from edge_client.jobs import HeldOutReport, Job, Report, StepReport
from edge_client.progress import Screen, Status, activity, byte_text, status_line
from edge_client.state import Limits, Link, State, Training
from edge_client.tally import MetricsFile, Tally, round_line
from shared.errors import UserError
from shared.messages import Plan, Presence, Receipt, Run
from shared.refusals import Refusal
from shared.transport import TrafficCount
from shared.wire import decode, encode
from tests.driven_session import PLAN
from tests.small_fleet import LinearTrainer, SmallFleet, base_weights
from tests.test_faults import accepted_updates

CONFIG = RunConfig(
    seeds=256, rounds=4, local_steps=6, batch_size=1, step="plain", lr=0.02, quorum=1, deadline_s=30.0, evaluate_every=0
)


def small(folder: Path, **settings: object) -> SmallFleet:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__}
    return SmallFleet(folder, RunConfig(**{**fields, **settings}))


def presence_of(fleet: SmallFleet, device: str) -> Presence:
    """What is retained about the device."""
    message = decode("presence", fleet.network.retained[f"kseed/demo/presence/{device}"])
    assert isinstance(message, Presence)
    return message


def steps_of(agent: Agent) -> int:
    return agent._jobs.report.step if isinstance(agent._jobs.report, StepReport) else 0


def said(fleet: SmallFleet, device: str = "ann") -> str:
    return fleet.screens[device].getvalue()


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


class BrokenTrainer(LinearTrainer):
    """Raises where it is told to."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__("ann")
        self._where, self._error = where, error

    def load(self, run: Run):  # type: ignore[no-untyped-def]
        if self._where == "load":
            raise self._error
        return super().load(run)

    def train(self, plan: Plan, model_digest: bytes, done: tuple[Report, ...] = ()) -> Job:
        if self._where == "train":
            raise self._error
        return (yield from super().train(plan, model_digest, done))


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


# What it shows and keeps.


def test_log_has_a_line_per_round_with_losses_and_bytes(tmp_path):
    fleet = small(tmp_path, evaluate_every=1)
    fleet.join("ann")
    fleet.run_to_the_end()
    lines = [line for line in said(fleet).splitlines() if line.startswith("round 2 over")]
    assert len(lines) == 1
    assert "accepted, 6 steps, train loss " in lines[0]
    assert "held-out loss " in lines[0]
    assert " B up, " in lines[0]


def test_metrics_count_each_byte_once(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann", metrics=tmp_path / "deep" / "metrics.jsonl")
    fleet.run_to_the_end()
    lines = [json.loads(line) for line in (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()]
    offline = len(encode(presence_of(fleet, "ann")))
    assert sum(line["payload_sent_bytes"] for line in lines) + offline == agent._transport.traffic().payload_sent_bytes
    assert lines[0]["socket_sent_bytes"] is None
    assert [line["receipt"] for line in lines] == ["accepted"] * 4 + [None]
    assert all(line["steps_s"] == 0 for line in lines)  # the test's clock stands still while the agent works


def test_full_disk_under_the_metrics_does_not_stop_the_training(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann", metrics=tmp_path / "metrics.jsonl")
    fleet.run_until(lambda: steps_of(agent) == 2)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    fleet.run_to_the_end()
    assert f"warning: metrics file {tmp_path / 'metrics.jsonl'} cannot be written: Is a directory" in said(fleet)


def test_metrics_file_in_an_impossible_place_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"metrics file .*file/metrics.jsonl cannot be written: .* Choose another place"
    ):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


def test_live_line_is_rewritten_below_what_is_said():
    stream = StringIO()
    screen = Screen(stream, is_terminal=True)
    screen.show("step 1", 0.0)
    screen.show("step 2", 0.05)  # too soon
    screen.say("round 0 over")
    screen.show("step 3", 0.2)
    screen.end()
    assert stream.getvalue() == "\r\x1b[Kstep 1\r\x1b[Kround 0 over\nstep 1\r\x1b[Kstep 3\r\x1b[K"


def test_no_live_line_where_there_is_no_terminal():
    stream = StringIO()
    screen = Screen(stream, is_terminal=False)
    screen.show("step 1", 0.0)
    screen.say("round 0 over")
    screen.end()
    assert stream.getvalue() == "round 0 over\n"


def test_live_line_shows_run_round_step_loss_memory_and_bytes():
    count = TrafficCount(100, 200, 1, 2, 3, 4, 1234, 56789)
    status = Status("demo", 3, "step 4/20", 2.34567, 812_000_000, count)
    assert status_line(status) == "demo | round 3 | step 4/20 | loss 2.346 | memory 812 MB | up 1.2 kB, down 56.8 kB"
    bare = Status("demo", None, "waiting for a plan", None, None, TrafficCount(100, 200, None, None))
    assert status_line(bare) == "demo | waiting for a plan | up 100 B, down 200 B"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (999_499, "999 kB"), (999_500, "1.0 MB")],
)
def test_bytes_are_shown_in_powers_of_a_thousand(count, text):
    assert byte_text(count) == text
    assert byte_text(10**13) == "10000 GB"


def test_activity_says_why_nothing_happens(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann")
    assert activity(agent.state, None) == "no connection to in-process"
    seen = set()

    def note() -> bool:
        seen.add(activity(agent.state, agent._jobs.report))
        return agent.ending is not None

    fleet.run_until(note)
    assert {"step 1/6", "step 6/6", "waiting for the receipt"} <= seen


def test_held_out_progress_is_an_activity(tmp_path):
    state: State = small(tmp_path).join("ann").state
    working = replace(state, link=Link(is_connected=True), plan=PLAN, work=Training(None))
    assert activity(working, HeldOutReport(16, 40)) == "held-out 16/40"
    assert activity(working, None) == "starting"


def test_work_on_an_older_version_does_not_count_in_a_round():
    tally = Tally(TrafficCount(0, 0, None, None))
    tally.losses = [1.0, 2.0]
    tally.rebuilt(4, b"d" * 16, 0.5)
    metrics, _ = tally.close(
        run="demo", device="ann", round_number=4, receipt=None, traffic=TrafficCount(5, 6, 7, 8), unix_ms=0
    )
    assert (metrics.steps, metrics.train_loss, metrics.version) == (0, None, 4)
    assert metrics.socket_sent_bytes is None
    assert round_line(metrics) == "round 4 over: no receipt, 0 steps, payload 5 B up, 6 B down"


def test_rebuild_happens_once_per_round(tmp_path):
    fleet = small(tmp_path)
    trainer = LinearTrainer("ann")
    fleet.join("ann", trainer)
    fleet.run_to_the_end()
    assert trainer.rebuilds == [0, 1, 2, 3, 4]
    assert Rebuilt(4, b"").version == 4
    assert np.array_equal(trainer.coefficients, fleet.coefficients)
