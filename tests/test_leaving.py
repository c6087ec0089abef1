"""`kseed-edge finish`, and a kill before it has taken effect: the next life finishes the round, then leaves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from aggregator.config import RunConfig
from edge_client import session
from edge_client.agent import Agent
from edge_client.events import (
    Begun,
    Finish,
    GateChanged,
    LeaveAfterRound,
    LoadModel,
    Publish,
    Rebuild,
    Rebuilt,
    Say,
    Subscribe,
    Tick,
    Train,
    Trained,
    TrainingFailed,
)
from edge_client.kept_steps import KeptSteps, ResumingTrainer
from shared.messages import Listed, Receipt
from shared.refusals import Refusal
from tests.agents import ONE_ROUND, said, steps_of
from tests.driven_session import (
    DIGEST,
    IDENTITY,
    NEXT,
    PLAN,
    READY,
    SNAPSHOT_TOPIC,
    UPDATE,
    UPDATE_TOPIC,
    Driven,
    finish,
    only,
    snapshot,
)
from tests.outboxes import OWNER, outbox_in
from tests.small_fleet import LinearTrainer, SmallFleet
from tests.test_faults import accepted_updates

BEGUN = Begun(PLAN.round, PLAN.nonce)


def leaving_with(begun: Begun | None) -> Driven:
    """An agent that was started again after its owner had asked it to finish."""
    driven = Driven()
    driven.state = session.start(IDENTITY, 0.0, 1_000_000, begun=begun)
    driven.on(LeaveAfterRound(True))
    return driven


def test_a_round_that_an_earlier_life_began_is_finished_and_sent_before_the_agent_leaves() -> None:
    driven = leaving_with(BEGUN).joined()
    assert only(driven.hear(PLAN, is_retained=True), LoadModel)
    assert driven.on(READY)[-1] == Subscribe(SNAPSHOT_TOPIC)
    assert only(driven.hear(snapshot(3)), Rebuild)
    assert driven.on(Rebuilt(3, DIGEST)) == [Train(PLAN, DIGEST)]
    assert driven.on(Trained(UPDATE), Tick(1.0, 1_000_000))[-1] == Publish(UPDATE_TOPIC, UPDATE)
    assert finish(driven.hear(Receipt(3, int(Refusal.ACCEPTED), ""))).text == "left run 'demo'"


@pytest.mark.parametrize(
    "plan",
    [NEXT, msgspec.structs.replace(PLAN, nonce=b"another-run-of-3"), msgspec.structs.replace(PLAN, phase="finished")],
    ids=["the next round", "another run", "the run is finished"],
)
def test_a_round_that_is_over_is_not_waited_for(plan: object) -> None:
    driven = leaving_with(BEGUN).joined()
    actions = driven.hear(plan)  # type: ignore[arg-type]
    assert finish(actions)
    assert not only(actions, LoadModel)


def test_a_plan_older_than_the_round_begun_decides_nothing() -> None:
    driven = leaving_with(BEGUN).joined()
    assert driven.hear(msgspec.structs.replace(PLAN, round=2, nonce=b"nonce-of-round-2")) == []
    assert only(driven.hear(PLAN), LoadModel)


def test_a_round_that_ends_in_the_middle_ends_the_wait() -> None:
    driven = leaving_with(BEGUN).joined()
    driven.hear(PLAN)
    driven.on(READY)
    assert finish(driven.hear(NEXT))


@pytest.mark.parametrize("failed_late", [False, True])
def test_a_round_that_gives_nothing_ends_the_wait(failed_late: bool) -> None:
    driven = leaving_with(BEGUN).joined()
    plan = PLAN if failed_late else msgspec.structs.replace(PLAN, participation=Listed(("bob",)))
    driven.hear(plan)
    actions = driven.on(READY)
    if failed_late:
        driven.hear(snapshot(3))
        driven.on(Rebuilt(3, DIGEST))
        actions = driven.on(TrainingFailed(3, "the loss is NaN"))
    assert finish(actions)


def test_without_bytes_for_it_today_the_round_is_not_waited_for() -> None:
    driven = leaving_with(BEGUN).joined()
    driven.on(GateChanged("it is hot"))
    assert not only(driven.hear(PLAN), Finish)
    assert finish(driven.on(GateChanged("byte budget: goes on at midnight", is_quiet=True)))


def test_an_agent_that_began_nothing_leaves_at_once_and_one_that_stays_does_as_ever() -> None:
    driven = Driven().joined()
    driven.hear(PLAN)
    assert finish(driven.on(LeaveAfterRound(True)))
    staying = leaving_with(BEGUN)
    assert staying.on(LeaveAfterRound(False)) == [Say("staying after all")]
    assert only(staying.joined().hear(NEXT), LoadModel)


# The file that tells, and the agent.


def kept_in(folder: Path) -> KeptSteps:
    return KeptSteps(folder, OWNER, print, lambda: 0.0)


def test_the_steps_that_are_kept_tell_which_round_was_begun(tmp_path: Path) -> None:
    assert kept_in(tmp_path).begun() is None
    kept = kept_in(tmp_path)
    kept.begin(b"w" * 32, 3, BEGUN)
    kept.close()
    assert kept_in(tmp_path).begun() == BEGUN
    (path,) = tmp_path.glob("*/steps")
    whole = path.read_bytes()
    for data in (b"", whole[:40], b"junk\n" * 9, whole.replace(b'"round": 3', b'"round": 4')):
        path.write_bytes(data)
        assert kept_in(tmp_path).begun() is None


def life(fleet: SmallFleet, folder: Path, trainer: LinearTrainer, *, is_leaving: bool = False) -> Agent:
    kept = kept_in(folder / "state")
    resuming = ResumingTrainer(trainer, kept, "kseed test", print)
    return fleet.join(
        "ann",
        resuming,
        outbox=outbox_in(folder / "state")[0],
        begun=kept.begun(),
        is_asked_to_finish=lambda: is_leaving,
    )


def test_an_agent_killed_in_mid_round_with_the_wish_to_finish_sends_the_round_and_leaves(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    agent = life(fleet, tmp_path, LinearTrainer("ann"))
    fleet.run_until(lambda: steps_of(agent) == 4)
    fleet.kill("ann")
    trainer = LinearTrainer("ann")
    agent = life(fleet, tmp_path, trainer, is_leaving=True)
    fleet.run_until(lambda: agent.ending is not None)
    assert agent.ending is not None and agent.ending.text == "left run 'demo'"
    assert trainer.steps_taken == 2
    assert "round 0: update accepted" in said(fleet)
    assert "ann" in accepted_updates(fleet.store.path)[0]


def test_an_agent_killed_in_a_round_that_is_over_leaves_without_a_model(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    agent = life(fleet, tmp_path, LinearTrainer("ann"))
    fleet.run_until(lambda: steps_of(agent) == 4)
    fleet.kill("ann")
    fleet.join("bob")
    fleet.run_until(lambda: fleet.service.state.progress.round == 1)
    trainer = LinearTrainer("ann")
    agent = life(fleet, tmp_path, trainer, is_leaving=True)
    fleet.run_until(lambda: agent.ending is not None)
    assert (trainer.loads, trainer.steps_taken) == (0, 0), said(fleet)
