"""What `algorithms` and `worth` do with a round's changes, once more for `verification`, in plain Python numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aggregator.config import RunConfig


@dataclass
class Kind:
    """The devices of one kind in a round; `samples` and `devices` are of all that will be added."""

    pool: int
    samples: int = 0
    devices: int = 0

    def __post_init__(self) -> None:
        self.change = [0.0] * self.pool
        self.weights = self.squares = self.power = 0.0

    def add(self, config: RunConfig, samples: int, rounds_late: int, change: Mapping[int, float]) -> None:
        """One device."""
        weight = samples / self.samples if config.weighting == "samples" else 1 / self.devices
        weight = weight / math.sqrt(1.0 + rounds_late)
        for seed, value in change.items():
            self.change[seed] += weight * value
        self.weights += weight
        self.squares += weight * weight
        self.power += weight * math.fsum(value * value for value in change.values())

    @property
    def length(self) -> float:
        """Squared, of the sum."""
        return _dot(self.change, self.change)


@dataclass
class Known:
    """What is remembered of both kinds."""

    noise: float = 0.5
    noise_rounds: int = 0
    agreement: float = 0.0
    agreement_rounds: int = 0

    def after(self, forward: Kind, first: Kind) -> Known:
        """The same after a round."""
        noise, agreement = (self.noise, self.noise_rounds), (self.agreement, self.agreement_rounds)
        total = first.weights * first.weights
        if first.devices > 1 and first.power > 0.0:
            power = first.power / first.weights
            own = (power - first.length / total) / (1.0 - first.squares / total) / power
            noise = _mean(noise if self.noise_rounds else (0.0, 0), min(0.99, max(0.0, own)))
        if forward.devices and first.devices and forward.length > 0.0 and first.length > 0.0:
            cosine = _dot(forward.change, first.change) / math.sqrt(forward.length) / math.sqrt(first.length)
            agreement = _mean(agreement, cosine)
        return Known(*noise, *agreement)

    def added(self, config: RunConfig, forward: Kind, first: Kind) -> list[float]:
        """What a round adds to the coefficients."""
        if not first.devices:
            n = forward.devices
            factor = {"mean": 1.0, "sqrt": math.sqrt(n), "sum": float(n)}[config.server_scale]
            return [factor * value for value in forward.change]
        if not forward.devices:
            return first.change
        of_forward, of_first = self._shares(forward, first)
        return [of_forward * z + of_first * f for z, f in zip(forward.change, first.change, strict=True)]

    def _shares(self, forward: Kind, first: Kind) -> tuple[float, float]:
        if first.length == 0.0:
            return 1.0, 0.0
        if forward.length == 0.0 or self.agreement <= 0.0:
            return 0.0, 1.0
        shared = first.squares / (first.weights * first.weights)
        phi = self.noise * shared / (1.0 - self.noise + self.noise * shared)
        other = (1.0 - phi) * max(0.0, (1.0 - phi) / (self.agreement * self.agreement) - 1.0)
        part = 0.0 if phi == 0.0 else phi / (phi + other)
        means = math.sqrt(first.length) / first.weights / (math.sqrt(forward.length) / forward.weights)
        return part * (1.0 - phi) / self.agreement * means, 1.0 - part


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _mean(before: tuple[float, int], value: float) -> tuple[float, int]:
    mean, rounds = before
    return mean + (value - mean) / min(rounds + 1, 10), rounds + 1
