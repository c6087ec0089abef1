"""What a round adds up to: the next version, its change, its report, and the end of the run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.events import Begin, KeepProgress, KeepUpdate, KeepVersion, Pause, Publish, SendReceipt
from aggregator.rounds import step
from aggregator.spec import nonce
from aggregator.state import coefficients_of, plan_of
from shared.messages import NormalisedStep, NumberFormat, Plan, Snapshot
from shared.seeds import draw
from shared.steprule import deltas
from shared.wire import scalars_from_bytes, scalars_to_bytes
from tests.runs import START_MS, after, arrival, closed_round, notes, opened, published, report_in, update_of


def test_the_update_that_makes_the_quorum_closes_the_round() -> None:
    state, actions = closed_round()
    kinds = [type(a.message) if isinstance(a, Publish) else type(a) for a in actions]
    assert kinds == [KeepUpdate, SendReceipt, KeepUpdate, SendReceipt, KeepVersion, KeepProgress, Snapshot, Plan]
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


def test_a_round_that_promises_too_much_is_shortened_as_a_whole() -> None:
    def moved(limit: float) -> np.ndarray:
        state = opened(step="normalised", step_rms=0.5, server_scale="sum", promise_limit=limit)
        state = after(state, arrival("a", update_of(held_out_loss=2.0)), arrival("b", update_of())).state
        return coefficients_of(state.coefficients).astype(np.float64)

    rms = np.sqrt((1 + 4 + 9) / 3)
    promised = 2 * 0.5 * 3 * rms  # devices, step, steps of each
    np.testing.assert_allclose(moved(1.0), moved(0.0) * 2.5 / promised, rtol=1e-6)  # the mean held-out loss
    np.testing.assert_array_equal(moved(promised), moved(0.0))


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


def test_a_combination_that_overflows_changes_nothing_and_says_so() -> None:
    first = opened(lr=1.0, server_scale="sum", common_seeds=True)
    huge = update_of(scalars=scalars_to_bytes([3e38], "f32"))
    state, actions = after(first, arrival("a", huge), arrival("b", huge))
    assert state.progress.round == 1
    assert state.coefficients == first.coefficients
    assert report_in(actions).outcome == "not finite"
    assert "float32 holds up to" in notes(actions)
