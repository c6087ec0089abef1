"""Combinations and the step schedule, on three coefficients and numbers that can be checked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from aggregator.algorithms import (
    Algorithm,
    Contribution,
    Contributions,
    FedKSeed,
    FedKSeedPro,
    Significance,
    State,
    choose,
    pack,
    unpack,
)
from aggregator.config import RunConfig, ServerScale
from aggregator.schedule import Fleet, Magnitude, after_round, horizon, start, step_rule
from shared.errors import UserError
from shared.messages import NormalisedStep, PlainStep
from shared.seeds import level_weights


def contribution(device: str, samples: int, seeds: list[int], scalars: list[float], lr: float = 1.0) -> Contribution:
    values = np.array(scalars, np.float32)
    return Contribution(device, samples, np.array(seeds), values, (-lr * values).astype(np.float32))


def combined(algorithm: Algorithm, *contributions: Contribution) -> list[float]:
    """What the algorithm adds to three coefficients."""
    return algorithm.apply(algorithm.init(3), Contributions.of(contributions), 3)[1].tolist()


A = contribution("a", 3, [0, 1], [1.0, 2.0])  # changes by (-1, -2, 0)
B = contribution("b", 1, [1, 1], [4.0, 4.0])  # changes by (0, -8, 0): a seed drawn twice counts twice


def test_changes_are_weighted_by_samples() -> None:
    assert combined(FedKSeed(), A, B) == [-0.75, -3.5, 0.0]  # 3/4 of A's, 1/4 of B's
    assert FedKSeed().apply(State(), Contributions.of([A, B]), 3)[2] == 4  # steps


def test_changes_weigh_the_same_where_the_run_says_equal() -> None:
    assert combined(FedKSeed(weighs_samples=False), A, B) == [-0.5, -5.0, 0.0]


@pytest.mark.parametrize(("scale", "wanted"), [("mean", -5.0), ("sqrt", -5.0 * math.sqrt(2)), ("sum", -10.0)])
def test_the_server_scale_goes_from_the_average_to_the_sum(scale: ServerScale, wanted: float) -> None:
    assert combined(FedKSeed(weighs_samples=False, server_scale=scale), A, B)[1] == wanted


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    rng = np.random.default_rng(0)
    fleet = [
        contribution(f"d{i}", int(rng.integers(1, 99)), rng.integers(0, 3, 7).tolist(), rng.normal(size=7).tolist())
        for i in range(20)
    ]
    forward = combined(FedKSeed(), *fleet)
    assert all(combined(FedKSeed(), *rng.permutation(fleet).tolist()) == forward for _ in range(5))


def test_devices_are_summed_in_the_order_of_their_ids() -> None:
    # (2^60 + 1) - 2^60 is 0 in float64; any other order gives 1 (times the weight, 1/4).
    a, b, c, d = (contribution(n, 1, [0], [-g]) for n, g in (("a", 2.0**60), ("b", 1.0), ("c", -(2.0**60)), ("d", 0.0)))
    for order in ([a, b, c, d], [a, c, b, d], [d, c, a, b]):
        assert combined(FedKSeed(), *order)[0] == 0.0


def test_the_sum_is_formed_in_float64() -> None:
    tiny = [contribution(f"d{i}", 1, [0], [-g]) for i, g in enumerate((1.0, 2.0**-40, 2.0**-40))]
    assert combined(FedKSeed(weighs_samples=False, server_scale="sum"), *tiny)[0] == pytest.approx(
        1 + 2.0**-39, abs=1e-15
    )


def test_a_late_update_counts_less_and_the_others_no_more() -> None:
    late = replace(B, staleness=3)  # 1 / sqrt(1 + 3)
    assert combined(FedKSeed(), A, late) == [-0.75, -2.5, 0.0]
    assert combined(FedKSeed(), late) == [0.0, -4.0, 0.0]


def test_an_older_update_of_a_device_is_summed_before_its_newer_one() -> None:
    new, old = contribution("a", 1, [0], [1.0]), replace(contribution("a", 1, [0], [2.0]), staleness=1)
    assert [one.staleness for one in Contributions.of([new, B, old]).read()] == [1, 0, 0]


def test_an_empty_round_cannot_be_combined() -> None:
    with pytest.raises(ValueError, match="without contributions"):
        combined(FedKSeed())


def test_pro_remembers_the_mean_magnitude_per_seed_as_the_authors_do() -> None:
    pro = FedKSeedPro(FedKSeed())
    state, after, _ = pro.apply(pro.init(3), Contributions.of([A, B]), 3)
    assert after.tolist() == combined(FedKSeed(), A, B)
    # One observation of 0 per seed at the start: seed 0 has (0, 1), seed 1 (0, 2, 4, 4), seed 2 (0).
    assert state.significance == Significance(np.array([1.0, 10.0, 0.0]), np.array([2, 4, 1]))
    # Means 0.5, 2.5, 0 -> min-max 0.2, 1, 0 -> levels of 255.
    assert pro.levels(state) == bytes([51, 255, 0])


def test_pro_probabilities_are_the_softmax_of_the_scaled_means() -> None:
    weights = level_weights()[[51, 255, 0]]
    by_hand = np.exp([0.2, 1.0, 0.0]) / np.exp([0.2, 1.0, 0.0]).sum()
    assert np.allclose(weights / weights.sum(), by_hand, atol=1e-5)


def test_pro_starts_uniform_and_an_unseen_seed_is_the_least_likely() -> None:
    pro = FedKSeedPro(FedKSeed())
    assert pro.levels(pro.init(3)) is None
    state, _, _ = pro.apply(pro.init(3), Contributions.of([A]), 3)
    levels = pro.levels(state)
    assert levels is not None
    assert levels[2] == min(levels) == 0


def test_pro_clips_what_it_remembers() -> None:
    pro = FedKSeedPro(FedKSeed())
    state, _, _ = pro.apply(pro.init(3), Contributions.of([contribution("a", 1, [0], [-5000.0])]), 3)
    assert state.significance is not None
    assert state.significance.sums.tolist() == [1000.0, 0.0, 0.0]


def test_pro_does_not_touch_the_state_it_was_given() -> None:
    pro = FedKSeedPro(FedKSeed())
    first = pro.init(3)
    pro.apply(first, Contributions.of([A]), 3)
    assert first == pro.init(3)


@pytest.mark.parametrize("name", ["fedkseed", "fedkseed-pro"])
def test_an_algorithm_state_survives_the_store(name: str) -> None:
    algorithm = choose(name, weighs_samples=True, server_scale="mean")
    state, _, _ = algorithm.apply(algorithm.init(3), Contributions.of([A, B]), 3)
    assert unpack(pack(state), 3) == state


def test_a_cut_algorithm_state_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes of algorithm state; allowed: 32 or 80"):
        unpack(bytes(15), 3)


# --- the step rule from round to round

NORMALISED = RunConfig(step="normalised", step_rms=0.5, decay=0.75, clip=2.0, kept_promise=0.25)


def fleet_after(config: RunConfig, fleet: Fleet, magnitudes: list[Magnitude], loss: float | None) -> Fleet:
    return after_round(config, fleet, magnitudes, loss)[1]


def length_after(
    config: RunConfig, fleet: Fleet, magnitudes: list[Magnitude], loss: float | None, *, has_first_order: bool = False
) -> float:
    return after_round(config, fleet, magnitudes, loss, has_first_order=has_first_order)[0]


def squares(*values: float) -> Magnitude:
    return Magnitude.of(np.sqrt(np.array(values)).astype(np.float32))


def test_the_plain_rule_never_changes() -> None:
    config = RunConfig(step="plain", lr=0.25)
    fleet = fleet_after(config, start(config), [squares(4.0)], 9.0)
    assert step_rule(config, fleet) == PlainStep(lr=0.25)
    assert fleet == start(config)


def test_the_first_plan_has_no_prior() -> None:
    assert step_rule(NORMALISED, start(NORMALISED)) == NormalisedStep(0.5, 2.0, 0.75, 0.0, 0)


def test_the_fleets_mean_square_is_the_median_of_the_devices() -> None:
    fleet = fleet_after(NORMALISED, start(NORMALISED), [squares(4), squares(1e30), squares(9)], None)
    assert fleet.mean_square == 9.0
    even = fleet_after(NORMALISED, start(NORMALISED), [squares(4), squares(16)], None)
    assert even.mean_square == 10.0


def test_old_and_new_mean_square_mix_by_the_steps_behind_them() -> None:
    assert horizon(NORMALISED) == 4
    fleet = Fleet(step_rms=0.5, mean_square=1.0, count=2)
    after = fleet_after(NORMALISED, fleet, [squares(4, 4)], None)
    assert (after.mean_square, after.count) == (2.5, 4)
    assert fleet_after(NORMALISED, after, [squares(0, 0, 0, 0)], None).mean_square == 1.25


def test_the_step_follows_the_part_of_its_promise_that_the_loss_keeps() -> None:
    steps = []
    fleet = start(NORMALISED)
    # scalars of RMS 1, one step per round: each round promises step_rms. Kept: 0.25 (stay), 1 (grow by 1.2 at most),
    # 0.0625 (shrink by 1.2 at most), a rise (half).
    for loss in (3.0, 2.875, 2.375, 2.34375, 5.0):
        fleet = fleet_after(NORMALISED, fleet, [squares(1)], loss)
        steps.append(fleet.step_rms)
    assert steps == [0.5, 0.5, 0.6, 0.5, 0.25]


def test_promises_add_up_until_a_loss_is_measured() -> None:
    fleet = fleet_after(NORMALISED, start(NORMALISED), [squares(1)], 3.0)
    fleet = fleet_after(NORMALISED, fleet, [squares(1)], None)
    assert fleet.promised == 1.0
    assert fleet_after(NORMALISED, fleet, [squares(1)], 2.75).step_rms == 0.5  # a quarter of both


def test_the_sum_of_devices_promises_as_much_as_they_do_together() -> None:
    config = RunConfig(step="normalised", step_rms=0.5, decay=0.75, server_scale="sum", kept_promise=0.25)
    fleet = fleet_after(config, start(config), [squares(1, 1), squares(1, 1)], 3.0)
    assert fleet.promised == 2.0


def test_a_promise_of_zero_leaves_the_step_alone() -> None:
    config = RunConfig(step="normalised", step_rms=0.5, kept_promise=0.0)
    fleet = Fleet(step_rms=0.5, reference_loss=1.0, promised=1.0)
    assert fleet_after(config, fleet, [squares(1)], 9.0).step_rms == 0.5


def test_the_step_never_leaves_its_range() -> None:
    fleet = Fleet(step_rms=0.5 / 64, reference_loss=1.0, promised=1.0)
    assert fleet_after(NORMALISED, fleet, [squares(1)], 9.0).step_rms == 0.5 / 64
    fleet = Fleet(step_rms=0.5 * 2, reference_loss=9.0, promised=1.0)
    assert fleet_after(NORMALISED, fleet, [squares(1)], 1.0).step_rms == 0.5 * 2


def test_a_round_without_losses_keeps_the_step() -> None:
    fleet = Fleet(step_rms=0.5, reference_loss=1.0)
    after = fleet_after(NORMALISED, fleet, [squares(1)], None)
    assert (after.step_rms, after.reference_loss) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 1000}, "seeds is 1000; allowed are the powers of two from 256 to 65536"),
        ({"eps": float("nan")}, "eps is nan; allowed"),
        ({"lr": 0.0}, "lr is 0.0; allowed"),
        ({"decay": 1.0}, "decay is 1.0; allowed: 0 to 0.9999"),
        ({"local_steps": 16385}, "local_steps is 16385; allowed: 1 to 16384"),
        ({"quorum": 1, "min_updates": 2}, "quorum is 1, min_updates 2"),
        ({"devices": ("a", "b"), "quorum": 3}, "quorum is 3, but devices names only 2"),
        ({"devices": ("a", "a")}, "devices names 2; allowed: up to 1024, each once"),
        ({"devices": ("a", "b"), "participation": 0.5}, "choose devices by name or by part"),
        ({"devices": ("A+", "b")}, "a name in devices is 'A[+]'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig(**settings)  # type: ignore[arg-type]


def test_a_round_is_shortened_to_promise_no_more_than_the_limit_times_the_loss() -> None:
    config = RunConfig(step_rms=0.1, server_scale="sum", decay=0.9, promise_limit=1.0)
    fleet = start(config)
    two = [Magnitude.of(np.array([4.0, 4.0], np.float32)), Magnitude.of(np.array([-4.0, 4.0], np.float32))]
    promised = 2 * 2 * 0.1 * 4.0  # devices, steps of each, step, scalars' RMS
    assert length_after(config, fleet, two, 0.4) == pytest.approx(0.4 / promised)
    assert length_after(config, fleet, two, 2.0) == 1.0  # short enough already
    assert length_after(config, fleet, two, 0.4, has_first_order=True) == 1.0  # those promise nothing
    assert fleet_after(config, fleet, two, 0.4).promised == pytest.approx(0.4)
    remembered = Fleet(step_rms=0.1, reference_loss=0.8)
    assert length_after(config, remembered, two, None) == pytest.approx(0.8 / promised)  # the last loss that is known
    looser = RunConfig(step_rms=0.1, server_scale="sum", decay=0.9, promise_limit=2.0)
    assert length_after(looser, fleet, two, 0.4) == pytest.approx(0.8 / promised)


@pytest.mark.parametrize("loss", [None, 0.0, -1.0])
def test_without_a_loss_above_zero_no_round_is_shortened(loss: float | None) -> None:
    config = RunConfig(step_rms=1.0)
    assert length_after(config, start(config), [Magnitude(1e6, 1)], loss) == 1.0


def test_a_rate_that_a_person_chose_is_not_shortened() -> None:
    config = RunConfig(step="plain", lr=1.0)
    assert length_after(config, start(config), [Magnitude(1e6, 1)], 1.0) == 1.0
    unbounded = RunConfig(step_rms=1.0, promise_limit=0.0)
    assert length_after(unbounded, start(unbounded), [Magnitude(1e6, 1)], 1.0) == 1.0
