"""The round logic: every rule of the table, every refusal with the state left equal, and the divergence vote."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import rounds
from aggregator.accepted import Accepted, AcceptedUpdates
from aggregator.closing import vote
from aggregator.events import (
    BadUplink,
    Begin,
    Event,
    KeepProgress,
    KeepUpdate,
    KeepVersion,
    Note,
    Online,
    Pause,
    Publish,
    Resume,
    SendReceipt,
    Stop,
    Tick,
)
from aggregator.reports import RoundReport
from aggregator.rounds import TABLE, step
from aggregator.spec import nonce
from aggregator.state import Exclusion, Phase, State, coefficients_of, new_state, plan_of
from shared.messages import (
    Change,
    Everyone,
    Listed,
    NormalisedStep,
    NumberFormat,
    Plan,
    Receipt,
    Run,
    Snapshot,
    Threshold,
)
from shared.refusals import Refusal
from shared.seeds import draw, takes_part
from shared.steprule import deltas
from shared.wire import scalars_from_bytes, scalars_to_bytes
from tests.runs import FLEET_MODEL, START_MS, after, arrival, opened, spec_of, update_of

OTHER_MODEL, THIRD_MODEL = b"o" * 16, b"t" * 16
DEADLINE_MS = START_MS + 60_000


def receipts(actions: Any) -> list[tuple[str, Refusal]]:
    return [(a.device, Refusal(a.receipt.code)) for a in actions if isinstance(a, SendReceipt)]


def published(actions: Any, kind: type) -> Any:
    (message,) = [a.message for a in actions if isinstance(a, Publish) and isinstance(a.message, kind)]
    return message


def report_in(actions: Any) -> RoundReport:
    (keep,) = [a for a in actions if isinstance(a, KeepVersion)]
    return keep.report


def notes(actions: Any) -> str:
    return "\n".join(a.text for a in actions if isinstance(a, Note))


# --- the table


def test_the_table_has_every_phase_and_event() -> None:
    assert set(TABLE) == set(itertools.product(get_args(Phase), get_args(Event)))


def test_the_written_table_says_the_same_as_the_code() -> None:
    lines = [line.split() for line in (rounds.__doc__ or "").splitlines()]
    events = {event.__name__: event for event in get_args(Event)}
    written = {cells[0]: " ".join(cells[1:]) for cells in lines if cells and cells[0] in events}
    assert set(written) == set(events)
    for name, event in events.items():
        dashes = [TABLE[phase, event].__name__ == "_nothing" for phase in get_args(Phase)]
        assert written[name].split().count("-") == sum(dashes), name


@pytest.mark.parametrize(("phase", "event"), sorted(TABLE, key=str))
def test_a_rule_that_does_nothing_leaves_the_very_state(phase: Phase, event: type) -> None:
    states = {
        "created": new_state(spec_of()),
        "open": opened(),
        "paused": after(opened(), Pause(START_MS, "")).state,
        "finished": after(opened(), Stop(START_MS, "")).state,
    }
    examples: dict[type, Any] = {
        Begin: Begin(START_MS),
        Tick: Tick(START_MS),
        Online: Online(0),
        Pause: Pause(START_MS, "r"),
        Resume: Resume(START_MS),
        Stop: Stop(START_MS, "r"),
        BadUplink: BadUplink("a", Refusal.MALFORMED, "d"),
    }
    state = states[phase]
    following, actions = step(state, examples.get(event, arrival("a", update_of())))
    if TABLE[phase, event].__name__ == "_nothing":
        assert following is state
        assert actions == ()
    if not any(isinstance(a, (KeepUpdate, KeepVersion, KeepProgress)) for a in actions):
        assert following is state


# --- opening


def test_a_run_begins_with_run_snapshot_and_plan_in_this_order() -> None:
    state, actions = step(new_state(spec_of()), Begin(START_MS))
    messages = [a.message for a in actions if isinstance(a, Publish)]
    assert [type(m) for m in messages] == [Run, Snapshot, Plan]
    assert messages[0] == spec_of().facts
    assert messages[1] == Snapshot(0, bytes(4 * 256))
    plan = messages[2]
    assert (plan.round, plan.phase, plan.deadline_s, plan.published_at_ms) == (0, "open", 60.0, START_MS)
    assert plan.nonce == nonce(state.spec, 0)
    assert len(plan.nonce) == 16


def test_nonces_differ_by_round_and_by_key() -> None:
    first = spec_of()
    nonces = {nonce(first, number) for number in range(100)}
    assert len(nonces) == 100


def test_beginning_again_says_the_same_again() -> None:
    state, first = step(new_state(spec_of()), Begin(START_MS))
    again, second = step(state, Begin(START_MS + 5000))
    assert again is state
    assert [a for a in first if isinstance(a, Publish)] == list(second)


def test_a_deadline_that_passed_while_the_broker_was_away_starts_anew() -> None:
    late = DEADLINE_MS + 1
    state, actions = step(opened(), Begin(late))
    assert state.progress.deadline_at_ms == late + 60_000
    assert state.progress.extensions == 0
    assert published(actions, Plan).published_at_ms == late
    assert "starts anew" in notes(actions)


def test_a_clock_set_back_neither_stretches_the_deadline_nor_makes_an_older_plan() -> None:
    state = opened()
    early = START_MS - 3_600_000
    state, actions = step(state, Begin(early))
    assert state.progress.deadline_at_ms == early + 60_000
    assert published(actions, Plan).published_at_ms == START_MS
    paused, actions = step(state, Pause(early + 5, ""))
    assert published(actions, Plan).published_at_ms == START_MS
    assert plan_of(step(paused, Resume(early + 6)).state).published_at_ms == START_MS


# --- admission


def test_an_update_is_kept_and_receipted() -> None:
    event = arrival("a", update_of())
    state, actions = step(opened(), event)
    assert actions == (
        KeepUpdate(0, "a", event.payload, event.now_ms, 0),
        SendReceipt("a", Receipt(0, Refusal.ACCEPTED, "")),
    )
    assert list(state.updates) == ["a"]


def test_fewer_scalars_than_planned_are_an_interrupted_devices_good_right() -> None:
    update = update_of(scalars=scalars_to_bytes([1.5], "f32"))
    assert receipts(step(opened(), arrival("a", update)).actions) == [("a", Refusal.ACCEPTED)]


REFUSALS: dict[str, tuple[Any, Refusal, str]] = {
    "too many scalars": (update_of(scalars=scalars_to_bytes([1, 2, 3, 4], "f32")), Refusal.SCALAR_COUNT, "4 scalars"),
    "half a scalar": (update_of(scalars=b"123456"), Refusal.MALFORMED, "6 bytes"),
    "future round": (update_of(1), Refusal.FUTURE_ROUND, "round 1, the current one is 0"),
    "too heavy": (update_of(samples=2_000_000), Refusal.WEIGHT_OUT_OF_RANGE, "2000000 samples; allowed: 1 to 1000000"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bad_update_is_refused_and_leaves_the_very_state(name: str) -> None:
    update, code, detail = REFUSALS[name]
    state = opened()
    following, actions = step(state, arrival("a", update))
    assert following is state
    assert following == opened()
    assert receipts(actions) == [("a", code)]
    assert detail in actions[0].receipt.detail  # type: ignore[union-attr]
    assert len(actions) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"scalars": np.array([1, np.nan], "<f4").tobytes()},
        {"scalars": np.array([-np.inf], "<f4").tobytes()},
        {"train_loss": float("nan")},
        {"held_out_loss": float("inf")},
        {"held_out_accuracy": float("nan")},
    ],
)
def test_an_update_that_is_not_finite_is_refused(fields: dict[str, Any]) -> None:
    state = opened()
    event = rounds.UpdateArrived("a", update_of(**fields), b"payload", START_MS)
    following, actions = step(state, event)
    assert following is state
    assert receipts(actions) == [("a", Refusal.NON_FINITE)]


def test_the_same_update_twice_counts_once() -> None:
    event = arrival("a", update_of())
    once = step(opened(), event).state
    twice, actions = step(once, event)
    assert twice is once
    assert receipts(actions) == [("a", Refusal.DUPLICATE)]


def test_another_update_of_the_same_device_conflicts_and_the_first_counts() -> None:
    once = step(opened(), arrival("a", update_of())).state
    twice, actions = step(once, arrival("a", update_of(samples=11)))
    assert twice is once
    assert receipts(actions) == [("a", Refusal.CONFLICT)]
    assert twice.updates["a"].update.samples == 10


def closed_round(*, model: bytes = FLEET_MODEL) -> tuple[State, Any]:
    return after(opened(), arrival("a", update_of(model_digest=model)), arrival("b", update_of(model_digest=model)))


def test_late_update_is_refused_as_stale() -> None:
    state, _ = closed_round()
    following, actions = step(state, arrival("c", update_of(0)))
    assert following is state
    assert receipts(actions) == [("c", Refusal.STALE_ROUND)]


def test_an_accepted_update_sent_again_after_its_round_is_a_duplicate() -> None:
    state, _ = closed_round()
    assert receipts(step(state, arrival("a", update_of(0))).actions) == [("a", Refusal.DUPLICATE)]
    changed = arrival("a", update_of(0, samples=3))
    assert receipts(step(state, changed).actions) == [("a", Refusal.STALE_ROUND)]


@pytest.mark.parametrize("end", [Pause(START_MS, "lunch"), Stop(START_MS, "lunch")])
def test_a_paused_or_finished_run_takes_no_update_and_says_why(end: Any) -> None:
    state = after(opened(), end).state
    following, actions = step(state, arrival("a", update_of()))
    assert following is state
    assert receipts(actions) == [("a", Refusal.RUN_CLOSED)]
    assert actions[0].receipt.detail == "lunch"  # type: ignore[union-attr]


def test_a_device_that_the_plan_does_not_select_is_refused() -> None:
    state = opened(participation=0.5)
    plan = plan_of(state)
    inside = {d: takes_part(plan.participation, plan.nonce, d) for d in (f"d{i}" for i in range(40))}
    assert 10 < sum(inside.values()) < 30
    for device, is_selected in inside.items():
        following, actions = step(state, arrival(device, update_of()))
        assert receipts(actions) == [(device, Refusal.ACCEPTED if is_selected else Refusal.NOT_SELECTED)]
        assert (following is state) == (not is_selected)


def test_only_named_devices_take_part_in_a_run_that_names_them() -> None:
    state = opened(devices=("a", "b"))
    assert plan_of(state).participation == Listed(("a", "b"))
    assert receipts(step(state, arrival("c", update_of())).actions) == [("c", Refusal.NOT_SELECTED)]


def test_a_bad_uplink_is_answered_with_its_code() -> None:
    state = opened()
    following, actions = step(state, BadUplink("a", Refusal.OVERSIZED, "x" * 1000))
    assert following is state
    assert receipts(actions) == [("a", Refusal.OVERSIZED)]
    assert len(actions[0].receipt.detail) == 512  # type: ignore[union-attr]


# --- closing


def test_the_update_that_makes_the_quorum_closes_the_round() -> None:
    state, actions = closed_round()
    kinds = [type(a.message) if isinstance(a, Publish) else type(a) for a in actions]
    assert kinds == [
        KeepUpdate,
        SendReceipt,
        KeepUpdate,
        SendReceipt,
        KeepVersion,
        KeepProgress,
        Snapshot,
        Plan,
    ]
    assert state.progress.round == 1
    assert not state.updates
    assert published(actions, Plan).round == published(actions, Snapshot).version == 1


def test_the_next_version_is_the_average_of_the_replayed_updates() -> None:
    first = opened()
    state, actions = after(
        first, arrival("b", update_of(samples=30)), arrival("a", update_of(scalars=scalars_to_bytes([8.0], "f32")))
    )
    by_hand = np.zeros(256)
    for seed, g in zip(draw(nonce(first.spec, 0), "b", 3, 256, None), (1.0, 2.0, 3.0), strict=True):
        by_hand[seed] -= 0.75 * 0.5 * g  # 30 of 40 samples, lr 0.5
    by_hand[draw(nonce(first.spec, 0), "a", 1, 256, None)[0]] -= 0.25 * 0.5 * 8.0
    assert coefficients_of(state.coefficients).tolist() == by_hand.astype(np.float32).tolist()
    change = published(actions, Plan).change
    assert change is not None and change.seeds is not None
    assert np.frombuffer(change.seeds, "<u2").tolist() == np.flatnonzero(by_hand).tolist()
    assert np.frombuffer(change.values, "<f4").tolist() == by_hand[by_hand != 0].tolist()


def test_common_seeds_are_the_same_for_all_devices() -> None:
    state, actions = after(opened(common_seeds=True), arrival("a", update_of()), arrival("b", update_of()))
    change = published(actions, Plan).change
    expected = sorted(set(draw(nonce(state.spec, 0), None, 3, 256, None).tolist()))
    assert np.flatnonzero(coefficients_of(state.coefficients)).tolist() == expected
    assert change is not None and change.seeds is None and len(change.values) == 4 * len(expected)


def test_a_plan_has_no_change_where_the_snapshot_is_shorter() -> None:
    scalars = scalars_to_bytes(np.ones(2000, np.float32), "f32")
    state = opened(local_steps=2000, quorum=1)
    _, actions = step(state, arrival("a", update_of(scalars=scalars)))
    assert published(actions, Plan).change is None


def test_every_plan_of_a_round_has_its_change() -> None:
    state, actions = closed_round()
    change = published(actions, Plan).change
    assert change is not None
    paused = step(state, Pause(START_MS, "lunch"))
    assert published(paused.actions, Plan).change == change
    assert published(step(state, Begin(START_MS)).actions, Plan).change == change


@pytest.mark.parametrize("form", ["f32", "f16", "f8"])
def test_what_a_change_rounds_away_is_carried_into_the_next_round(form: NumberFormat) -> None:
    state = opened(change_format=form, quorum=1, rounds=9, lr=0.3)
    exact = np.zeros(256)
    for number in range(5):
        for seed, g in zip(draw(nonce(state.spec, number), "a", 3, 256, None), (1.0, 2.0, 3.0), strict=True):
            exact[seed] += np.float32(-0.3 * g)
        state = after(state, arrival("a", update_of(number))).state
    a, carried = coefficients_of(state.coefficients), coefficients_of(state.carried)
    assert np.allclose(a.astype(np.float64) + carried, exact, rtol=0, atol=1e-7)
    assert (form == "f32") == bool(np.allclose(a, exact, rtol=0, atol=1e-6))


@given(order=st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_arrival_does_not_change_the_version(order: list[str]) -> None:
    scalars = {device: np.array([i + 0.1, 2.7 * i, -3.3], np.float32) for i, device in enumerate("abcd")}
    events = [arrival(d, update_of(scalars=scalars_to_bytes(scalars[d], "f32"), samples=ord(d))) for d in "abcd"]
    straight = after(opened(quorum=4, step="normalised"), *events).state
    mixed = after(opened(quorum=4, step="normalised"), *(events["abcd".index(d)] for d in order)).state
    assert mixed.coefficients == straight.coefficients
    assert mixed.fleet == straight.fleet


def test_the_next_version_follows_the_normalised_rule_with_the_fleets_prior() -> None:
    settings = {"step": "normalised", "step_rms": 0.25, "quorum": 1}
    first = step(opened(**settings), arrival("a", update_of())).state
    rule = plan_of(first).step
    assert rule == NormalisedStep(0.25, 3.0, 0.99, pytest.approx(14 / 3), 3)
    second = step(first, arrival("a", update_of(1))).state
    drawn = draw(nonce(first.spec, 1), "a", 3, 256, None)
    by_hand = coefficients_of(first.coefficients).astype(np.float64)
    np.add.at(by_hand, drawn, deltas(rule, scalars_from_bytes(update_of().scalars, "f32")).astype(np.float64))
    assert coefficients_of(second.coefficients).tolist() == by_hand.astype(np.float32).tolist()


def test_pro_publishes_levels_and_replays_with_them() -> None:
    first, actions = step(opened(algorithm="fedkseed-pro", quorum=1), arrival("a", update_of()))
    plan = published(actions, Plan)
    assert len(plan.levels) == 256
    seen = set(draw(nonce(first.spec, 0), "a", 3, 256, None).tolist())
    assert {k for k, level in enumerate(plan.levels) if level > 0} == seen
    second = step(first, arrival("a", update_of(1))).state
    moved = np.flatnonzero(coefficients_of(second.coefficients) != coefficients_of(first.coefficients))
    assert moved.tolist() == sorted(set(draw(nonce(first.spec, 1), "a", 3, 256, plan.levels).tolist()))


def test_the_report_weighs_losses_by_samples() -> None:
    a = update_of(samples=30, train_loss=1.0, held_out_loss=2.0, held_out_accuracy=0.5)
    b = update_of(samples=10, train_loss=2.0, held_out_loss=None, held_out_accuracy=None)
    _, actions = after(opened(), arrival("a", a), arrival("b", b))
    report = report_in(actions)
    assert (report.train_loss, report.held_out_loss, report.held_out_accuracy) == (1.25, 2.0, 0.5)
    assert (report.accepted, report.counted, report.samples, report.steps) == (2, 2, 40, 6)
    assert report.update_bytes == len(arrival("a", a).payload) + len(arrival("b", b).payload)
    assert report.seconds == 1.0


def test_the_run_is_finished_after_its_rounds() -> None:
    state = opened(rounds=2, quorum=1)
    state, actions = after(state, arrival("a", update_of(0)), arrival("a", update_of(1)))
    assert state.progress.phase == "finished"
    plan = [a.message for a in actions if isinstance(a, Publish) and isinstance(a.message, Plan)][-1]
    assert (plan.round, plan.phase, plan.reason) == (2, "finished", "all 2 rounds are done")


def test_held_out_loss_is_asked_for_every_so_many_rounds() -> None:
    state = opened(rounds=6, quorum=1, evaluate_every=2)
    asked = []
    for number in range(4):
        asked.append(plan_of(state).evaluate)
        state = step(state, arrival("a", update_of(number))).state
    assert asked == [True, False, True, False]
    assert not plan_of(opened(evaluate_every=0)).evaluate


def test_the_last_version_is_evaluated_too() -> None:
    for every, asked in ((0, False), (2, True)):
        state = step(opened(rounds=1, quorum=1, evaluate_every=every), arrival("a", update_of())).state
        assert plan_of(state).evaluate is asked


# --- deadlines


def test_nothing_happens_before_the_deadline() -> None:
    state = step(opened(), arrival("a", update_of())).state
    assert step(state, Tick(DEADLINE_MS - 1)) == (state, ())


def test_the_deadline_closes_a_round_that_has_its_least_updates() -> None:
    state = step(opened(), arrival("a", update_of())).state
    following, actions = step(state, Tick(DEADLINE_MS))
    assert following.progress.round == 1
    assert report_in(actions).counted == 1


def test_the_deadline_extends_a_round_that_has_too_few() -> None:
    state = step(opened(min_updates=2), arrival("a", update_of())).state
    following, actions = step(state, Tick(DEADLINE_MS))
    assert following.progress.round == 0
    assert following.progress.deadline_at_ms == DEADLINE_MS + 60_000
    assert list(following.updates) == ["a"]
    plan = published(actions, Plan)
    assert (plan.round, plan.nonce, plan.published_at_ms) == (0, nonce(state.spec, 0), DEADLINE_MS)
    assert "1 of 2 updates at the deadline" in notes(actions)


def test_each_extension_selects_twice_as_many_and_keeps_those_it_had() -> None:
    state = opened(participation=0.2)
    shares = []
    for number in range(4):
        shares.append(plan_of(state).participation)
        state = step(state, Tick(DEADLINE_MS + number * 60_000)).state
    assert shares == [Threshold(int(0.2 * 2**32)), Threshold(int(0.4 * 2**32)), Threshold(int(0.8 * 2**32)), Everyone()]


def test_extensions_are_forgotten_when_the_round_closes() -> None:
    state = step(opened(participation=0.2, quorum=1), Tick(DEADLINE_MS)).state
    selected = next(
        d for d in (f"d{i}" for i in range(99)) if takes_part(plan_of(state).participation, nonce(state.spec, 0), d)
    )
    closed = step(state, arrival(selected, update_of())).state
    assert closed.progress.extensions == 0
    assert plan_of(closed).participation == Threshold(int(0.2 * 2**32))


# --- the operator


def test_pause_keeps_the_updates_and_resume_goes_on_with_the_same_round() -> None:
    state = step(opened(), arrival("a", update_of())).state
    paused, actions = step(state, Pause(START_MS + 2000, "lunch"))
    assert (published(actions, Plan).phase, published(actions, Plan).reason) == ("paused", "lunch")
    assert step(paused, Tick(DEADLINE_MS * 2)) == (paused, ())
    late = DEADLINE_MS + 99
    resumed, actions = step(paused, Resume(late))
    plan = published(actions, Plan)
    assert (plan.phase, plan.round, plan.nonce) == ("open", 0, nonce(state.spec, 0))
    assert resumed.progress.deadline_at_ms == late + 60_000
    assert list(resumed.updates) == ["a"]


def test_stop_combines_the_updates_there_are() -> None:
    state = step(opened(), arrival("a", update_of())).state
    stopped, actions = step(state, Stop(START_MS + 2000, "enough"))
    assert (stopped.progress.phase, stopped.progress.round, stopped.progress.reason) == ("finished", 1, "enough")
    assert report_in(actions).counted == 1
    assert stopped.coefficients != state.coefficients


def test_stop_without_updates_finishes_as_it_is() -> None:
    state = opened()
    stopped, actions = step(state, Stop(START_MS, ""))
    assert (stopped.progress.phase, stopped.progress.round) == ("finished", 0)
    assert published(actions, Plan).reason == "stopped by the operator"
    assert stopped.coefficients == state.coefficients


def test_a_run_that_was_paused_before_it_began_can_be_resumed() -> None:
    state = after(new_state(spec_of()), Pause(START_MS, ""), Begin(START_MS), Resume(START_MS + 5)).state
    assert (state.progress.phase, state.progress.opened_at_ms) == ("open", START_MS + 5)


# --- divergence


def test_a_device_with_another_model_is_named_left_out_and_told() -> None:
    state, actions = after(
        opened(quorum=3),
        arrival("a", update_of()),
        arrival("b", update_of(model_digest=OTHER_MODEL, samples=1000)),
        arrival("c", update_of()),
    )
    assert receipts(actions)[-1] == ("b", Refusal.DIVERGED)
    only_equal = after(opened(), arrival("a", update_of()), arrival("c", update_of())).state
    assert state.coefficients == only_equal.coefficients
    assert [(e.device, e.round, e.digest) for e in state.progress.excluded] == [("b", 0, OTHER_MODEL.hex())]
    assert "device b DIVERGED" in notes(actions)
    assert FLEET_MODEL.hex() in notes(actions)
    report = report_in(actions)
    assert (report.accepted, report.counted, report.left_out) == (3, 2, 1)


def with_b_excluded(**settings: Any) -> State:
    return after(
        opened(**{"quorum": 3, **settings}),
        arrival("a", update_of()),
        arrival("b", update_of(model_digest=OTHER_MODEL)),
        arrival("c", update_of()),
    ).state


def test_an_excluded_device_is_back_when_its_model_agrees() -> None:
    state, actions = after(with_b_excluded(), *(arrival(device, update_of(1)) for device in "abc"))
    assert state.progress.excluded == ()
    assert "device b agrees with the fleet again" in notes(actions)
    assert report_in(actions).counted == 3


def test_an_excluded_device_has_no_vote() -> None:
    state = with_b_excluded(min_updates=1)
    state, actions = after(
        state,
        arrival("b", update_of(1, model_digest=THIRD_MODEL)),
        arrival("a", update_of(1)),
        Tick(DEADLINE_MS * 2),
    )
    # b and a differ: one vote against one would be no majority, but b has none.
    assert report_in(actions).outcome == "combined"
    assert receipts(actions)[-1] == ("b", Refusal.DIVERGED)
    assert [(e.device, e.round) for e in state.progress.excluded] == [("b", 1)]


def test_an_excluded_device_alone_does_not_close_a_round() -> None:
    state = step(with_b_excluded(), arrival("b", update_of(1))).state
    following, actions = step(state, Tick(DEADLINE_MS * 2))
    assert following.progress.round == 1
    assert "0 of 1 updates at the deadline" in notes(actions)


def test_excluded_devices_alone_do_not_make_the_quorum() -> None:
    state = opened(quorum=1)
    progress = msgspec.structs.replace(state.progress, excluded=(Exclusion("b", 0, "00"),))
    state = step(replace(state, progress=progress), arrival("b", update_of())).state
    assert (state.progress.round, list(state.updates)) == (0, ["b"])
    assert step(state, arrival("a", update_of())).state.progress.round == 1


def test_nobody_waits_for_an_excluded_device() -> None:
    state = after(
        with_b_excluded(),
        *(
            arrival(d, update_of(1, model_digest=m))
            for d, m in (("b", OTHER_MODEL), ("a", FLEET_MODEL), ("c", FLEET_MODEL))
        ),
    ).state
    assert state.progress.round == 2


def test_an_excluded_device_that_stays_away_stays_excluded() -> None:
    state = after(
        with_b_excluded(), arrival("a", update_of(1)), arrival("c", update_of(1)), Tick(DEADLINE_MS * 2)
    ).state
    assert [e.device for e in state.progress.excluded] == ["b"]


def test_a_left_out_update_sent_again_is_told_that_it_diverged() -> None:
    again = arrival("b", update_of(model_digest=OTHER_MODEL))
    assert receipts(step(with_b_excluded(), again).actions) == [("b", Refusal.DIVERGED)]


def test_without_a_majority_nothing_is_combined_and_everyone_is_told() -> None:
    first = opened()
    state, actions = after(first, arrival("a", update_of()), arrival("b", update_of(model_digest=OTHER_MODEL)))
    assert state.progress.round == 1
    assert state.coefficients == first.coefficients
    assert state.fleet == first.fleet
    assert state.progress.excluded == ()
    assert receipts(actions)[-2:] == [("a", Refusal.DIVERGED), ("b", Refusal.DIVERGED)]
    told = [a.receipt.detail for a in actions if isinstance(a, SendReceipt)][-1]
    assert FLEET_MODEL.hex() in told
    assert OTHER_MODEL.hex() in told
    assert report_in(actions).outcome == "no majority"
    assert "nothing combined" in notes(actions)
    assert published(actions, Plan).change == Change(b"", 0, b"")


@pytest.mark.parametrize(
    ("digests", "excluded", "reference", "counted"),
    [
        ({"a": b"x"}, set(), b"x", ("a",)),
        ({"a": b"x", "b": b"y"}, set(), None, ()),
        ({"a": b"x", "b": b"y", "c": b"x"}, set(), b"x", ("a", "c")),
        ({"a": b"x", "b": b"y", "c": b"x", "d": b"z"}, set(), None, ()),  # a half is no majority
        ({"a": b"x", "b": b"y", "c": b"y"}, {"b", "c"}, b"x", ("a",)),
        ({"a": b"x", "b": b"x"}, {"b"}, b"x", ("a", "b")),
        ({"b": b"y"}, {"b"}, None, ()),
    ],
)
def test_votes(digests: Any, excluded: Any, reference: Any, counted: Any) -> None:
    verdict = vote(digests, frozenset(excluded))
    assert (verdict.reference, verdict.counted) == (reference, counted)
    assert set(verdict.left_out) == set(digests) - set(counted)


# --- no silent numerics


def test_a_combination_that_overflows_changes_nothing_and_says_so() -> None:
    first = opened(lr=1.0, server_scale="sum", common_seeds=True)
    huge = update_of(scalars=scalars_to_bytes([3e38], "f32"))
    state, actions = after(first, arrival("a", huge), arrival("b", huge))
    assert state.progress.round == 1
    assert state.coefficients == first.coefficients
    assert report_in(actions).outcome == "not finite"
    assert "float32 holds up to" in notes(actions)


# --- who comes and goes


def test_a_device_that_joins_at_round_50_counts_from_there() -> None:
    state = opened(rounds=60, quorum=1)
    for number in range(50):
        state = step(state, arrival("a", update_of(number))).state
    state, actions = step(state, arrival("newcomer", update_of(50)))
    assert receipts(actions)[0] == ("newcomer", Refusal.ACCEPTED)
    assert state.progress.round == 51


def test_a_device_that_vanishes_and_returns_counts_again() -> None:
    state = opened(rounds=9, quorum=2)
    for number, devices in enumerate(["ab", "bc", "bc", "ac"]):
        state = after(state, *(arrival(device, update_of(number)) for device in devices)).state
    assert state.progress.round == 4


# --- accepted updates


def test_old_versions_of_the_accepted_updates_do_not_see_newer_entries() -> None:
    one = Accepted(b"1", update_of())
    empty: AcceptedUpdates[str] = AcceptedUpdates()
    first = empty.with_one("a", one)
    second = first.with_one("b", one)
    branch = first.with_one("c", one)
    assert [list(m) for m in (empty, first, second, branch)] == [[], ["a"], ["a", "b"], ["a", "c"]]
    assert "b" not in first
    assert len(first) == 1
    with pytest.raises(ValueError, match="a has an accepted update"):
        second.with_one("a", one)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2), st.sampled_from([FLEET_MODEL, OTHER_MODEL]))))
def test_every_refused_event_leaves_the_state_equal(plan: list[tuple[str, int, bytes]]) -> None:
    """Any mix of updates: a state changes exactly when something is kept, and versions count up by one."""
    state = opened(rounds=2)
    for device, number, model in plan:
        before = state
        state, actions = step(state, arrival(device, update_of(number, model_digest=model)))
        kept = [a for a in actions if isinstance(a, (KeepUpdate, KeepVersion, KeepProgress))]
        assert (state is before) == (not kept)
        assert state.progress.round - before.progress.round == sum(isinstance(a, KeepVersion) for a in actions)
        assert len(receipts(actions)) >= 1
