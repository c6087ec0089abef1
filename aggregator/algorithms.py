"""What a round's updates add to the coefficients: FedKSeed and FedKSeed-Pro (Qin et al., ICML 2024).

An algorithm is a frozen record with `init` and `apply(state, contributions, seeds)`. Everything is float64
and elementwise, devices in the order of their ids, so that a replay gives the same bits on every machine: no BLAS,
no pairwise sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.seeds import significance_levels


@dataclass(frozen=True, eq=False)
class Contribution:
    """One device's accepted update, replayed: n steps, or a change of n coefficients."""

    device: str
    samples: int  # >= 1
    seeds: NDArray[np.int64]  # (n,), drawn in step order, or those of the change
    scalars: NDArray[np.float32]  # (n,), or empty: a first-order device's change
    deltas: NDArray[np.float32]  # (n,), what each step, or the change, adds to its seed's coefficient
    staleness: int = 0  # rounds between the one it was made for and the one it counts in

    @property
    def is_first_order(self) -> bool:
        """True for a change in place of scalars."""
        return not self.scalars.size


@dataclass(frozen=True, eq=False)
class Contributions:
    """A round's contributions in device order, made while they are read: a large round does not fit in memory."""

    devices: int
    samples: int
    read: Callable[[], Iterator[Contribution]]

    @classmethod
    def of(cls, contributions: Sequence[Contribution]) -> Contributions:
        """Those of a small round, sorted: by device, an older update of a device before a newer one."""
        ordered = sorted(contributions, key=lambda contribution: (contribution.device, -contribution.staleness))
        return cls(len(ordered), sum(contribution.samples for contribution in ordered), lambda: iter(ordered))


@dataclass(frozen=True, eq=False)
class Significance:
    """FedKSeed-Pro's memory: |scalar| of every step so far, per seed."""

    sums: NDArray[np.float64]  # (K,)
    counts: NDArray[np.int64]  # (K,)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Significance)
            and np.array_equal(self.sums, other.sums)
            and np.array_equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]


State = Significance | None
Applied = tuple[State, NDArray[np.float64], int]  # the next state, what is added to the K coefficients, local steps


class Algorithm(Protocol):
    """What the round logic needs of an algorithm."""

    def init(self, seeds: int) -> State:
        """The state before the first round of a run with K = `seeds`."""

    def apply(self, state: State, contributions: Contributions, seeds: int) -> Applied:
        """See `Applied`; `seeds` is K. Raises ValueError."""

    def levels(self, state: State) -> bytes | None:
        """Significance levels for the next plan: K bytes, or None for uniform seeds."""


@dataclass(frozen=True)
class FedKSeed:
    """Averaging of the devices' changes (FedKSeed, algorithm 1; with FedOpt's server rate).

    What is added is server_lr * sum_i w_i d_i, d_i the sum of device i's deltas per seed, w_i its samples over
    the samples of all, or 1 / n where not `weighs_samples`, over sqrt(1 + staleness).
    `server_lr` 1 is the average; up to the number of devices, which is the sum, makes sense, because devices draw
    nearly disjoint seeds.
    """

    weighs_samples: bool = True
    server_lr: float = 1.0

    def init(self, seeds: int) -> State:
        """FedKSeed remembers nothing."""
        return None

    def apply(self, state: State, contributions: Contributions, seeds: int) -> Applied:
        """See the class. Raises ValueError without contributions."""
        with np.errstate(over="ignore", invalid="ignore"):  # `next_version` looks, and has a message
            combined, steps = _weighted_change(contributions, seeds, self.weighs_samples)
            return state, self.server_lr * combined, steps

    def levels(self, state: State) -> bytes | None:
        """Uniform seeds."""
        return None


@dataclass(frozen=True)
class FedKSeedPro:
    """FedKSeed with seeds drawn by significance: softmax of the min-max scaled mean |scalar| (section 4.3).

    As the authors' code does: a scalar is clipped at `scalar_clip`, and every seed starts with one observation of
    `initial_scalar`, so an unseen seed has the mean 0 and is the least likely one (but never ruled out: the most
    likely seed is e times as likely).
    """

    combination: FedKSeed
    scalar_clip: float = 1000.0
    initial_scalar: float = 0.0

    def init(self, seeds: int) -> State:
        """One observation of `initial_scalar` per seed."""
        return Significance(np.full(seeds, abs(self.initial_scalar)), np.ones(seeds, dtype=np.int64))

    def apply(self, state: State, contributions: Contributions, seeds: int) -> Applied:
        """FedKSeed's combination, and the |scalars| remembered."""
        assert isinstance(state, Significance)
        sums, counts = state.sums.copy(), state.counts.copy()

        def remembered() -> Iterator[Contribution]:
            for contribution in contributions.read():
                if contribution.is_first_order:
                    yield contribution
                    continue
                magnitudes = np.minimum(np.abs(contribution.scalars.astype(np.float64)), self.scalar_clip)
                np.add.at(sums, contribution.seeds, magnitudes)
                np.add.at(counts, contribution.seeds, 1)
                yield contribution

        watched = replace(contributions, read=remembered)
        _, combined, steps = self.combination.apply(None, watched, seeds)
        return Significance(sums, counts), combined, steps

    def levels(self, state: State) -> bytes | None:
        """K significance levels; None (uniform) before anything is known."""
        assert isinstance(state, Significance)
        if (state.counts == 1).all():
            return None
        return significance_levels(state.sums / state.counts)


def choose(name: str, *, weighs_samples: bool, server_lr: float) -> Algorithm:
    """The algorithm of that name in the configuration."""
    combination = FedKSeed(weighs_samples, server_lr)
    return FedKSeedPro(combination) if name == "fedkseed-pro" else combination


def pack(state: State) -> bytes:
    """The state as the store keeps it: nothing, or K little-endian float64 and K int64."""
    if state is None:
        return b""
    return state.sums.astype("<f8").tobytes() + state.counts.astype("<i8").tobytes()


def unpack(data: bytes, seeds: int) -> State:
    """The state that `pack` wrote. Raises ValueError for another length."""
    if not data:
        return None
    if len(data) != 16 * seeds:
        raise ValueError(f"{len(data)} bytes of algorithm state; allowed: {16 * seeds}")
    sums = np.frombuffer(data, dtype="<f8", count=seeds).astype(np.float64)
    return Significance(sums, np.frombuffer(data, dtype="<i8", offset=8 * seeds).astype(np.int64))


def damped(weight: float, staleness: int) -> float:
    """The weight of an update that comes `staleness` rounds late (FedBuff, Nguyen et al. 2022, section 5).

    The others' weights do not grow by it: a round of late updates alone is a short step.
    """
    return weight / math.sqrt(1.0 + staleness)


def _weighted_change(contributions: Contributions, seeds: int, weighs_samples: bool) -> tuple[NDArray[np.float64], int]:
    """sum_i w_i d_i, float64 (K,), and the number of steps in it."""
    if not contributions.devices:
        raise ValueError("a round without contributions cannot be combined")
    total = contributions.samples if weighs_samples else contributions.devices
    if total <= 0:
        raise ValueError("the contributions weigh nothing")
    combined = np.zeros(seeds, dtype=np.float64)
    steps = 0
    for contribution in contributions.read():
        # add.at adds one step after the other, also where a seed was drawn twice.
        change = np.zeros(seeds, dtype=np.float64)
        np.add.at(change, contribution.seeds, contribution.deltas.astype(np.float64))
        weight = (contribution.samples if weighs_samples else 1) / total
        combined += damped(weight, contribution.staleness) * change
        steps += len(contribution.scalars)
    return combined, steps
