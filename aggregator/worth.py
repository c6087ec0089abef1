"""Rounds in which first-order devices and forward-only ones take part: what each kind is worth (PROTOCOL.md 9.9).

Both kinds estimate the same thing, the change that the fleet's data ask for: F, the first-order mean, with an error
of its own, and Z, the forward-only mean, along a few directions and with much noise. The combination is the sum of
both with inverse variances as weights, after Z is scaled so that it is no shorter along that change than F is.

F's variance is what its devices differ by among each other. Z's follows from how well it agrees with F: the cosine of
the two means. Both numbers are remembered over rounds, as relative ones, because steps grow and shrink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

HORIZON = 10  # rounds that a remembered number stands for
MOST_NOISE = 0.99  # of one device's squared length; so that something is always left


@dataclass(frozen=True)
class Worth:
    """What earlier rounds have shown."""

    noise: float = 0.5  # part of one first-order device's squared length that is its own; 1/2 until two took part
    noise_rounds: int = 0  # that measured it
    agreement: float = 0.0  # cosine between the means of both kinds
    agreement_rounds: int = 0


@dataclass
class Kind:
    """The contributions of one kind in a round, as they are added up."""

    change: NDArray[np.float64]  # (K,), sum of weight * change
    weights: float = 0.0  # their sum; below 1 where some are late
    squares: float = 0.0  # sum of squared weights
    power: float = 0.0  # sum of weight * squared length, of first-order devices only
    devices: int = 0

    def add(self, weight: float, change: NDArray[np.float64], *, has_power: bool) -> None:
        """One more device's change, (K,)."""
        self.change += weight * change
        self.weights += weight
        self.squares += weight * weight
        self.devices += 1
        if has_power:
            self.power += weight * dot(change, change)


def dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The inner product of (K,) and (K,): each product rounded, their sum exactly, so that no order matters."""
    return math.fsum((a * b).tolist())


def learn(worth: Worth, forward: Kind, first_order: Kind) -> Worth:
    """What a round adds: the first-order devices' noise where there are two, the agreement where there are both."""
    if first_order.devices >= 2 and first_order.power > 0.0:
        spread = first_order.squares / (first_order.weights * first_order.weights)
        power = first_order.power / first_order.weights
        of_mean = dot(first_order.change, first_order.change) / (first_order.weights * first_order.weights)
        noise = min(MOST_NOISE, max(0.0, (power - of_mean) / (1.0 - spread) / power))
        mean, rounds = _remembered(worth.noise if worth.noise_rounds else 0.0, worth.noise_rounds, noise)
        worth = replace(worth, noise=mean, noise_rounds=rounds)
    lengths = dot(forward.change, forward.change), dot(first_order.change, first_order.change)
    if forward.devices and first_order.devices and min(lengths) > 0.0:
        cosine = dot(forward.change, first_order.change) / math.sqrt(lengths[0]) / math.sqrt(lengths[1])
        mean, rounds = _remembered(worth.agreement, worth.agreement_rounds, cosine)
        worth = replace(worth, agreement=mean, agreement_rounds=rounds)
    return worth


def shares(worth: Worth, forward: Kind, first_order: Kind) -> tuple[float, float]:
    """What the sums of both kinds are multiplied by in their combination: (forward-only, first-order).

    With p_Z, p_F the squared lengths of both means, g their agreement, and phi the part of p_F that is noise, which
    follows from the devices' noise and how many weights share it:
        Z scaled by (1 - phi) / g * sqrt(p_F / p_Z) is as long as F's signal along it
        variances, over p_F:   F: phi    scaled Z: (1 - phi) * ((1 - phi) / g^2 - 1), at least 0
    A round in which either is zero, or in which Z does not agree, counts F alone; Z alone where F is zero.
    """
    of_forward, of_first = dot(forward.change, forward.change), dot(first_order.change, first_order.change)
    if of_first == 0.0:
        return 1.0, 0.0
    if of_forward == 0.0 or worth.agreement <= 0.0:
        return 0.0, 1.0
    spread = first_order.squares / (first_order.weights * first_order.weights)
    phi = worth.noise * spread / (1.0 - worth.noise + worth.noise * spread)
    variance = (1.0 - phi) * max(0.0, (1.0 - phi) / (worth.agreement * worth.agreement) - 1.0)
    part = phi / (phi + variance) if phi > 0.0 else 0.0
    means = math.sqrt(of_first) / first_order.weights / (math.sqrt(of_forward) / forward.weights)
    return part * (1.0 - phi) / worth.agreement * means, 1.0 - part


def _remembered(mean: float, rounds: int, value: float) -> tuple[float, int]:
    rounds += 1
    return mean + (value - mean) / min(rounds, HORIZON), rounds
