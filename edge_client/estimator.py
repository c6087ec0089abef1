"""Estimators of the projected gradient, and the local steps of a round (FedKSeed, equations 3 to 5; SPSA, Spall 1992).

Two-sided: a step draws a seed k, measures the loss at `+eps z_k` and at `-eps z_k`, and turns the difference into one
scalar, `g = (L+ - L-) / (2 eps)`. One-sided: n directions share a batch, each is measured at `+eps z_k` alone, and its
loss is compared with the mean of the others' (PROTOCOL.md, section 9.8): n passes for n scalars in place of 2 n, for
which the scalars carry what the directions' curvatures differ by, times eps / 2. The step rule turns a scalar into a
change of the k-th coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Union

import numpy as np
import torch
from torch import Tensor

from edge_client.data.batches import Batch
from edge_client.overlay import Overlay
from edge_client.pairs import Diverged, halves
from shared.errors import UserError
from shared.messages import NumberFormat, Plan
from shared.numbers import rounded_by_chance
from shared.seeds import draw, rounding_noise
from shared.steprule import advance, start

Loss = Union[float, Tensor]  # a tensor of one element; a pair of them where both probes run together
BatchLoss = Callable[[Batch], Loss]


@dataclass(frozen=True)
class TwoSided:
    """Two losses, in nats per token, and the scalar as it travels."""

    loss_plus: float
    loss_minus: float
    scalar: np.float32

    @property
    def loss(self) -> float:
        """The mean of both: the loss where the step started, but for the curvature."""
        return (self.loss_plus + self.loss_minus) / 2


@dataclass(frozen=True)
class OneSided:
    """The loss at +eps, in nats per token, and the scalar as it travels."""

    loss: float
    scalar: np.float32


Probes = Union[list[TwoSided], list[OneSided]]  # of one batch


@dataclass(frozen=True)
class LocalStep:
    """One finished local step."""

    step: int  # 0-based, within the round
    k: int
    scalar: np.float32
    loss: float  # nats per token


def two_point(
    loss: Callable[[], Loss], overlay: Overlay, k: int, eps: float, scalar_format: NumberFormat, noise: int = 2**31
) -> TwoSided:
    """Measure `loss`, nats per token of the model under `overlay`, on both sides along direction k.

    eps: distance in weight units, rounded to float32 for the probe. The scalar is as the aggregator will read it;
    noise: u32, of its rounding (`shared.numbers.rounded_by_chance`).
    Raises UserError where a loss is not finite; the overlay is as before in any case.
    """
    plus, minus = _losses(loss, overlay, ((k, np.float32(eps)), (k, np.float32(-eps))))
    return TwoSided(plus, minus, rounded_by_chance((plus - minus) / (2.0 * eps), scalar_format, noise))


def one_sided(
    loss: Callable[[], Loss],
    overlay: Overlay,
    ks: Sequence[int],
    eps: float,
    scalar_format: NumberFormat,
    noise: Sequence[int],
) -> list[OneSided]:
    """Measure `loss` at +eps along each of the n directions `ks`, n >= 2; arguments and errors as of `two_point`.

    g_i = (L_i - mean of the others' L) / eps, computed as (L_i - mean L) * n / ((n - 1) eps).
    """
    losses = _losses(loss, overlay, [(k, np.float32(eps)) for k in ks])
    mean = math.fsum(losses) / len(losses)
    per_loss = len(losses) / ((len(losses) - 1) * eps)
    return [
        OneSided(one, rounded_by_chance((one - mean) * per_loss, scalar_format, by))
        for one, by in zip(losses, noise, strict=True)
    ]


def _losses(loss: Callable[[], Loss], overlay: Overlay, probes: Sequence[tuple[int, np.float32]]) -> list[float]:
    """`loss` at each of `probes`, a direction and how far along it.

    Where the overlay is paired, one pass measures two, with the same bits as two would. A model whose halves part
    ways is measured in single passes, from then on always: what parts it once parts it again.
    """
    found: list[float] = []
    with torch.inference_mode():
        while len(found) < len(probes):
            first, second = probes[len(found)], probes[len(found) + 1 : len(found) + 2]
            if overlay.is_paired and second:
                try:
                    with overlay.both_probes(first, second[0]):
                        found += map(float, halves(loss()))
                    continue
                except Diverged:
                    overlay.is_paired = False
            with overlay.probe(*first):
                found.append(float(loss()))
    for value, (k, step) in zip(found, probes, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at {step:+g} along direction {k}; it must be finite. "
                "Lower eps or the step, or load the model in bf16 or fp32."
            )
    return found


def local_steps(
    overlay: Overlay,
    plan: Plan,
    device: str,
    batches: Callable[[int], Batch],
    loss: BatchLoss,
    scalar_format: NumberFormat,
    attempt: Callable[[Callable[[], Probes]], Probes] = lambda measure: measure(),
    done: Sequence[float] = (),
) -> Iterator[LocalStep]:
    """The local steps of `plan`, one per item; between two items the overlay holds a whole number of steps.

    device: this device's id, which its seeds are drawn with. batches: batch number so and so of the round (from 0): of
    a step, or of a group of one-sided ones. loss: of a batch, in nats per token, by the model under `overlay`.
    attempt: runs the passes over a batch, and may run them again when memory ran out. done: the scalars of steps that
    were taken before, which are not taken again and are no items.
    The overlay must hold the coefficients of the plan's round.
    Raises UserError as `two_point` and `shared.steprule.advance` do.
    """
    name = None if plan.common_seeds else device
    drawn = draw(plan.nonce, name, plan.local_steps, overlay.seeds, plan.levels).tolist()
    noise = rounding_noise(plan.nonce, device, plan.local_steps).tolist()
    state, size = start(plan.step), plan.one_sided or 1
    for first in range(0, plan.local_steps, size):
        group = slice(first, first + size)
        found: Probes = []
        if len(done) < first + size:  # a group that was left halfway is measured again: the same losses
            batch = batches(first // size)

            def measure(batch: Batch = batch, group: slice = group) -> Probes:
                return _probes_of(lambda: loss(batch), overlay, plan, drawn[group], scalar_format, noise[group])

            found = attempt(measure)
        for step, k in enumerate(drawn[group], first):
            is_done = step < len(done)
            scalar = np.float32(done[step]) if is_done else found[step - first].scalar
            state, delta = advance(plan.step, state, scalar)
            overlay.nudge(k, delta)
            if not is_done:
                yield LocalStep(step, k, scalar, found[step - first].loss)


def _probes_of(
    loss: Callable[[], Loss],
    overlay: Overlay,
    plan: Plan,
    ks: Sequence[int],
    scalar_format: NumberFormat,
    noise: Sequence[int],
) -> Probes:
    """The probes over one batch, made as the plan says; `ks` and `noise` are those of its steps."""
    if plan.one_sided:
        return one_sided(loss, overlay, ks, plan.eps, scalar_format, noise)
    return [two_point(loss, overlay, ks[0], plan.eps, scalar_format, noise[0])]
