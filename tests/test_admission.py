"""Whether an update counts: every refusal with the state left equal, and the updates of a round so far."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import rounds
from aggregator.accepted import Accepted, AcceptedUpdates
from aggregator.events import BadUplink, KeepProgress, KeepUpdate, KeepVersion, Pause, SendReceipt, Stop
from aggregator.rounds import step
from aggregator.state import plan_of
from shared.messages import Listed, Receipt
from shared.refusals import Refusal
from shared.seeds import takes_part
from shared.wire import scalars_to_bytes
from tests.runs import FLEET_MODEL, OTHER_MODEL, START_MS, after, arrival, closed_round, opened, receipts, update_of


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
