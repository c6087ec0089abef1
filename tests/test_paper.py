"""FedKSeed and FedKSeed-Pro (Qin et al., ICML 2024, arXiv 2312.06353), written out as the paper has them, against ours.

The paper's side walks the weights: seed by seed, in place, in plain numpy float32. Ours never does: it sums
coefficients and rebuilds the model from them. Both take the same z_k, which is what a seed means.

Where z is ±1, everything is exact: losses, learning rate, eps and weights of devices are chosen so that each weight
stays a multiple of 2^-10 below 16, which float32 holds. Then both sides must agree to the last bit, although they add
in different orders. Gaussian z are rounded on both sides; there the bound is that of the roundings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from aggregator.algorithms import Contribution, Contributions, FedKSeed, FedKSeedPro, State
from aggregator.next_version import NextVersion, next_version, same_version
from shared import directions, seeds, steprule
from shared.manifest import Manifest, Tensor
from shared.messages import PlainStep

SEEDS = 256
POOL_KEY = 2312_06353
LEARNING_RATE = 2.0**-6
EPS = np.float32(2.0**-7)
LOCAL_STEPS = 6
ROUNDS = 3
SAMPLES = {"alpha": 1, "beta": 3}  # weights 1/4 and 3/4
MANIFEST = Manifest((Tensor("hidden.weight", (40, 20)), Tensor("hidden.bias", (40,)), Tensor("out.weight", (3, 40))))
KINDS = ("hadamard", "rademacher", "gaussian")
Weights = dict[str, np.ndarray]


# The model and its data


def base_weights() -> Weights:
    generator = np.random.default_rng(0)
    grid = 2.0**-8
    return {
        tensor.name: np.round(generator.normal(0, 0.4, tensor.shape) / grid).astype(np.float32) * np.float32(grid)
        for tensor in MANIFEST.tensors
    }


def batch(device: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([len(device), step])
    inputs = generator.normal(0, 1, (4, 20)) + (1 if device == "alpha" else -1)
    return inputs, generator.integers(0, 3, 4)


def loss(weights: Weights, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy of a two-layer network, float64, rounded so that scalars are multiples of 2^-2."""
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    hidden = np.tanh(inputs @ wide["hidden.weight"].T + wide["hidden.bias"])
    logits = hidden @ wide["out.weight"].T
    normaliser = np.log(np.exp(logits).sum(axis=1))
    mean = float((normaliser - logits[np.arange(len(labels)), labels]).mean())
    return round(mean * 2**8) / 2**8


def z_of(kind: str, k: int) -> Weights:
    """z_k over all tensors: what the paper's code draws from a generator seeded with seed k."""
    return {
        tensor.name: directions.direction(kind, POOL_KEY, number, 0, tensor.elements, k, SEEDS).reshape(tensor.shape)
        for number, tensor in enumerate(MANIFEST.tensors)
    }


def nonce_of(round_number: int) -> bytes:
    return bytes([round_number]) * 16


# The paper's side, line by line


def paper_move(weights: Weights, amount: np.float32, z: Weights) -> None:
    """w <- w + amount * z, in place, in float32."""
    for name in weights:
        weights[name] += amount * z[name]


def paper_rebuild(kind: str, accumulated: np.ndarray) -> Weights:
    """Equation 6: w = w0 - lr * sum_k G[k] * z_k, one candidate seed after the other."""
    weights = base_weights()
    for k in range(SEEDS):
        if accumulated[k] != 0:
            paper_move(weights, np.float32(-LEARNING_RATE * accumulated[k]), z_of(kind, k))
    return weights


def paper_client(kind: str, weights: Weights, device: str, round_number: int) -> list[tuple[int, float]]:
    """Algorithm 1, the client: local steps in place; returns its (seed, scalar) pairs."""
    history = []
    for step, k in enumerate(seeds.draw(nonce_of(round_number), device, LOCAL_STEPS, SEEDS, None).tolist()):
        inputs, labels = batch(device, 100 * round_number + step)
        z = z_of(kind, k)
        paper_move(weights, EPS, z)
        above = loss(weights, inputs, labels)
        paper_move(weights, np.float32(-2) * EPS, z)
        below = loss(weights, inputs, labels)
        paper_move(weights, EPS, z)
        scalar = (above - below) / (2 * float(EPS))
        paper_move(weights, np.float32(-LEARNING_RATE * scalar), z)
        history.append((k, scalar))
    return history


@dataclass
class PaperRound:
    histories: dict[str, list[tuple[int, float]]]
    local_weights: dict[str, Weights]  # of each device after its last local step
    weights: Weights  # of the server after the round


def paper_run(kind: str) -> list[PaperRound]:
    """Algorithm 1, the server: G[k] += sum_i weight_i * (sum of the scalars device i sent for seed k)."""
    accumulated = np.zeros(SEEDS)
    rounds = []
    for round_number in range(ROUNDS):
        histories, local_weights = {}, {}
        for device in SAMPLES:
            local_weights[device] = paper_rebuild(kind, accumulated)
            histories[device] = paper_client(kind, local_weights[device], device, round_number)
        for device, history in histories.items():
            for k, scalar in history:
                accumulated[k] += SAMPLES[device] / sum(SAMPLES.values()) * scalar
        rounds.append(PaperRound(histories, local_weights, paper_rebuild(kind, accumulated)))
    return rounds


# Ours: coefficients and displacement


def our_weights(kind: str, coefficients: np.ndarray, probe: tuple[int, np.float32] | None = None) -> Weights:
    base = base_weights()
    rebuilt = {}
    for number, tensor in enumerate(MANIFEST.tensors):
        displaced = directions.displacement(kind, POOL_KEY, number, 0, tensor.elements, coefficients, probe)
        flat = directions.add_displacement(base[tensor.name].reshape(-1), "fp32", displaced)
        rebuilt[tensor.name] = flat.reshape(tensor.shape)
    return rebuilt


def our_client(kind: str, coefficients: np.ndarray, device: str, round_number: int) -> tuple[np.ndarray, np.ndarray]:
    """Local steps: the coefficients afterwards and the scalars."""
    local, scalars = coefficients.copy(), []
    rule = PlainStep(LEARNING_RATE)
    state = steprule.start(rule)
    for step, k in enumerate(seeds.draw(nonce_of(round_number), device, LOCAL_STEPS, SEEDS, None).tolist()):
        inputs, labels = batch(device, 100 * round_number + step)
        above = loss(our_weights(kind, local, (k, EPS)), inputs, labels)
        below = loss(our_weights(kind, local, (k, -EPS)), inputs, labels)
        scalars.append(np.float32((above - below) / (2 * float(EPS))))
        state, delta = steprule.advance(rule, state, scalars[-1])
        local[k] += delta
    return local, np.array(scalars, dtype=np.float32)


def version_0() -> NextVersion:
    return same_version(np.zeros(SEEDS, dtype=np.float32), np.zeros(SEEDS, dtype=np.float32))


def our_server(before: NextVersion, scalars_of: dict[str, np.ndarray], round_number: int) -> NextVersion:
    contributions = [
        Contribution(
            device,
            SAMPLES[device],
            seeds.draw(nonce_of(round_number), device, len(scalars), SEEDS, None),
            scalars,
            steprule.deltas(PlainStep(LEARNING_RATE), scalars),
        )
        for device, scalars in scalars_of.items()
    ]
    combined = FedKSeed(weighs_samples=True).apply(State(), Contributions.of(contributions), SEEDS)[1]
    return next_version(before.coefficients, before.carried, combined, "f32", None)


def scalars_of(history: list[tuple[int, float]]) -> np.ndarray:
    return np.array([scalar for _, scalar in history], dtype=np.float32)


def assert_same(ours: Weights, papers: Weights) -> None:
    for name in papers:
        np.testing.assert_array_equal(ours[name], papers[name], err_msg=name)


# They agree


@pytest.mark.parametrize("kind", ("hadamard", "rademacher"))
def test_a_whole_run_is_the_papers_to_the_bit(kind):
    """Ours takes its own steps: same scalars, same local weights, same model after every round."""
    version = version_0()
    for round_number, paper in enumerate(paper_run(kind)):
        scalars = {}
        for device in SAMPLES:
            local, scalars[device] = our_client(kind, version.coefficients, device, round_number)
            assert scalars[device].tolist() == [scalar for _, scalar in paper.histories[device]]
            assert np.any(scalars[device] != 0)
            assert_same(our_weights(kind, local), paper.local_weights[device])
        version = our_server(version, scalars, round_number)
        assert_same(our_weights(kind, version.coefficients), paper.weights)


def test_the_exactness_this_file_relies_on_holds():
    for kind in ("hadamard", "rademacher"):
        for paper in paper_run(kind):
            for value in paper.weights.values():
                scaled = value.astype(np.float64) * 2**10
                assert (scaled == np.round(scaled)).all()
                assert np.abs(value).max() < 16


def test_gaussian_weights_are_the_papers_within_the_roundings():
    """Same seeds and scalars. Per term one rounded product and one rounded sum on each side, plus the last sum."""
    version = version_0()
    for round_number, paper in enumerate(paper_run("gaussian")):
        scalars = {device: scalars_of(history) for device, history in paper.histories.items()}
        version = our_server(version, scalars, round_number)
        coefficients = version.coefficients
        ours = our_weights("gaussian", coefficients)
        nonzero = np.flatnonzero(coefficients)
        moved = {name: np.zeros(value.shape) for name, value in ours.items()}
        for k in nonzero:
            for name, z in z_of("gaussian", int(k)).items():
                moved[name] += np.abs(coefficients[k] * z)
        for name, base in base_weights().items():
            largest = np.abs(base) + moved[name]  # no partial sum on either side is larger
            bound = (2 * 2 * len(nonzero) + 1) * 2.0**-24 * largest
            assert (np.abs(ours[name].astype(np.float64) - paper.weights[name]) <= bound).all()
            assert np.abs(ours[name] - base).max() > 1000 * bound.max()  # the model moved by far more than that


@pytest.mark.parametrize("kind", KINDS)
def test_from_weights_of_zero_the_walk_is_the_accumulation_to_the_bit(kind):
    """Without base weights the paper's walk adds the same float32 terms in the same order: no tolerance."""
    generator = np.random.default_rng(5)
    accumulated = np.where(generator.random(SEEDS) < 0.1, np.round(generator.normal(0, 30, SEEDS)), 0)
    coefficients = (-LEARNING_RATE * accumulated).astype(np.float32)
    for number, tensor in enumerate(MANIFEST.tensors):
        weights = {"": np.zeros(tensor.elements, dtype=np.float32)}
        for k in np.flatnonzero(accumulated):
            z = directions.direction(kind, POOL_KEY, number, 0, tensor.elements, int(k), SEEDS)
            paper_move(weights, np.float32(-LEARNING_RATE * accumulated[k]), {"": z})
        ours = directions.displacement(kind, POOL_KEY, number, 0, tensor.elements, coefficients)
        np.testing.assert_array_equal(ours, weights[""])


# FedKSeed-Pro


def paper_probabilities(history: list[list[float]], clip: float) -> np.ndarray:
    """Section 4.3 as the authors' code has it: softmax of the min-max scaled mean |clipped scalar| of each seed."""
    means = np.array([np.mean([min(abs(scalar), clip) for scalar in of_seed]) for of_seed in history])
    scaled = (means - means.min()) / (means.max() - means.min())
    return np.exp(scaled) / np.exp(scaled).sum()


def contribution(device: str, pairs: list[tuple[int, float]]) -> Contribution:
    scalars = np.array([scalar for _, scalar in pairs], dtype=np.float32)
    return Contribution(device, 1, np.array([k for k, _ in pairs]), scalars, np.zeros(len(pairs), dtype=np.float32))


def our_probabilities(levels: bytes) -> np.ndarray:
    weights = seeds.level_weights()[np.frombuffer(levels, dtype=np.uint8)]
    return weights / weights.sum()


def test_pro_probabilities_by_hand():
    # Means with the initial observation of 0: (0+2+4)/3, 0/1, (0+1)/2, (0+2)/2 = 2, 0, 1/2, 1; scaled 1, 0, 1/4, 1/2.
    pro = FedKSeedPro(FedKSeed())
    updates = [contribution("alpha", [(0, 2.0), (3, -2.0)]), contribution("beta", [(0, -4.0), (2, 1.0)])]
    state, _, _ = pro.apply(pro.init(4), Contributions.of(updates), 4)
    levels = pro.levels(state)
    assert levels is not None
    assert list(levels) == [255, 0, 64, 128]
    # e, 1, e^(1/4), e^(1/2) over their sum, 6.651028
    by_hand = np.array([0.408701, 0.150353, 0.193057, 0.247890])
    papers = paper_probabilities([[0, 2, -4], [0], [0, 1], [0, -2]], clip=1000)
    np.testing.assert_allclose(papers, by_hand, atol=1e-6)
    # A level is the scaled mean within 1/510, above and below the fraction bar.
    np.testing.assert_allclose(our_probabilities(levels), papers, rtol=math.expm1(2 / 510) + 1e-5)


def test_pro_probabilities_follow_the_papers_over_many_steps():
    generator = np.random.default_rng(3)
    pairs = [(int(generator.integers(SEEDS)), float(np.float32(generator.normal(0, 600)))) for _ in range(2000)]
    pro = FedKSeedPro(FedKSeed())
    state = pro.init(SEEDS)
    for device in range(4):
        one = Contributions.of([contribution(f"d{device}", pairs[device::4])])
        state, _, _ = pro.apply(state, one, SEEDS)
    levels = pro.levels(state)
    assert levels is not None
    history: list[list[float]] = [[0.0] for _ in range(SEEDS)]
    for k, scalar in pairs:
        history[k].append(scalar)
    papers = paper_probabilities(history, clip=1000)
    np.testing.assert_allclose(our_probabilities(levels), papers, rtol=math.expm1(2 / 510) + 1e-5)
    assert papers.max() / papers.min() > 2


def test_pro_draws_come_with_the_papers_frequencies():
    generator = np.random.default_rng(4)
    significance = generator.gamma(2.0, 1.0, SEEDS)
    papers = paper_probabilities([[value] for value in significance], clip=1000)
    steps = 400_000
    draws = seeds.draw(bytes(16), "alpha", steps, SEEDS, seeds.significance_levels(significance))
    counts = np.bincount(draws, minlength=SEEDS)
    expected = papers * steps
    tolerance = 5 * np.sqrt(expected) + expected * math.expm1(2 / 510)  # five standard deviations, and the levels
    assert (np.abs(counts - expected) <= tolerance).all()
