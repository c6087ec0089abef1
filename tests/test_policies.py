"""Round policies: over-selection, late updates, no-shows, empty rounds, a paused run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.algorithms import damped
from aggregator.events import Begin, KeepUpdate, KeepVersion, Note, Online, Pause, Publish, Resume, SendReceipt, Tick
from aggregator.rounds import step
from aggregator.spec import nonce
from aggregator.state import State, coefficients_of, new_state
from shared.errors import UserError
from shared.messages import Everyone, Plan, Threshold
from shared.refusals import Refusal
from shared.seeds import draw, takes_part
from shared.wire import scalars_to_bytes
from tests.runs import FLEET_MODEL, OTHER_MODEL, START_MS, after, arrival, notes, opened, receipts, spec_of, update_of


def codes(actions: Any) -> list[Refusal]:
    return [Refusal(action.receipt.code) for action in actions if isinstance(action, SendReceipt)]


def answer(state: State, device: str, **fields: Any) -> tuple[Refusal, str]:
    """Code and detail of the receipt; the state of a refused update must stay the very same."""
    following, actions = step(state, arrival(device, update_of(**fields)))
    (receipt,) = [action.receipt for action in actions if isinstance(action, SendReceipt)][:1]
    assert (following is state) == (receipt.code != 0)
    return Refusal(receipt.code), receipt.detail


def in_round(number: int, *devices: str, **settings: Any) -> State:
    """A run that folds late updates in, after rounds 0 .. number - 1 of a and b."""
    state = opened(**{"late": "fold", "rounds": 9, **settings})
    for closed in range(number):
        state = after(state, *(arrival(device, update_of(closed)) for device in devices or ("a", "b"))).state
    assert state.progress.round == number
    return state


# --- late updates


def test_a_late_update_is_refused_where_the_run_says_so() -> None:
    code, detail = answer(in_round(1, late="refuse"), "c", round_number=0)
    assert code is Refusal.STALE_ROUND
    assert detail == "the update is of round 0, the current one is 1"


def test_a_late_update_is_kept_for_the_open_round_and_told_its_weight() -> None:
    state, actions = step(in_round(1), arrival("c", update_of(0)))
    (keep,) = [action for action in actions if isinstance(action, KeepUpdate)]
    assert (keep.round, keep.device, keep.counted_in) == (0, "c", 1)
    (told,) = [action.receipt for action in actions if isinstance(action, SendReceipt)]
    assert (told.round, told.code) == (0, Refusal.ACCEPTED)
    assert told.detail == "it counts, for 1 / sqrt(2) of its weight, if round 1 combines anything"
    assert list(state.late) == [("c", 0)]


def test_a_late_update_is_combined_with_the_seeds_and_the_rule_of_its_own_round() -> None:
    state = in_round(2)
    before = coefficients_of(state.coefficients).astype(np.float64)
    scalars = np.array([4, 5, 6], np.float32)
    late = update_of(0, samples=20, scalars=scalars_to_bytes(scalars, "f32"))
    closed, actions = after(state, arrival("z", late), arrival("a", update_of(2)), arrival("b", update_of(2)))
    expected = np.zeros(256)
    for device, made_for, values, weight in (
        ("a", 2, [1, 2, 3], 10 / 40),
        ("b", 2, [1, 2, 3], 10 / 40),
        ("z", 0, [4, 5, 6], 20 / 40 / math.sqrt(3)),
    ):
        change = np.zeros(256)
        for seed, scalar in zip(draw(nonce(state.spec, made_for), device, 3, 256, None), values, strict=True):
            change[seed] += -0.5 * scalar
        expected += weight * change
    assert coefficients_of(closed.coefficients).tobytes() == (before + expected).astype(np.float32).tobytes()
    (report,) = [action.report for action in actions if isinstance(action, KeepVersion)]
    assert (report.accepted, report.counted, report.late) == (3, 3, 1)


def test_late_updates_neither_make_the_quorum_nor_close_at_the_deadline() -> None:
    state = after(in_round(1), *(arrival(device, update_of(0)) for device in "cdef")).state
    assert state.progress.round == 1
    state, actions = step(state, Tick(state.progress.deadline_at_ms))
    assert state.progress.extensions == 1
    assert [type(action) for action in actions if isinstance(action, KeepVersion)] == []
    assert len(state.late) == 4


def test_one_device_may_have_a_late_update_and_a_timely_one_in_a_round() -> None:
    state = after(in_round(1), arrival("c", update_of(0)), arrival("c", update_of(1)), arrival("a", update_of(1))).state
    assert state.progress.round == 2


def test_the_order_of_late_arrivals_does_not_change_the_version() -> None:
    events = [
        arrival("c", update_of(0)),
        arrival("d", update_of(1)),
        arrival("c", update_of(1)),
        arrival("a", update_of(2)),
    ]
    ends = {
        after(in_round(2), *[events[i] for i in order], arrival("b", update_of(2))).state.coefficients
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2])
    }
    assert len(ends) == 1


def test_a_late_update_sent_again_counts_once_now_and_after_its_round() -> None:
    state = after(in_round(1), arrival("c", update_of(0))).state
    assert answer(state, "c", round_number=0)[0] is Refusal.DUPLICATE
    assert answer(state, "c", round_number=0, samples=11)[0] is Refusal.CONFLICT
    state = after(state, arrival("a", update_of(1)), arrival("b", update_of(1))).state
    assert answer(state, "c", round_number=0)[0] is Refusal.DUPLICATE
    assert answer(state, "c", round_number=0, samples=11)[0] is Refusal.CONFLICT
    assert answer(state, "a", round_number=0)[0] is Refusal.DUPLICATE
    assert answer(state, "a", round_number=0, samples=11)[0] is Refusal.CONFLICT


def test_an_update_later_than_max_staleness_is_refused() -> None:
    assert answer(in_round(3, max_staleness=2), "c", round_number=1)[0] is Refusal.ACCEPTED
    code, detail = answer(in_round(3, max_staleness=2), "c", round_number=0)
    assert code is Refusal.STALE_ROUND
    assert detail == "the update is of round 0, the current one is 3"


def test_a_late_update_must_agree_with_the_fleet_of_its_own_round() -> None:
    code, detail = answer(in_round(1), "c", round_number=0, model_digest=OTHER_MODEL)
    assert code is Refusal.DIVERGED
    assert detail == f"round 0: your model was {OTHER_MODEL.hex()}, the fleet's {FLEET_MODEL.hex()}"


def test_a_round_without_agreement_says_which_late_updates_it_loses() -> None:
    state = step(in_round(1), arrival("c", update_of(0))).state
    split = [arrival("a", update_of(1)), arrival("b", update_of(1, model_digest=OTHER_MODEL))]
    actions = after(state, *split).actions
    assert [device for device, code in receipts(actions) if code is Refusal.DIVERGED] == ["a", "b"]
    assert "nothing combined" in notes(actions)
    assert "nor do the late updates count of c (round 0)" in notes(actions)


def test_a_late_update_of_a_round_without_agreement_is_refused() -> None:
    split = [arrival("a", update_of(0)), arrival("b", update_of(0, model_digest=OTHER_MODEL))]
    state = after(opened(late="fold"), *split).state
    code, detail = answer(state, "c", round_number=0)
    assert code is Refusal.STALE_ROUND
    assert "did not agree on a model" in detail
    for device, digest in (("a", FLEET_MODEL), ("b", OTHER_MODEL)):  # they were left out, and are told so again
        assert answer(state, device, round_number=0, model_digest=digest)[0] is Refusal.DIVERGED


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"samples": 10**7}, Refusal.WEIGHT_OUT_OF_RANGE),
        ({"train_loss": math.inf}, Refusal.NON_FINITE),
        ({"scalars": b"123"}, Refusal.MALFORMED),
        ({"scalars": bytes(16)}, Refusal.SCALAR_COUNT),
    ],
)
def test_a_late_update_is_checked_like_any_other(fields: dict[str, Any], code: Refusal) -> None:
    event = arrival("c", update_of(0))
    state = in_round(1)
    bad = replace(event, update=replace_update(event.update, fields))
    following, actions = step(state, bad)
    assert following is state
    assert codes(actions) == [code]


def replace_update(update: Any, fields: dict[str, Any]) -> Any:
    import msgspec

    return msgspec.structs.replace(update, **fields)


def test_a_late_update_is_judged_by_the_selection_of_its_own_round() -> None:
    state = opened(late="fold", participation=0.05, min_updates=1, quorum=1, rounds=9)
    selected = [
        d for d in (f"d{i}" for i in range(400)) if takes_part(Threshold(int(0.05 * 2**32)), nonce(state.spec, 0), d)
    ]
    chosen, other = selected[0], next(d for d in (f"d{i}" for i in range(400)) if d not in selected)
    state = after(state, arrival(chosen, update_of(0))).state
    assert state.progress.round == 1
    assert answer(state, selected[1], round_number=0)[0] is Refusal.ACCEPTED
    assert answer(state, other, round_number=0)[0] is Refusal.NOT_SELECTED


def test_staleness_damps_by_one_over_the_square_root() -> None:
    assert [damped(3.0, staleness) for staleness in (0, 3, 8)] == [3.0, 1.5, 1.0]


# --- over-selection


def plan_in(actions: Any) -> Plan:
    (plan,) = [a.message for a in actions if isinstance(a, Publish) and isinstance(a.message, Plan)]
    return plan


def test_over_selection_selects_a_multiple_of_the_quorum_of_those_online() -> None:
    state = after(new_state(spec_of(quorum=10, over_selection=1.5)), Online(60)).state
    _, actions = step(state, Begin(START_MS))
    assert plan_in(actions).participation == Threshold(2**30)  # 15 of 60


@pytest.mark.parametrize("online", [0, 3, 15])
def test_over_selection_selects_everyone_where_few_are_online_or_nobody_knows(online: int) -> None:
    state = after(new_state(spec_of(quorum=10, over_selection=1.5)), Online(online)).state
    _, actions = step(state, Begin(START_MS))
    assert plan_in(actions).participation == Everyone()


def test_devices_that_come_or_go_change_the_next_round_and_not_the_open_one() -> None:
    state = after(new_state(spec_of(over_selection=2.0)), Online(8), Begin(START_MS)).state
    later, actions = step(state, Online(16))
    assert actions == ()
    _, actions = after(later, *(arrival(d, update_of()) for d in selected_devices(later, 2)))
    assert plan_in(actions).participation == Threshold(2**30)  # 4 of 16
    _, again = step(later, Begin(START_MS + 1))
    assert plan_in(again).participation == Threshold(2**31)  # the open round's: 4 of 8


def selected_devices(state: State, count: int) -> list[str]:
    names = (f"d{i}" for i in range(1000))
    part = Threshold(int(state.progress.part * 2**32))
    chosen = [name for name in names if takes_part(part, nonce(state.spec, state.progress.round), name)]
    return chosen[:count]


def test_selected_devices_that_never_answer_only_cost_the_deadline() -> None:
    state = after(new_state(spec_of(over_selection=2.0)), Online(8), Begin(START_MS)).state
    one = selected_devices(state, 1)[0]
    state = after(state, arrival(one, update_of()), Tick(state.progress.deadline_at_ms)).state
    assert state.progress.round == 1


def test_a_round_in_which_nobody_answers_selects_more_and_more_of_the_fleet() -> None:
    state = after(new_state(spec_of(over_selection=2.0)), Online(32), Begin(START_MS)).state
    parts = []
    for _ in range(4):
        state, actions = step(state, Tick(state.progress.deadline_at_ms))
        parts.append(plan_in(actions).participation)
        assert "0 of 1 updates at the deadline" in next(a.text for a in actions if isinstance(a, Note))
    assert parts == [Threshold(2**30), Threshold(2**31), Everyone(), Everyone()]
    assert state.progress.round == 0


def test_a_paused_run_takes_nothing_and_waits_for_nobody() -> None:
    state = after(in_round(1), Pause(START_MS, "night")).state
    for number in (0, 1):
        assert answer(state, "c", round_number=number) == (Refusal.RUN_CLOSED, "night")
    assert step(state, Tick(10**15)).actions == ()
    resumed = after(state, Resume(10**15)).state
    assert resumed.progress.deadline_at_ms == 10**15 + 60_000
    assert answer(resumed, "c", round_number=0)[0] is Refusal.ACCEPTED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"over_selection": 0.5}, "over_selection is 0.5; allowed: 0, or 1 to 1000 times the quorum"),
        ({"over_selection": 2.0, "participation": 0.5}, "leave devices and participation out"),
        ({"over_selection": 2.0, "devices": ("a", "b")}, "leave devices and participation out"),
        ({"max_staleness": 0}, "max_staleness is 0; allowed: 1 to 16"),
    ],
)
def test_policies_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(**settings)


def test_the_state_with_late_updates_is_rebuilt_exactly_from_the_store(tmp_path: Path) -> None:
    from aggregator.events import KeepProgress
    from aggregator.store import Store

    spec = spec_of(late="fold", max_staleness=2, rounds=9)
    with Store.open(tmp_path / "s", may_create=True) as store:
        store.create(spec, START_MS)
        state = store.state("night")
        for event in (
            Begin(START_MS),
            arrival("a", update_of(0)),
            arrival("b", update_of(0)),
            arrival("c", update_of(0)),
            arrival("a", update_of(1)),
            arrival("d", update_of(1, model_digest=OTHER_MODEL)),
            arrival("c", update_of(1)),
            arrival("e", update_of(0)),
            arrival("b", update_of(1)),
            arrival("a", update_of(2)),
            arrival("c", update_of(2)),
        ):
            state, actions = step(state, event)
            keeps = [a for a in actions if isinstance(a, (KeepUpdate, KeepVersion, KeepProgress, Note))]
            store.commit("night", keeps, START_MS)
            assert store.state("night") == state
    assert state.progress.round == 3
