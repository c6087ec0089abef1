"""Step rules: both against hand-computed steps, and the incremental form against the replay."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import steprule
from shared.errors import PeerError, UserError
from shared.messages import NormalisedStep, PlainStep
from shared.refusals import Refusal

finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


def normalised(**changed: float) -> NormalisedStep:
    values = {"step_rms": 0.5, "clip": 3.0, "decay": 0.75, "prior_mean_square": 0.0, "prior_count": 0}
    return NormalisedStep(**(values | changed))


def f32(values) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_plain_step_is_minus_lr_times_scalar():
    assert steprule.deltas(PlainStep(0.25), f32([4, -2, 0])).tolist() == [-1, 0.5, 0]


def test_plain_step_rounds_the_float64_product_once():
    lr, scalar = 3e-7, np.float32(12.345)
    assert steprule.deltas(PlainStep(lr), f32([scalar]))[0] == np.float32(-lr * float(scalar))


def test_first_normalised_step_has_the_full_length_whatever_the_scalar():
    for scalar in (1e-6, -7.0, 1e6):
        assert steprule.deltas(normalised(), f32([scalar])).tolist() == [-math.copysign(0.5, scalar)]


def test_three_normalised_steps_by_hand():
    # n = 1, 2, 3: beta = 0, 1/2, 2/3, so m is the plain average of the squares: 9, (9 + 16) / 2, (9 + 16 + 0) / 3.
    deltas = steprule.deltas(normalised(), f32([3, 4, 0]))
    assert deltas.tolist() == [-0.5, np.float32(-0.5 * 4 / math.sqrt(12.5)), 0]


def test_after_enough_steps_decay_takes_over():
    rule = normalised(decay=0.5, prior_mean_square=4.0, prior_count=10)
    state, delta = steprule.advance(rule, steprule.start(rule), 2.0)
    assert state == steprule.StepState(4.0, 11)
    assert delta == -0.5
    state, delta = steprule.advance(rule, state, 0.0)
    assert state == steprule.StepState(2.0, 12)
    assert delta == 0


def test_an_outlier_is_clipped():
    rule = normalised(prior_mean_square=1.0, prior_count=1000, decay=0.999, clip=2.0)
    assert steprule.deltas(rule, f32([100, -100])).tolist() == [-1.0, 1.0]


def test_scalars_that_are_all_zero_do_not_move_the_model():
    assert steprule.deltas(normalised(), f32([0, 0])).tolist() == [0, 0]


def test_tiny_scalars_do_not_underflow_the_mean_square():
    assert steprule.deltas(normalised(), f32([1e-40])).tolist() == [-0.5]


@given(
    st.lists(finite, max_size=30),
    st.sampled_from([PlainStep(1e-3), normalised(), normalised(prior_mean_square=2.5, prior_count=40, decay=0.99)]),
)
def test_replay_gives_the_bits_of_the_steps(values, rule):
    scalars = f32(values)
    state, stepwise = steprule.start(rule), []
    for scalar in scalars:
        state, delta = steprule.advance(rule, state, scalar)
        stepwise.append(delta)
    assert steprule.deltas(rule, scalars).tobytes() == f32(stepwise).tobytes()


@pytest.mark.parametrize("scalar", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("rule", (PlainStep(1.0), normalised()))
def test_a_scalar_that_is_not_finite_is_refused(rule, scalar):
    with pytest.raises(UserError, match=r"it must be finite\. Check the model's loss"):
        steprule.advance(rule, steprule.start(rule), scalar)
    with pytest.raises(PeerError, match="step 1: a scalar is") as refused:
        steprule.deltas(rule, f32([1, scalar]))
    assert refused.value.refusal is Refusal.NON_FINITE


def test_a_step_that_float32_cannot_hold_is_refused():
    rule = PlainStep(1e6)
    with pytest.raises(UserError, match="float32 cannot hold it"):
        steprule.advance(rule, steprule.start(rule), 3e38)
    with pytest.raises(PeerError, match="step 0"):
        steprule.deltas(rule, f32([3e38]))


@st.composite
def rounds(draw):
    """A step rule, and a round of up to 6 devices with up to 12 scalars each."""
    rule = draw(
        st.sampled_from(
            [
                PlainStep(1e-3),
                PlainStep(1.0),
                normalised(),
                normalised(decay=0.0),
                normalised(clip=0.5),
                normalised(prior_mean_square=2.5, prior_count=40, decay=0.99),
            ]
        )
    )
    values = st.one_of(finite, st.sampled_from([0.0, -0.0, 1e-40, 3e38, -3e38]))
    return rule, draw(st.lists(st.lists(values, max_size=12), min_size=1, max_size=6))


def padded(rows, filler=0.0):
    scalars = np.full((len(rows), max(len(row) for row in rows)), filler, dtype=np.float32)
    for place, row in zip(scalars, rows, strict=True):
        place[: len(row)] = row
    return scalars, np.array([len(row) for row in rows], dtype=np.int64)


@given(rounds(), st.sampled_from([0.0, 7.0, -3e38]))
def test_a_whole_round_at_once_has_the_bits_of_one_device_after_the_other(round_, filler):
    rule, rows = round_
    together = steprule.deltas_of_many(rule, *padded(rows, filler))
    for got, row in zip(together, rows, strict=True):
        assert got[: len(row)].tobytes() == steprule.deltas(rule, f32(row)).tobytes()
        assert got[len(row) :].tobytes() == bytes(4 * (len(got) - len(row)))


def test_a_long_round_at_once_has_the_bits_of_one_device_after_the_other():
    rng = np.random.default_rng(3)
    scalars = (rng.normal(size=(64, 200)) * 10.0 ** rng.integers(-20, 18, size=(64, 1))).astype(np.float32)
    lengths = rng.integers(1, 201, size=64)
    rule = normalised(prior_mean_square=1.5, prior_count=99, decay=0.99)
    together = steprule.deltas_of_many(rule, scalars, lengths)
    for got, row, length in zip(together, scalars, lengths, strict=True):
        assert got[:length].tobytes() == steprule.deltas(rule, row[:length]).tobytes()


@pytest.mark.parametrize("rule", (PlainStep(1.0), normalised()))
def test_one_bad_scalar_in_a_round_is_refused_by_its_step(rule):
    scalars, lengths = padded([[1.0, 2.0], [1.0, math.nan], [3.0]])
    with pytest.raises(PeerError, match="step 1: a scalar is nan") as refused:
        steprule.deltas_of_many(rule, scalars, lengths)
    assert refused.value.refusal is Refusal.NON_FINITE
    scalars[1] = 0.0
    scalars[2, 1] = math.nan  # behind the end of its row
    assert steprule.deltas_of_many(rule, scalars, lengths)[2, 1] == 0.0


def test_one_step_in_a_round_that_float32_cannot_hold_is_refused():
    with pytest.raises(PeerError, match="step 0: a step changes a coefficient"):
        steprule.deltas_of_many(PlainStep(1e6), *padded([[1.0], [3e38]]))


# What a first-order device may move.


def test_a_change_may_be_as_long_as_the_steps_of_a_round_and_no_longer():
    rule = NormalisedStep(0.5, 2.0, 0.9, 0.0, 0)
    assert steprule.longest_change(rule, 3) == 3.0
    steprule.check_length(np.array([0.0, 3.0], np.float32), rule, 3)
    steprule.check_length(np.array([1.75, -2.375], np.float32), rule, 3)
    with pytest.raises(PeerError, match=r"its norm is 3\.00167; allowed: 3") as error:
        steprule.check_length(np.array([3.0, 0.1], np.float32), rule, 3)
    assert error.value.refusal is Refusal.LARGE_CHANGE


def test_scalars_never_move_further_than_the_longest_change():
    rule = NormalisedStep(0.5, 2.0, 0.9, 1e-6, 3)
    moved = steprule.deltas(rule, np.array([1e6, 1.0, 1e6, 3.0], np.float32))
    assert np.abs(moved).sum() <= steprule.longest_change(rule, 4)


def test_the_plain_rule_bounds_nothing():
    assert steprule.longest_change(PlainStep(0.5), 3) == math.inf
