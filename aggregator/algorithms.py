"""What a round's updates add to the coefficients: FedKSeed and FedKSeed-Pro (Qin et al., ICML 2024).

An algorithm is a frozen record with `init` and `apply(state, contributions, seeds)`. Everything is float64
and elementwise, devices in the order of their ids, so that a replay gives the same bits on every machine: no BLAS,
no pairwise sums.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from aggregator.config import ServerScale, server_factor
from aggregator.worth import Kind, Worth, learn, shares
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


class Total(NamedTuple):
    """How many devices of a kind a round has, and their samples."""

    devices: int
    samples: int

    @classmethod
    def of(cls, samples: Sequence[int]) -> Total:
        """Of a device each."""
        return cls(len(samples), sum(samples))


@dataclass(frozen=True, eq=False)
class Contributions:
    """A round's contributions in device order, made while they are read: a large round does not fit in memory."""

    forward: Total
    first_order: Total
    read: Callable[[], Iterator[Contribution]]

    @property
    def devices(self) -> int:
        """Of both kinds."""
        return self.forward.devices + self.first_order.devices

    @classmethod
    def of(cls, contributions: Sequence[Contribution]) -> Contributions:
        """Those of a small round, sorted: by device, an older update of a device before a newer one."""
        ordered = sorted(contributions, key=lambda contribution: (contribution.device, -contribution.staleness))
        forward = Total.of([one.samples for one in ordered if not one.is_first_order])
        first_order = Total.of([one.samples for one in ordered if one.is_first_order])
        return cls(forward, first_order, lambda: iter(ordered))


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


@dataclass(frozen=True)
class State:
    """What an algorithm remembers from round to round."""

    worth: Worth = field(default_factory=Worth)
    significance: Significance | None = None  # FedKSeed-Pro's


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

    What is added is server_factor * sum_i w_i d_i, d_i the sum of device i's deltas per seed, w_i its samples over
    the samples of all, or 1 / n where not `weighs_samples`, over sqrt(1 + staleness).
    Devices that draw their own seeds move along nearly disjoint, orthogonal directions, and the average divides the
    step of each by their number; `server_scale` says how much of that is taken back (`config.server_factor`).
    First-order devices are averaged among each other; rounds with both kinds: `aggregator.worth`.
    """

    weighs_samples: bool = True
    server_scale: ServerScale = "mean"

    def init(self, seeds: int) -> State:
        """Nothing is known of either kind's worth."""
        return State()

    def apply(self, state: State, contributions: Contributions, seeds: int) -> Applied:
        """See the class. Raises ValueError without contributions."""
        with np.errstate(over="ignore", invalid="ignore"):  # `next_version` looks, and has a message
            forward, first_order, steps = _added_up(contributions, seeds, self.weighs_samples)
            worth = learn(state.worth, forward, first_order)
            if not first_order.devices:
                combined = server_factor(self.server_scale, forward.devices) * forward.change
            elif not forward.devices:
                combined = first_order.change
            else:
                of_forward, of_first_order = shares(worth, forward, first_order)
                combined = of_forward * forward.change + of_first_order * first_order.change
            return replace(state, worth=worth), combined, steps

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
        seen = Significance(np.full(seeds, abs(self.initial_scalar)), np.ones(seeds, dtype=np.int64))
        return replace(self.combination.init(seeds), significance=seen)

    def apply(self, state: State, contributions: Contributions, seeds: int) -> Applied:
        """FedKSeed's combination, and the |scalars| remembered."""
        assert state.significance is not None
        sums, counts = state.significance.sums.copy(), state.significance.counts.copy()

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
        after, combined, steps = self.combination.apply(state, watched, seeds)
        return replace(after, significance=Significance(sums, counts)), combined, steps

    def levels(self, state: State) -> bytes | None:
        """K significance levels; None (uniform) before anything is known."""
        seen = state.significance
        assert seen is not None
        return None if (seen.counts == 1).all() else significance_levels(seen.sums / seen.counts)


def choose(name: str, *, weighs_samples: bool, server_scale: ServerScale) -> Algorithm:
    """The algorithm of that name in the configuration."""
    combination = FedKSeed(weighs_samples, server_scale)
    return FedKSeedPro(combination) if name == "fedkseed-pro" else combination


_WORTH = struct.Struct("<dqdq")


def pack(state: State) -> bytes:
    """The state as the store keeps it: the worth, and FedKSeed-Pro's K little-endian float64 and K int64."""
    seen, worth = state.significance, state.worth
    head = _WORTH.pack(worth.noise, worth.noise_rounds, worth.agreement, worth.agreement_rounds)
    return head if seen is None else head + seen.sums.astype("<f8").tobytes() + seen.counts.astype("<i8").tobytes()


def unpack(data: bytes, seeds: int) -> State:
    """The state that `pack` wrote. Raises ValueError for another length."""
    head, rest = data[: _WORTH.size], data[_WORTH.size :]
    if len(head) != _WORTH.size or len(rest) not in (0, 16 * seeds):
        raise ValueError(f"{len(data)} bytes of algorithm state; allowed: {_WORTH.size} or {_WORTH.size + 16 * seeds}")
    worth = Worth(*_WORTH.unpack(head))
    if not rest:
        return State(worth)
    sums = np.frombuffer(rest, dtype="<f8", count=seeds).astype(np.float64)
    return State(worth, Significance(sums, np.frombuffer(rest, dtype="<i8", offset=8 * seeds).astype(np.int64)))


def damped(weight: float, staleness: int) -> float:
    """The weight of an update that comes `staleness` rounds late (FedBuff, Nguyen et al. 2022, section 5).

    The others' weights do not grow by it: a round of late updates alone is a short step.
    """
    return weight / math.sqrt(1.0 + staleness)


def _added_up(contributions: Contributions, seeds: int, weighs_samples: bool) -> tuple[Kind, Kind, int]:
    """The forward-only contributions, the first-order ones, and the number of local steps."""
    if not contributions.devices:
        raise ValueError("a round without contributions cannot be combined")
    forward, first_order, steps = Kind(np.zeros(seeds)), Kind(np.zeros(seeds)), 0
    for contribution in contributions.read():
        # add.at adds one step after the other, also where a seed was drawn twice.
        change = np.zeros(seeds, dtype=np.float64)
        np.add.at(change, contribution.seeds, contribution.deltas.astype(np.float64))
        is_first = contribution.is_first_order
        kind, total = (first_order, contributions.first_order) if is_first else (forward, contributions.forward)
        weight = contribution.samples / total.samples if weighs_samples else 1 / total.devices
        kind.add(damped(weight, contribution.staleness), change, has_power=is_first)
        steps += len(contribution.scalars)
    return forward, first_order, steps
