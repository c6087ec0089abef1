"""The session between plans: changes, snapshots, newer plans, deadlines, and the end of the run."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edge_client import session
from edge_client.events import (
    Abandon,
    CloseRound,
    Conclude,
    Evaluate,
    Evaluated,
    Forget,
    Publish,
    Rebuild,
    Rebuilt,
    Say,
    Subscribe,
    Tick,
    Train,
    Trained,
    Unsubscribe,
)
from edge_client.state import Fetching, Held, Settled
from shared.messages import Change, Listed, Receipt, Threshold
from shared.seeds import draw
from shared.wire import coefficients_to_bytes
from tests.driven_session import (
    DIGEST,
    NEXT,
    PLAN,
    PLAN_TOPIC,
    READY,
    RUN,
    SEEDS,
    SNAPSHOT_TOPIC,
    UPDATE,
    UPDATE_TOPIC,
    Driven,
    change_of,
    finish,
    next_with,
    only,
    snapshot,
    texts,
)


def test_device_without_the_version_takes_the_snapshot_and_unsubscribes():
    driven = Driven().joined()
    driven.hear(PLAN)
    assert driven.on(READY)[1:] == [Subscribe(SNAPSHOT_TOPIC)]
    assert driven.hear(snapshot(3, 0.5)) == [Unsubscribe(SNAPSHOT_TOPIC), Rebuild(3, snapshot(3, 0.5).coefficients)]
    assert driven.on(Rebuilt(3, DIGEST)) == [Train(PLAN, DIGEST)]


def test_a_plans_change_is_applied_without_a_snapshot():
    driven = Driven().sending()
    wanted = np.zeros(SEEDS, np.float32)
    wanted[1], wanted[7] = 0.25, -1.5
    actions = driven.hear(next_with(change_of([1, 7], [0.25, -1.5])))
    assert actions == [Forget(), CloseRound(3, None), Rebuild(4, coefficients_to_bytes(wanted))]


def test_a_change_is_added_to_what_is_held_in_float32():
    driven = Driven().sending()
    driven.hear(next_with(change_of([1], [1.0])))
    fifth = next_with(change_of([1], [2.0**-24 + 2.0**-40]), round=5, nonce=bytes(16), published_at_ms=1_200_000)
    driven.hear(fifth)
    assert np.frombuffer(driven.state.held.coefficients, "<f4")[1] == np.float32(1 + 2.0**-23)


def test_a_change_of_the_seeds_that_all_drew_names_none():
    driven = Driven().sending(msgspec.structs.replace(PLAN, common_seeds=True))
    drawn = np.unique(draw(PLAN.nonce, None, PLAN.local_steps, SEEDS, None))
    driven.hear(next_with(change_of(None, [0.5] * len(drawn))))
    assert np.flatnonzero(np.frombuffer(driven.state.held.coefficients, "<f4")).tolist() == drawn.tolist()


def test_a_change_of_all_coefficients_needs_no_plan_before_it():
    driven = Driven().sending()
    driven.hear(next_with(change_of(None, [0.5] * SEEDS)))
    assert driven.state.held == Held(4, np.full(SEEDS, 0.5, "<f4").tobytes())


def test_unnamed_numbers_are_not_guessed_at_without_the_plan_before():
    driven = Driven()
    driven.hear(RUN)
    driven.hear(PLAN)
    driven.on(READY)
    driven.hear(snapshot(4, 0.5))  # of a newer version than the plan's; the plan of that version is then missed
    assert driven.state.held.version == 4
    numbers = change_of(None, [1.0] * 32)  # of seeds that all drew, and as long as 4 bits for all 256
    actions = driven.hear(next_with(numbers, round=5, nonce=bytes(16), published_at_ms=1_200_000))
    assert driven.state.held.version == 4
    assert not any(isinstance(action, Rebuild) for action in actions)


def test_a_plan_after_a_gap_asks_for_the_snapshot_whatever_its_change():
    driven = Driven().sending()
    actions = driven.hear(next_with(change_of([0], [1.0]), round=5))
    assert actions[-1] == Subscribe(SNAPSHOT_TOPIC)
    assert driven.state.held.version == 3


@pytest.mark.parametrize(
    "change",
    [
        change_of([256], [1.0]),
        Change(b"\x01\x00\x01\x00", 0, bytes(8)),
        Change(b"\x01\x00", 0, np.array([np.nan], "<f4").tobytes()),
        Change(b"\x01\x00", 0, bytes(3)),
        change_of(None, [1.0, 1.0]),
    ],
    ids=["outside the pool", "not increasing", "NaN", "half a value", "seeds that nobody knows"],
)
def test_a_change_that_does_not_fit_is_said_and_the_snapshot_asked_for(change):
    driven = Driven().sending()
    actions = driven.hear(next_with(change))
    assert "ignored a change message" in texts(actions)
    assert actions[-1] == Subscribe(SNAPSHOT_TOPIC)
    assert driven.state.held.version == 3


def test_snapshot_older_than_the_plan_is_kept_and_waited_on():
    driven = Driven().joined()
    driven.hear(PLAN)
    driven.on(READY)
    said = driven.hear(snapshot(2))
    assert texts(said) == "the snapshot is version 2; waiting for version 3"
    assert isinstance(driven.state.work, Fetching)
    assert only(driven.hear(snapshot(3)), Rebuild)


def test_snapshot_newer_than_the_plan_waits_for_the_newer_plan():
    driven = Driven().joined()
    driven.hear(PLAN)
    driven.on(READY)
    assert [type(action) for action in driven.hear(snapshot(4))] == [Unsubscribe, Say]
    assert only(driven.hear(NEXT), Rebuild) == [Rebuild(4, snapshot(4).coefficients)]


def test_snapshot_that_does_not_come_is_asked_for_again():
    driven = Driven().joined()
    driven.hear(PLAN)
    driven.on(READY)
    actions = driven.on(Tick(20.0, 0))
    assert only(actions, Subscribe) == [Subscribe(SNAPSHOT_TOPIC)]
    assert not only(driven.on(Tick(21.0, 0)), Subscribe)


def test_device_that_is_not_selected_waits_and_says_so():
    driven = Driven().joined()
    driven.hear(msgspec.structs.replace(PLAN, participation=Listed(("bob",))))
    actions = driven.on(READY)
    assert texts(actions).endswith("round 3: this device is not selected; waiting for the next round")
    assert driven.state.work == Settled(is_selected=False)
    assert not only(actions, Subscribe)


def test_round_extended_to_more_devices_takes_this_one_in():
    driven = Driven().joined()
    driven.hear(msgspec.structs.replace(PLAN, participation=Threshold(0)))
    driven.on(READY)
    assert driven.hear(msgspec.structs.replace(PLAN, published_at_ms=1_000_001)) == [Subscribe(SNAPSHOT_TOPIC)]


def test_newer_plan_in_mid_round_drops_the_work_and_follows():
    driven = Driven().training()
    actions = driven.hear(NEXT)
    assert actions[0] == Abandon()
    assert CloseRound(3, None) in actions
    assert Subscribe(SNAPSHOT_TOPIC) in actions
    assert driven.on(Trained(UPDATE)) == []


@pytest.mark.parametrize(
    "plan",
    [PLAN, msgspec.structs.replace(PLAN, round=2), msgspec.structs.replace(PLAN, published_at_ms=1, phase="paused")],
    ids=["repeated", "older round", "older amendment"],
)
def test_plan_that_is_not_newer_changes_nothing(plan):
    driven = Driven().training()
    before = driven.state
    assert driven.hear(plan) == []
    assert driven.state == before


def test_paused_run_holds_the_steps_and_the_update_until_it_opens():
    paused = msgspec.structs.replace(PLAN, phase="paused", reason="lunch", published_at_ms=1_000_001)
    opened = msgspec.structs.replace(PLAN, published_at_ms=1_000_002)
    driven = Driven().training()
    assert session.may_step(driven.state)
    assert texts(driven.hear(paused)) == "run 'demo' is paused: lunch"
    assert not session.may_step(driven.state)
    assert not only(driven.on(Trained(UPDATE), Tick(1.0, 0)), Publish)
    driven.hear(opened)
    assert only(driven.on(Tick(2.0, 0)), Publish) == [Publish(UPDATE_TOPIC, UPDATE)]


def test_run_that_finishes_in_mid_round_gives_the_last_version_a_last_evaluation():
    driven = Driven().training()
    end = msgspec.structs.replace(NEXT, phase="finished", evaluate=True, reason="all rounds done")
    assert driven.hear(end)[0] == Abandon()
    assert only(driven.hear(snapshot(4)), Rebuild)
    assert driven.on(Rebuilt(4, DIGEST)) == [Evaluate(4)]
    actions = driven.on(Evaluated(4))
    assert CloseRound(4, None) in actions
    assert finish(actions).text == "run 'demo' is finished at version 4: all rounds done"


def test_run_stopped_in_mid_round_drops_the_steps():
    driven = Driven().training()
    actions = driven.hear(msgspec.structs.replace(PLAN, phase="finished", published_at_ms=1_000_001))
    assert [type(action) for action in actions] == [Abandon, Rebuild]
    assert finish(driven.on(Rebuilt(3, DIGEST))).exit_code == 0


def test_finished_run_without_a_snapshot_ends_all_the_same():
    driven = Driven().training()
    driven.hear(msgspec.structs.replace(NEXT, phase="finished"))
    assert finish(driven.on(Tick(20.0, 0))).exit_code == 0


def test_slow_device_concludes_before_the_deadline_and_only_once():
    driven = Driven().training()
    assert only(driven.on(Tick(89.9, 0)), Conclude) == []
    assert only(driven.on(Tick(90.0, 0), Tick(91.0, 0)), Conclude) == [Conclude()]


def test_deadline_of_a_retained_plan_counts_from_its_date():
    driven = Driven().joined()
    driven.on(Tick(0.0, 1_050_000))
    driven.hear(PLAN, is_retained=True)
    assert driven.state.conclude_s == pytest.approx(45.0)
    late = Driven().joined()
    late.on(Tick(0.0, 5_000_000))
    late.hear(PLAN, is_retained=True)
    assert late.state.conclude_s is None


def test_clock_behind_the_aggregators_does_not_cut_a_round_short():
    driven = Driven().joined()
    driven.on(Tick(0.0, 900_000))
    driven.hear(PLAN, is_retained=True)
    assert driven.state.conclude_s is None


def test_plan_is_asked_for_again_when_the_round_is_overdue():
    driven = Driven().sending()
    driven.hear(Receipt(3, 0, ""))
    assert only(driven.on(Tick(129.0, 0)), Subscribe) == []
    assert only(driven.on(Tick(130.0, 0)), Subscribe) == [Subscribe(PLAN_TOPIC)]
    assert only(driven.on(Tick(131.0, 0)), Subscribe) == []
