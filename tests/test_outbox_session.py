"""The session and its outbox: an update is kept until its receipt, sent again in its round, and dropped after it."""

from __future__ import annotations

import msgspec
import pytest

from edge_client import session
from edge_client.events import (
    EXIT_LEFT,
    CloseRound,
    Finish,
    Forget,
    Keep,
    Kept,
    Leave,
    LeaveAfterRound,
    LoadModel,
    Publish,
    Rebuild,
    Tick,
    Trained,
)
from edge_client.state import Sending, Settled, Waiting, waiting
from shared.messages import Receipt
from shared.refusals import Refusal
from tests.driven_session import (
    IDENTITY,
    NEXT,
    PLAN,
    READY,
    UPDATE,
    UPDATE_TOPIC,
    Driven,
    finish,
    only,
    snapshot,
    texts,
)
from tests.outboxes import KEPT


def driven_with(kept: Kept) -> Driven:
    driven = Driven()
    driven.state = session.start(IDENTITY, 0.0, 1_000_000, kept)
    return driven


def test_update_is_kept_before_it_is_sent_and_forgotten_with_its_receipt():
    driven = Driven().training()
    assert driven.on(Trained(UPDATE)) == [Keep(KEPT), Publish(UPDATE_TOPIC, UPDATE)]
    actions = driven.hear(Receipt(3, int(Refusal.ACCEPTED), ""))
    assert actions[0] == Forget()
    assert waiting(driven.state) is None


@pytest.mark.parametrize("code", [Refusal.BUSY, Refusal.STORAGE, Refusal.RUN_CLOSED, Refusal.UNSUPPORTED_VERSION])
def test_update_that_may_count_later_stays_in_the_outbox(code):
    driven = Driven().sending()
    actions = driven.hear(Receipt(3, int(code), ""))
    assert not only(actions, Forget)
    assert waiting(driven.state) == KEPT


def test_update_of_an_earlier_life_is_sent_without_waiting_for_the_model():
    driven = driven_with(KEPT).joined()
    actions = driven.hear(PLAN, is_retained=True)
    assert "round 3: sending the update that was made before this agent was started again" in texts(actions)
    assert not only(actions, LoadModel)
    assert driven.on(Tick(1.0, 1_000_000)) == [Publish(UPDATE_TOPIC, UPDATE)]
    assert driven.hear(Receipt(3, int(Refusal.DUPLICATE), ""))[0] == Forget()
    assert isinstance(driven.state.work, Settled)
    actions = driven.hear(NEXT)
    assert only(actions, LoadModel)
    driven.on(READY)
    assert only(driven.hear(snapshot(4)), Rebuild)


@pytest.mark.parametrize(
    "plan",
    [
        NEXT,
        msgspec.structs.replace(PLAN, nonce=b"another-run-of-3"),
        msgspec.structs.replace(NEXT, nonce=PLAN.nonce),
    ],
)
def test_update_of_a_round_that_is_over_is_dropped(plan):
    driven = driven_with(KEPT).joined()
    actions = driven.hear(plan)
    assert actions[0] == Forget()
    assert "round 3 is over; dropped its update, which never had a receipt" in texts(actions)
    assert driven.state.work == Waiting()
    assert only(actions, LoadModel)


def test_update_of_a_run_that_was_stopped_meanwhile_is_dropped():
    driven = driven_with(KEPT).joined()
    actions = driven.hear(msgspec.structs.replace(PLAN, phase="finished"))
    assert actions[0] == Forget()
    assert finish(actions).exit_code == EXIT_LEFT


def test_update_of_an_earlier_life_waits_while_the_run_is_paused():
    driven = driven_with(KEPT).joined()
    driven.hear(msgspec.structs.replace(PLAN, phase="paused"))
    assert not only(driven.on(Tick(1.0, 1_000_000)), Publish)
    driven.hear(msgspec.structs.replace(PLAN, published_at_ms=PLAN.published_at_ms + 1))
    assert only(driven.on(Tick(2.0, 1_000_000)), Publish) == [Publish(UPDATE_TOPIC, UPDATE)]


def test_plan_older_than_the_kept_update_decides_nothing():
    driven = driven_with(KEPT).joined()
    driven.hear(msgspec.structs.replace(PLAN, round=2, nonce=b"nonce-of-round-2"))
    assert waiting(driven.state) == KEPT
    driven.hear(PLAN)
    assert isinstance(driven.state.work, Sending)


def test_leaving_keeps_the_update():
    driven = driven_with(KEPT).joined()
    driven.hear(PLAN)
    assert not only(driven.on(Leave()), Forget)
    assert waiting(driven.state) == KEPT


def test_finish_sends_the_update_of_an_earlier_life_before_it_leaves():
    driven = driven_with(KEPT)
    assert not only(driven.on(LeaveAfterRound(True)), Finish)
    driven.joined()
    driven.hear(PLAN, is_retained=True)
    actions = driven.on(Tick(1.0, 1_000_000))
    assert actions == [Publish(UPDATE_TOPIC, UPDATE)]
    actions = driven.hear(Receipt(3, int(Refusal.ACCEPTED), ""))
    assert actions[0] == Forget()
    assert finish(actions).exit_code == EXIT_LEFT


def test_finish_does_not_wait_for_an_update_that_is_too_late():
    driven = driven_with(KEPT)
    driven.on(LeaveAfterRound(True))
    driven.joined()
    actions = driven.hear(NEXT)
    assert actions[0] == Forget()
    assert not only(actions, LoadModel)
    assert finish(actions).exit_code == EXIT_LEFT


def test_newer_plan_empties_the_outbox():
    driven = Driven().sending()
    actions = driven.hear(NEXT)
    assert actions[:2] == [Forget(), CloseRound(3, None)]
    assert waiting(driven.state) is None
