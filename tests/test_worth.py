"""Rounds with first-order and forward-only devices, on a few coefficients and numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import second_worth
from hypothesis import given
from hypothesis import strategies as st

from aggregator.algorithms import Contribution, Contributions, FedKSeed, State, pack, unpack
from aggregator.worth import MOST_NOISE, Kind, Worth, learn, shares

NONE = np.zeros(0, np.float32)


def kind(*changes: list[float], weights: list[float] | None = None) -> Kind:
    """Devices of one kind with these changes."""
    found = Kind(np.zeros(len(changes[0]) if changes else 2))
    for weight, change in zip(weights or [1 / len(changes)] * len(changes) if changes else [], changes, strict=True):
        found.add(weight, np.array(change), has_power=True)
    return found


def scalars(device: str, *moves: float) -> Contribution:
    """A forward-only device that moved the first coefficients so."""
    values = np.array(moves, np.float32)
    return Contribution(device, 1, np.arange(len(moves)), -values, values)


def change(device: str, *values: float) -> Contribution:
    """A first-order device's change of the first coefficients."""
    return Contribution(device, 1, np.arange(len(values)), NONE, np.array(values, np.float32))


def test_devices_that_agree_have_no_noise_and_opposite_ones_nothing_else() -> None:
    assert learn(Worth(), kind(), kind([3.0, 4.0], [3.0, 4.0])).noise == 0.0
    assert learn(Worth(), kind(), kind([3.0, 0.0], [-3.0, 0.0])).noise == MOST_NOISE


def test_the_noise_of_two_orthogonal_changes_is_all_they_have() -> None:
    # Power 1; the mean's squared length is 1/2, which is what two pure noises give.
    assert learn(Worth(), kind(), kind([1.0, 0.0], [0.0, 1.0])).noise == MOST_NOISE
    # (1, 0) and (1, 1): power 3/2, of the mean 5/4, noise 1/4 / (1 - 1/2) = 1/2 of 3/2.
    assert learn(Worth(), kind(), kind([1.0, 0.0], [1.0, 1.0])).noise == pytest.approx(1 / 3)


def test_one_first_order_device_teaches_nothing_of_its_noise() -> None:
    assert learn(Worth(), kind([1.0, 0.0]), kind([1.0, 0.0])).noise_rounds == 0


def test_the_agreement_is_the_cosine_of_both_means() -> None:
    assert learn(Worth(), kind([2.0, 0.0]), kind([3.0, 4.0])).agreement == pytest.approx(0.6)
    assert learn(Worth(), kind([0.0, 0.0]), kind([3.0, 4.0])) == Worth()


def test_what_is_remembered_is_a_mean_over_rounds_that_forgets_slowly() -> None:
    worth = learn(Worth(), kind(), kind([1.0, 0.0], [1.0, 0.0]))
    worth = learn(worth, kind(), kind([1.0, 0.0], [-1.0, 0.0]))
    assert (worth.noise, worth.noise_rounds) == (MOST_NOISE / 2, 2)
    long = learn(Worth(0.5, 100, 0.0, 0), kind(), kind([1.0, 0.0], [1.0, 0.0]))
    assert long.noise == 0.45


def test_the_shares_are_inverse_variances() -> None:
    # One first-order device, half of it noise: phi 1/2. Agreement 1/2: the scaled Z's variance is 1/2 * (2 - 1) = 1/2.
    of_forward, of_first = shares(Worth(0.5, 1, 0.5, 1), kind([2.0, 0.0]), kind([3.0, 4.0]))
    assert of_first == 0.5
    assert of_forward == 0.5 * (0.5 / 0.5) * 5.0 / 2.0  # as long as F's signal along it


def test_a_forward_half_that_hardly_agrees_hardly_counts_and_an_opposed_one_not_at_all() -> None:
    of_forward, of_first = shares(Worth(0.5, 1, 0.01, 1), kind([1.0, 0.0]), kind([1.0, 0.0]))
    assert 0.999 < of_first < 1.0
    assert 0.0 < of_forward < 0.03
    assert shares(Worth(0.5, 1, -0.2, 1), kind([1.0, 0.0]), kind([1.0, 0.0])) == (0.0, 1.0)


def test_first_order_devices_without_noise_need_no_others() -> None:
    assert shares(Worth(0.0, 1, 0.5, 1), kind([1.0, 0.0]), kind([1.0, 0.0])) == (0.0, 1.0)


def test_a_half_that_moves_nothing_leaves_the_round_to_the_other() -> None:
    assert shares(Worth(), kind([1.0, 0.0]), kind([0.0, 0.0])) == (1.0, 0.0)
    assert shares(Worth(), kind([0.0, 0.0]), kind([1.0, 0.0])) == (0.0, 1.0)


def test_more_first_order_devices_leave_less_to_the_others() -> None:
    forward, worth = kind([1.0, 0.0]), Worth(0.5, 1, 0.3, 1)
    parts = [shares(worth, forward, kind(*[[3.0, 4.0]] * n))[1] for n in (1, 2, 4, 16)]
    assert parts == sorted(parts)
    assert parts[0] < parts[-1] < 1.0


def test_a_round_of_first_order_devices_alone_is_their_average_whatever_the_scale() -> None:
    both = Contributions.of([change("a", 1.0, 2.0), change("b", 3.0, 0.0)])
    _, combined, steps = FedKSeed(server_scale="sum").apply(State(), both, 2)
    assert combined.tolist() == [2.0, 1.0]
    assert steps == 0


def test_a_mixed_round_does_not_depend_on_the_scale_nor_on_who_comes_first() -> None:
    fleet = [change("b", 1.0, 2.0), scalars("a", 0.5, 0.25), scalars("c", 0.25, 0.5), change("d", 2.0, 1.5)]
    made = [
        FedKSeed(server_scale=scale).apply(State(), Contributions.of(order), 2)[1].tolist()
        for scale in ("mean", "sqrt", "sum")
        for order in (fleet, fleet[::-1])
    ]
    assert made == [made[0]] * 6


def test_what_is_remembered_survives_the_store() -> None:
    fleet = Contributions.of([change("b", 1.0, 2.0), scalars("a", 0.5, 0.25), change("d", 2.0, 1.5)])
    state, _, _ = FedKSeed().apply(State(), fleet, 2)
    assert state.worth.noise_rounds == state.worth.agreement_rounds == 1
    assert unpack(pack(state), 2) == state


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_both_halves_together_are_nearer_to_the_truth_than_either(size: float) -> None:
    """A known signal in 256 directions; 2 noisy first-order devices, 8 that see 40 directions each, badly."""
    rng = np.random.default_rng(3)
    signal = rng.normal(size=256)
    state, errors = State(), np.zeros(3)
    for _ in range(40):
        first = [change(f"f{n}", *(signal + rng.normal(size=256) * 1.5)) for n in range(2)]
        forward = []
        for n in range(8):
            seeds = rng.permutation(256)[:40]
            moves = (size * (signal[seeds] + rng.normal(size=40))).astype(np.float32)
            forward.append(Contribution(f"z{n}", 1, seeds, -moves, moves))
        state, combined, _ = FedKSeed().apply(state, Contributions.of([*first, *forward]), 256)
        alone = FedKSeed().apply(State(), Contributions.of(first), 256)[1]
        rest = FedKSeed().apply(State(), Contributions.of(forward), 256)[1]
        errors += [_error(made, signal) for made in (combined, alone, rest)]
    assert errors[0] < 0.9 * errors[1]
    assert errors[0] < 0.9 * errors[2]


def _error(made: np.ndarray, signal: np.ndarray) -> float:
    """Squared sine of the angle between both: what is wrong with the direction, whatever the length."""
    return 1 - float(made @ signal) ** 2 / float(made @ made) / float(signal @ signal)


values = st.sampled_from([0.0, 1.0, -2.5, 7.25, 1 / 3, 1e-20, 3e30])
fleets = st.lists(st.tuples(st.booleans(), st.integers(0, 3), values, values), min_size=1, max_size=6)


@given(st.lists(fleets, min_size=1, max_size=4), st.sampled_from(["mean", "sqrt", "sum"]))
def test_the_second_implementation_comes_to_the_same_bits(rounds: list, scale: str) -> None:
    state, known = State(), {"noise": 0.5, "noise_rounds": 0, "agreement": 0.0, "agreement_rounds": 0}
    for fleet in rounds:
        made, weighed = [], {True: [], False: []}
        for number, (is_first, late, *moved) in enumerate(fleet):
            made.append((change if is_first else scalars)(f"d{number}", *moved))
            made[-1] = Contribution(**{**vars(made[-1]), "staleness": late})
            of_kind = sum(one[0] == is_first for one in fleet)
            weighed[is_first].append((1 / of_kind / math.sqrt(1 + late), [float(np.float32(one)) for one in moved]))
        state, combined, _ = FedKSeed(False, scale).apply(state, Contributions.of(made), 2)  # type: ignore[arg-type]
        expected = second_worth.combination(2, known, weighed[False], weighed[True], scale)
        assert combined.tolist() == expected
        worth = state.worth
        assert known == {name: getattr(worth, name) for name in known}
