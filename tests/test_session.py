"""The agent's protocol as a pure function: every event in, every action out, no I/O."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge_client import session
from edge_client.delivery import CONSEQUENCES
from edge_client.events import (
    Abandon,
    Action,
    CloseRound,
    Conclude,
    Evaluate,
    Evaluated,
    Event,
    Finish,
    Forget,
    Garbled,
    GateChanged,
    Heard,
    Keep,
    Kept,
    Leave,
    LoadModel,
    ModelReady,
    NotTaken,
    Publish,
    Rebuild,
    Rebuilt,
    Say,
    Subscribe,
    Taken,
    Tick,
    Train,
    Trained,
    TrainingFailed,
    Unsubscribe,
)
from edge_client.state import Fetching, Held, Identity, Limits, Sending, Settled, State, Training, Waiting
from shared.changes import write_change
from shared.errors import PeerError
from shared.manifest import Manifest, Tensor
from shared.messages import (
    Change,
    Everyone,
    Listed,
    Message,
    PlainStep,
    Plan,
    Presence,
    Receipt,
    Run,
    Snapshot,
    Threshold,
    Update,
)
from shared.refusals import Refusal
from shared.seeds import draw
from shared.topics import Topic
from shared.transport import TAKEN_OVER, Connected, Disconnected
from shared.wire import coefficients_to_bytes, kind_of

SEEDS = 256
MANIFEST = Manifest((Tensor("head.weight", (4, 8)), Tensor("norm.weight", (8,))))
RUN = Run(
    run="demo",
    model="tiny",
    dtype="fp32",
    directions="hadamard",
    seeds=SEEDS,
    pool_key=7,
    manifest=MANIFEST.pack(),
    manifest_digest=MANIFEST.digest(),
    base_digest=b"\x11" * 32,
    scalar_format="f32",
    change_format="f32",
    first_order=False,
)
PLAN = Plan(
    round=3,
    phase="open",
    nonce=b"nonce-of-round-3",
    local_steps=2,
    batch_size=1,
    eps=1e-3,
    step=PlainStep(0.1),
    participation=Everyone(),
    common_seeds=False,
    levels=None,
    evaluate=False,
    published_at_ms=1_000_000,
    deadline_s=100.0,
    reason="",
    change=None,
)
NEXT = msgspec.structs.replace(PLAN, round=4, nonce=b"nonce-of-round-4", published_at_ms=1_100_000)
IDENTITY = Identity("demo", "ann", session=5, agent="kseed 0", broker="localhost:1883")
DIGEST = b"d" * 16
UPDATE = Update(3, 10, 2.0, None, None, DIGEST, np.array([1, 2], "<f4").tobytes(), None)
READY = ModelReady(MANIFEST, RUN.base_digest)


def snapshot(version: int, value: float = 0.0) -> Snapshot:
    return Snapshot(version, coefficients_to_bytes(np.full(SEEDS, value, np.float32)))


class Driven:
    """A state and what came of each event."""

    def __init__(self, identity: Identity = IDENTITY) -> None:
        self.state = session.start(identity, now_s=0.0, unix_ms=1_000_000)

    def on(self, *events: Event) -> list[Action]:
        """The actions of all events, in order."""
        actions: list[Action] = []
        for event in events:
            self.state, done = session.step(self.state, event)
            actions += done
        return actions

    def hear(self, message: Message, *, is_retained: bool = False, device: str = "ann") -> list[Action]:
        kind = kind_of(message)
        topic = Topic("demo", kind, device if kind in ("update", "receipt", "presence") else None)
        return self.on(Heard(topic, message, is_retained))

    def joined(self) -> Driven:
        self.on(Connected("MQTT 5", False), Taken("presence"))
        self.hear(session.presence(self.state, online=True))
        self.hear(RUN)
        return self

    def training(self, plan: Plan = PLAN) -> Driven:
        """In the local steps of round 3."""
        self.joined().hear(plan)
        self.on(READY)
        self.hear(snapshot(3))
        self.on(Rebuilt(3, DIGEST))
        assert isinstance(self.state.work, Training)
        return self

    def sending(self, plan: Plan = PLAN) -> Driven:
        """The update of round 3 is out."""
        self.training(plan).on(Trained(UPDATE), Taken("update"))
        assert isinstance(self.state.work, Sending)
        return self


def only(actions: list[Action], kind: type[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def texts(actions: list[Action]) -> str:
    return "\n".join(action.text for action in actions if isinstance(action, (Say, Finish)))


def finish(actions: list[Action]) -> Finish:
    (last,) = only(actions, Finish)
    assert actions[-1] is last
    assert isinstance(last, Finish)
    return last


PRESENCE_TOPIC = Topic("demo", "presence", "ann")
PLAN_TOPIC = Topic("demo", "plan")
SNAPSHOT_TOPIC = Topic("demo", "snapshot")
UPDATE_TOPIC = Topic("demo", "update", "ann")


# Connecting and joining.


def test_first_connection_announces_and_subscribes_to_everything_but_the_snapshot():
    actions = Driven().on(Connected("MQTT 5", False))
    assert actions[1:] == [
        Subscribe(PRESENCE_TOPIC),
        Publish(PRESENCE_TOPIC, Presence(True, 5, 1, 1, "kseed 0", ""), retain=True),
        Subscribe(Topic("demo", "run")),
        Subscribe(PLAN_TOPIC),
        Subscribe(Topic("demo", "receipt", "ann")),
    ]


ONLINE = Publish(PRESENCE_TOPIC, Presence(True, 5, 1, 1, "kseed 0", ""), retain=True)


def reconnected() -> Driven:
    driven = Driven().joined()
    actions = driven.on(Disconnected("cut"), Connected("MQTT 5", True))
    assert actions[-1] == Subscribe(PRESENCE_TOPIC)
    assert not only(actions, Publish)
    return driven


def test_agent_whose_will_was_published_announces_again_after_the_reconnection():
    driven = reconnected()
    assert driven.hear(session.presence(driven.state, online=False), is_retained=True) == [ONLINE]
    assert not only(driven.on(Tick(10.0, 0), Taken("presence")), Publish)


def test_agent_that_is_still_announced_after_the_reconnection_spares_the_bytes():
    driven = reconnected()
    assert driven.hear(session.presence(driven.state, online=True), is_retained=True) == []
    assert not only(driven.on(Tick(10.0, 0)), Publish)


def test_agent_announces_again_where_the_broker_has_forgotten_its_presence():
    driven = reconnected()
    assert not only(driven.on(Tick(4.9, 0)), Publish)
    assert only(driven.on(Tick(5.0, 0), Tick(6.0, 0), Taken("presence"), Tick(7.0, 0)), Publish) == [ONLINE]


def test_agent_whose_place_was_taken_while_it_was_away_ends_without_announcing():
    driven = reconnected()
    actions = driven.hear(Presence(True, 6, 1, 1, "kseed 0", ""), is_retained=True)
    assert finish(actions).exit_code == 3
    assert not only(actions, Publish)


def test_second_agent_that_is_thrown_out_before_it_announced_announces_at_once():
    driven = Driven()
    driven.on(Connected("MQTT 5", False), Disconnected("cut"), Connected("MQTT 5", True))
    assert driven.hear(Presence(True, 6, 1, 1, "kseed 0", ""), is_retained=True) == []  # the first is on its way
    driven.on(Taken("presence"))
    assert not driven.state.is_finished


def test_model_is_loaded_once_run_and_plan_are_known_in_either_order():
    run_first, plan_first = Driven(), Driven()
    assert run_first.hear(RUN) == []
    assert run_first.hear(PLAN) == [LoadModel(RUN)]
    assert plan_first.hear(PLAN) == []
    assert plan_first.hear(RUN) == [LoadModel(RUN)]


def test_model_is_not_loaded_for_a_finished_run():
    driven = Driven().joined()
    end = finish(driven.hear(msgspec.structs.replace(PLAN, phase="finished", reason="ten rounds")))
    assert (end.exit_code, end.text) == (0, "run 'demo' is finished at version 3: ten rounds")


def test_model_with_another_manifest_is_refused_naming_the_first_difference():
    driven = Driven().joined()
    driven.hear(PLAN)
    other = Manifest((Tensor("head.weight", (4, 9)), Tensor("norm.weight", (8,))))
    actions = driven.on(ModelReady(other, RUN.base_digest))
    end = finish(actions)
    assert end.exit_code == 2
    assert "tensor 'head.weight' has the shape [4, 9] in this model and [4, 8] in the run" in end.text
    assert "Give 'tiny' with --model" in end.text
    assert not only(actions, CloseRound)
    assert only(actions, Publish)[-1] == Publish(PRESENCE_TOPIC, Presence(False, 5, 1, 1, "kseed 0", ""), retain=True)


def test_model_with_other_weights_is_refused_naming_both_digests():
    driven = Driven().joined()
    driven.hear(PLAN)
    end = finish(driven.on(ModelReady(MANIFEST, b"\x22" * 32)))
    assert end.exit_code == 2
    assert "digest 2222222222222222, the run has 1111111111111111" in end.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pool_key": 8}, "pool_key was 7 and is 8"),
        ({"base_digest": b"\x33" * 32}, "base_digest was 1111111111111111 and is 3333333333333333"),
        ({"dtype": "bf16"}, "dtype was fp32 and is bf16"),
        ({"seeds": 512}, "seeds was 256 and is 512"),
    ],
)
def test_run_of_the_same_name_with_another_identity_ends_the_agent(change, named):
    driven = Driven().training()
    end = finish(driven.hear(msgspec.structs.replace(RUN, **change)))
    assert end.exit_code == 3
    assert named in end.text


def test_run_message_that_only_renames_its_model_changes_nothing():
    driven = Driven().training()
    before = driven.state
    assert driven.hear(msgspec.structs.replace(RUN, model="org/tiny")) == []
    assert driven.state == before


@pytest.mark.parametrize(
    ("version", "older"), [(2, "Upgrade this agent."), (0, "Upgrade the aggregator.")], ids=["newer", "older"]
)
def test_run_of_another_protocol_version_says_which_side_to_upgrade(version, older):
    error = PeerError(Refusal.UNSUPPORTED_VERSION, "")
    end = finish(Driven().on(Garbled("kseed/demo/run", error, version)))
    assert end.exit_code == 3
    assert f"speaks protocol version {version}, this agent 1 to 1. {older}" in end.text


def test_stray_message_of_another_version_in_mid_run_is_a_warning_only():
    driven = Driven().training()
    before = driven.state
    (said,) = driven.on(Garbled("kseed/demo/plan", PeerError(Refusal.UNSUPPORTED_VERSION, ""), 2))
    assert isinstance(said, Say)
    assert said.text.endswith("Upgrade this agent.")
    assert driven.state == before


def test_unknown_run_ends_with_the_names_of_run_and_broker():
    driven = Driven()
    driven.on(Connected("MQTT 5", False), Tick(14.9, 0))
    end = finish(driven.on(Tick(15.0, 0)))
    assert (end.exit_code, end.text) == (
        2,
        "broker localhost:1883 has no run 'demo' (waited 15 s). Check the name, or wait for it with --wait.",
    )


def test_broker_that_is_not_there_ends_with_its_reason():
    driven = Driven()
    said = driven.on(Disconnected("connection refused"), Disconnected("connection refused"))
    assert texts(said) == "cannot connect to broker localhost:1883: connection refused; trying again"
    end = finish(driven.on(Tick(30.0, 0)))
    assert end.exit_code == 4
    assert "no connection to broker localhost:1883 in 30 s: connection refused" in end.text


def test_waiting_agent_has_no_time_limits():
    driven = Driven(replace(IDENTITY, limits=Limits(connect_timeout_s=None, run_timeout_s=None)))
    actions = driven.on(Tick(1e6, 0), Connected("MQTT 5", False), Tick(2e6, 0), Tick(3e6, 0))
    assert texts(actions).count("broker localhost:1883 has no run 'demo' yet; waiting for its aggregator") == 1
    assert not driven.state.is_finished


def test_run_without_a_plan_is_said_once():
    driven = Driven().joined()
    assert texts(driven.on(Tick(20.0, 0), Tick(40.0, 0))) == "run 'demo' has no plan yet; waiting for its aggregator"


# Following plans.


def test_device_without_the_version_takes_the_snapshot_and_unsubscribes():
    driven = Driven().joined()
    driven.hear(PLAN)
    assert driven.on(READY)[1:] == [Subscribe(SNAPSHOT_TOPIC)]
    assert driven.hear(snapshot(3, 0.5)) == [Unsubscribe(SNAPSHOT_TOPIC), Rebuild(3, snapshot(3, 0.5).coefficients)]
    assert driven.on(Rebuilt(3, DIGEST)) == [Train(PLAN, DIGEST)]


def changed(change, **fields):
    """The next plan, with the change that leads to it."""
    return msgspec.structs.replace(NEXT, change=change, **fields)


def some(seeds, values):
    return write_change(None if seeds is None else np.array(seeds), np.array(values), "f32")


def test_a_plans_change_is_applied_without_a_snapshot():
    driven = Driven().sending()
    wanted = np.zeros(SEEDS, np.float32)
    wanted[1], wanted[7] = 0.25, -1.5
    actions = driven.hear(changed(some([1, 7], [0.25, -1.5])))
    assert actions == [Forget(), CloseRound(3, None), Rebuild(4, coefficients_to_bytes(wanted))]


def test_a_change_is_added_to_what_is_held_in_float32():
    driven = Driven().sending()
    driven.hear(changed(some([1], [1.0])))
    fifth = changed(some([1], [2.0**-24 + 2.0**-40]), round=5, nonce=bytes(16), published_at_ms=1_200_000)
    driven.hear(fifth)
    assert np.frombuffer(driven.state.held.coefficients, "<f4")[1] == np.float32(1 + 2.0**-23)


def test_a_change_of_the_seeds_that_all_drew_names_none():
    driven = Driven().sending(msgspec.structs.replace(PLAN, common_seeds=True))
    drawn = np.unique(draw(PLAN.nonce, None, PLAN.local_steps, SEEDS, None))
    driven.hear(changed(some(None, [0.5] * len(drawn))))
    assert np.flatnonzero(np.frombuffer(driven.state.held.coefficients, "<f4")).tolist() == drawn.tolist()


def test_a_change_of_all_coefficients_needs_no_plan_before_it():
    driven = Driven().sending()
    driven.hear(changed(some(None, [0.5] * SEEDS)))
    assert driven.state.held == Held(4, np.full(SEEDS, 0.5, "<f4").tobytes())


def test_unnamed_numbers_are_not_guessed_at_without_the_plan_before():
    driven = Driven()
    driven.hear(RUN)
    driven.hear(PLAN)
    driven.on(READY)
    driven.hear(snapshot(4, 0.5))  # of a newer version than the plan's; the plan of that version is then missed
    assert driven.state.held.version == 4
    numbers = some(None, [1.0] * 32)  # of seeds that all drew, and as long as 4 bits for all 256
    actions = driven.hear(changed(numbers, round=5, nonce=bytes(16), published_at_ms=1_200_000))
    assert driven.state.held.version == 4
    assert not any(isinstance(action, Rebuild) for action in actions)


def test_a_plan_after_a_gap_asks_for_the_snapshot_whatever_its_change():
    driven = Driven().sending()
    actions = driven.hear(changed(some([0], [1.0]), round=5))
    assert actions[-1] == Subscribe(SNAPSHOT_TOPIC)
    assert driven.state.held.version == 3


@pytest.mark.parametrize(
    "change",
    [
        some([256], [1.0]),
        Change(b"\x01\x00\x01\x00", 0, bytes(8)),
        Change(b"\x01\x00", 0, np.array([np.nan], "<f4").tobytes()),
        Change(b"\x01\x00", 0, bytes(3)),
        some(None, [1.0, 1.0]),
    ],
    ids=["outside the pool", "not increasing", "NaN", "half a value", "seeds that nobody knows"],
)
def test_a_change_that_does_not_fit_is_said_and_the_snapshot_asked_for(change):
    driven = Driven().sending()
    actions = driven.hear(changed(change))
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


# The update and its receipts.


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


def test_receipt_of_another_round_changes_nothing():
    driven = Driven().sending()
    before = driven.state
    assert driven.hear(Receipt(2, Refusal.STALE_ROUND, "")) == []
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


# Divergence.


def test_diverged_device_takes_a_fresh_snapshot_for_the_next_round():
    driven = Driven().sending()
    driven.hear(Receipt(3, Refusal.DIVERGED, "digest ab, the fleet's is cd"))
    assert driven.state.held is None
    assert Subscribe(SNAPSHOT_TOPIC) in driven.hear(NEXT)


def test_diverged_device_that_has_begun_the_next_round_begins_it_again_from_a_snapshot():
    driven = Driven().sending()
    driven.hear(changed(some([0], [1.0])))
    driven.on(Rebuilt(4, DIGEST))
    actions = driven.hear(Receipt(3, Refusal.DIVERGED, ""))
    assert [type(action) for action in actions] == [Say, Abandon, Subscribe]
    assert driven.hear(Receipt(3, Refusal.DIVERGED, "")) == []


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


# Hostile input.

HOSTILE = {
    "levels of another K": msgspec.structs.replace(NEXT, levels=bytes(512)),
    "an update": UPDATE,
}


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


# Two agents with one id.


def test_takeover_ends_the_agent_without_touching_the_others_presence():
    driven = Driven().training()
    actions = driven.on(Disconnected(TAKEN_OVER, is_final=True))
    end = finish(actions)
    assert end.exit_code == 3
    assert "another agent runs with the device id 'ann' in run 'demo' (it took over the connection)" in end.text
    assert not only(actions, Publish)


@pytest.mark.parametrize("online", [True, False])
def test_foreign_session_on_the_own_presence_topic_ends_the_agent(online):
    driven = Driven().training()
    end = finish(driven.hear(Presence(online, 6, 1, 1, "kseed 0", "")))
    assert end.exit_code == 3
    assert "give it another --device-id" in end.text


def test_presence_of_a_predecessor_that_died_is_taken_over_in_silence():
    driven = Driven()
    driven.on(Connected("MQTT 5", True))
    assert driven.hear(Presence(True, 6, 1, 1, "kseed 0", ""), is_retained=True) == []
    driven.on(Taken("presence"))
    driven.hear(session.presence(driven.state, online=True))
    (again,) = driven.hear(Presence(False, 6, 1, 1, "kseed 0", ""))
    assert again == Publish(PRESENCE_TOPIC, session.presence(driven.state, online=True), retain=True)


def test_who_contradicts_without_end_is_answered_now_and_then():
    driven = Driven().joined()
    others = session.presence(driven.state, online=False)
    answers: list[Action] = []
    for tenth in range(1, 101):
        answers += only(driven.on(Tick(100.0 + tenth / 10, 0)), Publish)
        answers += driven.on(Taken("presence"))
        answers += driven.hear(others)
    assert set(answers) == {ONLINE}
    assert len(answers) == 2  # at once, and after five seconds, in ten
    driven.hear(session.presence(driven.state, online=True))
    assert not only(driven.on(Taken("presence"), Tick(200.0, 0)), Publish)


def test_own_will_that_comes_late_is_contradicted():
    driven = Driven().joined()
    (again,) = driven.hear(session.presence(driven.state, online=False))
    assert again == Publish(PRESENCE_TOPIC, session.presence(driven.state, online=True), retain=True)


def test_connection_refused_for_good_ends_the_agent():
    end = finish(Driven().on(Disconnected("bad user name or password", is_final=True)))
    assert (end.exit_code, end.text) == (4, "broker localhost:1883: bad user name or password")


# Gate and leaving.


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
