"""A device that comes back: after kill -9 in mid-round, after a month, into a run made anew with another pool."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aggregator.config import RunConfig
from aggregator.store import Store
from edge_client.agent import Agent
from edge_client.events import CloseRound, Forget, Publish, Rebuild, Subscribe, Tick, Unsubscribe
from edge_client.kept_steps import KeptSteps, ResumingTrainer
from edge_client.outbox import Outbox
from edge_client.state import Held, Sending, Settled
from shared.messages import Plan
from shared.transport import Connected, Disconnected, Received
from tests.agents import ONE_ROUND, said, steps_of
from tests.brokers import needs_mosquitto, running_mosquitto
from tests.disks import fill
from tests.driven_session import NEXT, SNAPSHOT_TOPIC, Driven, only, snapshot
from tests.outboxes import OWNER, outbox_in
from tests.programs import created, ended, started, tiny_folder
from tests.small_fleet import LinearTrainer, SmallFleet
from tests.test_faults import accepted_updates

MONTH_S = 30 * 86_400.0


def heard_kinds(agent: Agent) -> list[str]:
    """The kinds of all messages that reach the agent from now on, in the list that is returned."""
    kinds: list[str] = []
    poll = agent._transport.poll

    def noted(timeout_s: float) -> object:
        event = poll(timeout_s)
        if isinstance(event, Received):
            kinds.append(event.topic.split("/")[2])
        return event

    agent._transport.poll = noted  # type: ignore[method-assign,assignment]
    return kinds


def test_device_back_after_a_month_is_current_after_one_snapshot(tmp_path):
    fleet = SmallFleet(tmp_path, RunConfig(**{**ONE_ROUND, "rounds": 12}))
    fleet.join("ann", outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_until(lambda: fleet.service.state.progress.round == 1)
    fleet.kill("ann")
    fleet.network.expire_session("ann")
    fleet.join("bob")
    fleet.run_until(lambda: fleet.service.state.progress.round == 10)
    fleet.kill("bob")
    fleet.now_s += MONTH_S
    trainer = LinearTrainer("ann")
    agent = fleet.join("ann", trainer, outbox=outbox_in(tmp_path / "state")[0])
    kinds = heard_kinds(agent)
    fleet.run_until(lambda: bool(trainer.rebuilds))
    assert trainer.rebuilds == [10]
    assert sorted(kind for kind in kinds if kind != "presence") == ["plan", "run", "snapshot"]
    assert agent.state.held == Held(10, fleet.coefficients.tobytes())
    fleet.run_to_the_end()
    assert "ann" in accepted_updates(fleet.store.path)[10]


def test_agent_cut_off_for_a_month_is_current_after_one_snapshot():
    driven = Driven().sending()
    driven.on(Disconnected("no route to host"), Tick(MONTH_S, 1_000_000 + round(MONTH_S * 1000)))
    assert not only(driven.on(Tick(MONTH_S + 1, 1_000_000)), Publish)
    driven.on(Connected("MQTT 5", False))
    plan: Plan = msgspec.structs.replace(NEXT, round=4000, nonce=b"n" * 16, published_at_ms=10**12)
    actions = driven.hear(plan, is_retained=True)
    assert actions == [Forget(), CloseRound(3, None), Subscribe(SNAPSHOT_TOPIC)]
    actions = driven.hear(snapshot(4000), is_retained=True)
    assert [type(action) for action in actions] == [Unsubscribe, Rebuild]
    assert driven.state.held is not None
    assert driven.state.held.version == 4000


def test_device_back_in_a_run_made_anew_with_another_pool_sends_nothing_old_and_is_current(tmp_path):
    for name in ("old", "new", "fresh"):
        (tmp_path / name).mkdir()
    old = SmallFleet(tmp_path / "old", RunConfig(**{**ONE_ROUND, "quorum": 2}))
    agent = old.join("ann", outbox=outbox_in(tmp_path / "state")[0])
    old.run_until(lambda: steps_of(agent) == 5)
    old.network.stop_broker()
    old.run_until(lambda: isinstance(agent.state.work, Sending))
    old.kill("ann")
    assert (tmp_path / "state" / OWNER.folder_name / "update").exists()

    new = SmallFleet(tmp_path / "new", RunConfig(**ONE_ROUND), seed=2)
    kinds = heard_kinds(new.join("ann", outbox=outbox_in(tmp_path / "state")[0]))
    new.run_to_the_end()
    assert kinds.count("snapshot") == 1
    assert "round 0 is over; dropped its update, which never had a receipt" in said(new)
    fresh = SmallFleet(tmp_path / "fresh", RunConfig(**ONE_ROUND), seed=2)
    fresh.join("ann")
    fresh.run_to_the_end()
    assert accepted_updates(new.store.path) == accepted_updates(fresh.store.path)


def test_disk_that_is_full_in_mid_round_costs_a_line_and_with_room_again_work_is_kept_again(tiny_disk, tmp_path):
    fleet = SmallFleet(tmp_path, RunConfig(**{**ONE_ROUND, "rounds": 3, "quorum": 2, "min_updates": 2}))
    state, lines = tiny_disk / "state", []
    kept = KeptSteps(state, OWNER, lines.append, lambda: fleet.now_s)
    outbox = Outbox(state, OWNER, lines.append)
    agent = fleet.join("ann", ResumingTrainer(LinearTrainer("ann"), kept, "kseed test", lines.append), outbox=outbox)
    fleet.run_until(lambda: steps_of(agent) == 3)
    filler = fill(tiny_disk)
    fleet.run_until(lambda: isinstance(agent.state.work, Settled))
    assert len(lines) == 1
    assert "the update of round 0 cannot be written to" in lines[0]
    assert "No space left on device. It is sent from memory" in lines[0]
    fleet.join("bob")
    fleet.run_until(lambda: len(lines) == 3)
    assert "the steps of this round cannot be kept in" in lines[1]
    filler.unlink()
    fleet.run_to_the_end()
    assert len(lines) == 3
    assert [sorted(updates) for updates in accepted_updates(fleet.store.path).values()] == [["ann", "bob"]] * 3


def coefficients_of_a_run(folder: Path, model: Path, rows: Path, *, is_killed: bool) -> tuple[bytes, str]:
    """A run of one device as real processes; the agent is killed in mid-round and started again, or not."""
    config = RunConfig(seeds=256, rounds=1, local_steps=400, batch_size=2, quorum=1, min_updates=1, deadline_s=900.0)
    folder.mkdir()
    with running_mosquitto(folder) as broker:
        where = f"{broker.host}:{broker.port}"
        store = created(folder / "store.sqlite", model, config)
        serving = started("serve", "spring", "--store", store, "--broker", where, program="aggregator.cli")
        words = ("join", "spring", "--broker", where, "--data", rows, "--max-length", "40", "--wait", "--device", "ann")
        words += ("--state-dir", folder / "state", "--threads", "1", "--kernel", "numba")
        if is_killed:
            first = started(*words, "--cpu-percent", "20")  # so that it is not done before it is killed
            steps_kept(first, folder / "state", 20)
            first.send_signal(signal.SIGKILL)
            first.wait()
        code, out, err = ended(started(*words), 120.0)
        assert (code, err) == (0, "")
        assert ended(serving)[0] == 0
    with Store.open(store) as opened:
        return opened.coefficients("spring", 1), out


def steps_kept(agent: object, folder: Path, steps: int) -> None:
    """Wait until so many steps of the agent are in its file."""
    until_s = time.monotonic() + 120.0
    while sum(path.stat().st_size for path in folder.glob("*/steps")) < 28 * (steps + 20):
        assert agent.poll() is None, "it ended before it was killed"  # type: ignore[attr-defined]
        assert time.monotonic() < until_s
        time.sleep(0.005)


@needs_mosquitto
@pytest.mark.broker
def test_agent_killed_in_mid_round_and_started_again_gives_the_coefficients_of_one_that_was_not(tmp_path, data):
    model = tiny_folder(tmp_path / "tiny")
    calm, out = coefficients_of_a_run(tmp_path / "calm", model, data, is_killed=False)
    assert "going on" not in out
    killed, out = coefficients_of_a_run(tmp_path / "killed", model, data, is_killed=True)
    assert "round 0: going on after step " in out
    assert killed == calm
    assert any(np.frombuffer(calm, "<f4"))
