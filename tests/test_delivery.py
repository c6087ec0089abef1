"""The session with an update: sent, sent again, and what each receipt means, divergence too."""

from __future__ import annotations

import msgspec
import pytest

from edge_client import session
from edge_client.delivery import CONSEQUENCES
from edge_client.events import (
    Abandon,
    Action,
    CloseRound,
    Keep,
    Kept,
    NotTaken,
    Publish,
    Rebuilt,
    Refused,
    Say,
    Subscribe,
    Taken,
    Tick,
    Trained,
    TrainingFailed,
)
from edge_client.state import Settled
from shared.messages import Receipt
from shared.refusals import Refusal
from shared.transport import Connected, Disconnected
from tests.driven_session import (
    DIGEST,
    NEXT,
    PLAN,
    PLAN_TOPIC,
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


def test_update_is_sent_again_at_growing_intervals_until_its_receipt():
    driven = Driven().sending()
    sent = [second for second in range(1, 100) if only(driven.on(Tick(second, 0), Taken("update")), Publish)]
    assert sent == [20, 60]
    driven.hear(Receipt(3, Refusal.ACCEPTED, ""))
    assert only(driven.on(Tick(1000, 0)), Publish) == []


def test_update_is_sent_again_on_reconnect():
    driven = Driven().sending()
    assert not only(driven.on(Disconnected("cut"), Tick(50.0, 0)), Publish)
    assert only(driven.on(Connected("MQTT 5", True)), Publish)[-1] == Publish(UPDATE_TOPIC, UPDATE)


def test_update_waits_for_the_connection():
    driven = Driven().training()
    driven.on(Disconnected("cut"))
    assert driven.on(Trained(UPDATE)) == [Keep(Kept(PLAN.nonce, UPDATE))]
    assert only(driven.on(Connected("MQTT 5", True)), Publish)[-1] == Publish(UPDATE_TOPIC, UPDATE)


@pytest.mark.parametrize("code", [Refusal.ACCEPTED, Refusal.DUPLICATE])
def test_accepted_update_is_settled(code):
    driven = Driven().sending()
    driven.hear(Receipt(3, code, ""))
    assert (driven.state.work, driven.state.receipt) == (Settled(), code)
    assert only(driven.hear(NEXT), CloseRound) == [CloseRound(3, code)]


@pytest.mark.parametrize("code", [Refusal.BUSY, Refusal.STORAGE])
def test_refusal_that_may_be_retried_is_retried_later(code):
    driven = Driven().sending()
    driven.hear(Receipt(3, code, ""))
    assert not only(driven.on(Tick(39.0, 0)), Publish)
    assert only(driven.on(Tick(40.0, 0)), Publish) == [Publish(UPDATE_TOPIC, UPDATE)]


def test_update_refused_because_the_run_is_paused_is_sent_when_it_opens_again():
    driven = Driven().sending()
    assert Subscribe(PLAN_TOPIC) in driven.hear(Receipt(3, Refusal.RUN_CLOSED, "lunch"))
    driven.hear(msgspec.structs.replace(PLAN, phase="paused", published_at_ms=1_000_001))
    assert not only(driven.on(Tick(90.0, 0)), Publish)
    driven.hear(msgspec.structs.replace(PLAN, published_at_ms=1_000_002))
    assert only(driven.on(Tick(91.0, 0)), Publish) == [Publish(UPDATE_TOPIC, UPDATE)]


@pytest.mark.parametrize("code", [Refusal.STALE_ROUND, Refusal.FUTURE_ROUND])
def test_refusal_that_shows_an_old_plan_asks_for_the_plan(code):
    driven = Driven().sending()
    assert Subscribe(PLAN_TOPIC) in driven.hear(Receipt(3, code, ""))
    assert driven.state.work == Settled()


@pytest.mark.parametrize("code", [code for code, what in CONSEQUENCES.items() if what == "lost"])
def test_any_other_refusal_is_said_with_its_sentence_and_settles(code):
    driven = Driven().sending()
    assert texts(driven.hear(Receipt(3, code, "because"))) == f"round 3: {code.sentence} (because)"
    assert driven.state.work == Settled()


def test_refusal_of_this_agents_version_ends_it():
    end = finish(Driven().sending().hear(Receipt(3, Refusal.UNSUPPORTED_VERSION, "it speaks 2 to 3")))
    assert end.exit_code == 3
    assert "it speaks 2 to 3" in end.text


def test_every_refusal_has_a_consequence():
    assert set(CONSEQUENCES) == set(Refusal)
    assert {code for code, what in CONSEQUENCES.items() if what == "counts"} == {c for c in Refusal if c.is_success}
    assert {code for code, what in CONSEQUENCES.items() if what == "again"} == {c for c in Refusal if c.may_retry}


@pytest.mark.parametrize("code", list(Refusal))
def test_an_update_that_counts_for_nothing_is_told_to_whoever_keeps_account(code):
    ends = CONSEQUENCES[code] in ("lost", "follow", "stop", "diverged") and code is not Refusal.CONFLICT
    assert only(Driven().sending().hear(Receipt(3, code, "")), Refused) == ([Refused(3)] if ends else [])
    late = Driven().sending()
    late.hear(NEXT)
    assert only(late.hear(Receipt(3, code, "")), Refused) == ([Refused(3)] if ends else [])


def test_receipt_of_another_round_changes_nothing():
    driven = Driven().sending()
    before = driven.state
    assert driven.hear(Receipt(2, Refusal.STALE_ROUND, "")) == [Refused(2)]
    assert driven.state == before


def test_failed_training_sits_the_round_out():
    driven = Driven().training()
    assert texts(driven.on(TrainingFailed(3, "step 1 gave a scalar that is not finite"))).endswith("is not finite")
    assert driven.state.work == Settled()


def test_update_the_broker_refuses_is_sent_again_later():
    driven = Driven().training()
    driven.on(Trained(UPDATE))
    said = driven.on(NotTaken("update", "not authorized"))
    assert texts(said) == "the broker did not take a message: not authorized"
    assert only(driven.on(Tick(20.0, 0)), Publish) == [Publish(UPDATE_TOPIC, UPDATE)]


def test_bad_link_does_not_pile_up_copies():
    driven = Driven().training()
    driven.on(Trained(UPDATE))  # given to the transport, which repeats it by itself
    actions: list[Action] = []
    for second in range(100):
        actions += driven.on(Disconnected("cut"), Connected("MQTT 5", True), Tick(second, 0))
        actions += driven.hear(session.presence(driven.state, online=False))
    assert len(only(actions, Publish)) == 1  # the presence after the first cut
    assert driven.on(Taken("presence")) == []


def test_diverged_device_takes_a_fresh_snapshot_for_the_next_round():
    driven = Driven().sending()
    driven.hear(Receipt(3, Refusal.DIVERGED, "digest ab, the fleet's is cd"))
    assert driven.state.held is None
    assert Subscribe(SNAPSHOT_TOPIC) in driven.hear(NEXT)


def test_diverged_device_that_has_begun_the_next_round_begins_it_again_from_a_snapshot():
    driven = Driven().sending()
    driven.hear(next_with(change_of([0], [1.0])))
    driven.on(Rebuilt(4, DIGEST))
    actions = driven.hear(Receipt(3, Refusal.DIVERGED, ""))
    assert [type(action) for action in actions] == [Refused, Say, Abandon, Subscribe]
    assert driven.hear(Receipt(3, Refusal.DIVERGED, "")) == [Refused(3)]


def test_device_that_diverges_after_a_fresh_rebuild_ends():
    driven = Driven().sending()
    driven.hear(Receipt(3, Refusal.DIVERGED, ""))
    driven.hear(NEXT)
    driven.hear(snapshot(4))
    driven.on(Rebuilt(4, DIGEST), Trained(msgspec.structs.replace(UPDATE, round=4)))
    assert finish(driven.hear(Receipt(4, Refusal.DIVERGED, ""))).exit_code == 3


def test_device_that_agreed_after_a_rebuild_may_diverge_once_more():
    driven = Driven().sending()
    driven.hear(Receipt(3, Refusal.DIVERGED, ""))
    for number in (4, 5, 6):
        driven.hear(msgspec.structs.replace(PLAN, round=number, nonce=bytes(15) + bytes([number])))
    assert driven.state.suspect_from is None
