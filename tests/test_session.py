"""The session as a pure function: hostile input, the gate, leaving, and what was never asked for."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge_client import session
from edge_client.events import (
    CloseRound,
    Evaluated,
    Finish,
    Garbled,
    GateChanged,
    Heard,
    Leave,
    LoadModel,
    Publish,
    Rebuilt,
    Say,
    Subscribe,
    Taken,
    Tick,
    Trained,
    TrainingFailed,
)
from edge_client.state import Held, State, Waiting
from shared.errors import PeerError
from shared.messages import Presence, Receipt, Snapshot
from shared.refusals import Refusal
from shared.topics import Topic
from shared.transport import Connected
from tests.driven_session import (
    DIGEST,
    NEXT,
    PLAN,
    PRESENCE_TOPIC,
    READY,
    RUN,
    SEEDS,
    SNAPSHOT_TOPIC,
    UPDATE,
    Driven,
    only,
    texts,
)

HOSTILE = {"levels of another K": msgspec.structs.replace(NEXT, levels=bytes(512)), "an update": UPDATE}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_message_leaves_a_line_and_no_other_trace(message):
    driven = Driven().training()
    before = driven.state
    (said,) = driven.hear(message)
    assert isinstance(said, Say)
    assert said.is_warning
    assert said.text.startswith("ignored a ")
    assert driven.state == before


@pytest.mark.parametrize(
    "bad",
    [Snapshot(3, bytes(4 * 512)), Snapshot(3, np.full(SEEDS, np.inf, "<f4").tobytes())],
    ids=["wrong K", "infinite"],
)
def test_hostile_snapshot_leaves_a_line_and_no_other_trace(bad):
    driven = Driven().joined()
    driven.hear(PLAN)
    driven.on(READY)
    before = driven.state
    assert texts(driven.hear(bad)).startswith("ignored a snapshot message: ")
    assert driven.state == before


@pytest.mark.parametrize("refusal", [Refusal.MALFORMED, Refusal.OVERSIZED, Refusal.NON_FINITE, Refusal.WRONG_KIND])
def test_garbled_payload_leaves_a_line_and_no_other_trace(refusal):
    driven = Driven().training()
    before = driven.state
    assert texts(driven.on(Garbled("kseed/demo/plan", PeerError(refusal, "x"), 1))) == (
        f"ignored a kseed/demo/plan message: {refusal.sentence} (x)"
    )
    assert driven.state == before


def test_run_message_with_a_broken_manifest_is_ignored():
    driven = Driven()
    assert texts(driven.hear(msgspec.structs.replace(RUN, manifest=b"junk"))).startswith("ignored a run message")
    assert texts(driven.hear(msgspec.structs.replace(RUN, manifest_digest=bytes(32)))).startswith("ignored a run")
    assert driven.state.run is None


def test_message_for_another_device_or_run_is_ignored():
    driven = Driven().sending()
    before = driven.state
    assert texts(driven.hear(Receipt(3, 0, ""), device="bob")).startswith("ignored a kseed/demo/receipt/bob message")
    driven.on(Heard(Topic("other", "plan"), NEXT, False))
    assert driven.state == before


def test_closed_gate_stops_the_steps_and_shows_its_reason_everywhere():
    driven = Driven().training()
    actions = driven.on(GateChanged("on battery"), Taken("presence"))
    assert texts(actions) == "paused: on battery"
    assert Publish(PRESENCE_TOPIC, Presence(True, 5, 1, 1, "kseed 0", "on battery"), retain=True) in actions
    assert not session.may_step(driven.state)
    actions = driven.on(GateChanged(None))
    assert Publish(PRESENCE_TOPIC, Presence(True, 5, 1, 1, "kseed 0", ""), retain=True) in actions
    assert session.may_step(driven.state)


def test_notes_that_follow_each_other_fast_are_told_one_after_the_other():
    driven = Driven().training()
    assert len(only(driven.on(GateChanged("battery"), GateChanged(None), GateChanged("memory")), Publish)) == 1
    (last,) = driven.on(Taken("presence"))
    assert isinstance(last, Publish)
    assert last.message == Presence(True, 5, 1, 1, "kseed 0", "memory")
    assert driven.on(Taken("presence")) == []


def test_closed_gate_keeps_the_model_from_being_loaded_and_rebuilt():
    driven = Driven().joined()
    driven.on(GateChanged("memory"))
    assert driven.hear(PLAN) == []
    assert driven.on(GateChanged(None))[-1] == LoadModel(RUN)
    driven.on(GateChanged("memory"))
    assert not only(driven.on(READY), Subscribe)
    assert driven.on(GateChanged(None))[-1] == Subscribe(SNAPSHOT_TOPIC)


def test_leaving_says_goodbye_and_names_an_update_without_a_receipt():
    driven = Driven().sending()
    actions = driven.on(Leave())
    assert actions == [
        CloseRound(3, None),
        Publish(PRESENCE_TOPIC, Presence(False, 5, 1, 1, "kseed 0", ""), retain=True),
        Finish(0, "left run 'demo'; the update of round 3 has no receipt yet"),
    ]


def test_nothing_follows_the_end():
    driven = Driven().training()
    driven.on(Leave())
    before = driven.state
    assert driven.on(Tick(1e9, 0), Connected("MQTT 5", True), Trained(UPDATE)) == []
    assert driven.hear(NEXT) == []
    assert driven.state == before


@pytest.mark.parametrize("event", [READY, Rebuilt(3, DIGEST), Trained(UPDATE), TrainingFailed(3, "x"), Evaluated(3)])
def test_answer_to_something_that_was_not_asked_changes_nothing(event):
    driven = Driven().joined()
    before = driven.state
    assert driven.on(event) == []
    assert driven.state == before


def test_states_are_values():
    state: State = Driven().training().state
    assert state == Driven().training().state
    assert replace(state, held=Held(3, bytes(4))) != state
    assert replace(state, work=Waiting()) != state
