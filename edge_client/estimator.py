"""The two-point estimator and the local steps of a round (FedKSeed, equations 3 to 5; SPSA, Spall 1992).

A step draws a seed k, measures the loss at `+eps z_k` and at `-eps z_k`, and turns the difference into one scalar, the
projected gradient `g = (L+ - L-) / (2 eps)`. The step rule turns g into a change of the k-th coefficient.
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
class Probe:
    """Two losses, in nats per token, and the scalar as it travels."""

    loss_plus: float
    loss_minus: float
    scalar: np.float32

    @property
    def loss(self) -> float:
        """The mean of both: the loss where the step started, but for the curvature."""
        return (self.loss_plus + self.loss_minus) / 2


@dataclass(frozen=True)
class LocalStep:
    """One finished local step."""

    step: int  # 0-based, within the round
    k: int
    scalar: np.float32
    loss: float  # nats per token


def two_point(
    loss: Callable[[], Loss], overlay: Overlay, k: int, eps: float, scalar_format: NumberFormat, noise: int = 2**31
) -> Probe:
    """Measure `loss`, nats per token of the model under `overlay`, on both sides along direction k.

    eps: distance in weight units, rounded to float32 for the probe. The scalar is as the aggregator will read it;
    noise: u32, of its rounding (`shared.numbers.rounded_by_chance`).
    Where the overlay is paired, one pass measures both, with the same bits as two would. A model whose halves part
    ways is measured in two passes, from then on always: what parts it once parts it again.
    Raises UserError where a loss is not finite; the overlay is as before in any case.
    """
    with torch.inference_mode():
        plus, minus = _losses(loss, overlay, k, np.float32(eps))
    if not (math.isfinite(plus) and math.isfinite(minus)):
        raise UserError(
            f"the loss is {plus} at +eps and {minus} at -eps along direction {k}; both must be finite. "
            "Lower eps or the step, or load the model in bf16 or fp32."
        )
    scalar = rounded_by_chance((plus - minus) / (2.0 * eps), scalar_format, noise)
    return Probe(plus, minus, scalar)


def _losses(loss: Callable[[], Loss], overlay: Overlay, k: int, eps: np.float32) -> tuple[float, float]:
    if overlay.is_paired:
        try:
            with overlay.both_probes(k, eps):
                plus, minus = halves(loss())
                return float(plus), float(minus)
        except Diverged:
            overlay.is_paired = False
    with overlay.probe(k, eps):
        plus = float(loss())
    with overlay.probe(k, -eps):
        return plus, float(loss())


def local_steps(
    overlay: Overlay,
    plan: Plan,
    device: str,
    batches: Callable[[int], Batch],
    loss: BatchLoss,
    scalar_format: NumberFormat,
    attempt: Callable[[Callable[[], Probe]], Probe] = lambda measure: measure(),
    done: Sequence[float] = (),
) -> Iterator[LocalStep]:
    """The local steps of `plan`, one per item; between two items the overlay holds a whole number of steps.

    device: this device's id, which its seeds are drawn with. batches: the batch of a step (0-based). loss: of a batch,
    in nats per token, by the model under `overlay`. attempt: runs a step's probe, and may run it again when memory
    ran out. done: the scalars of steps that were taken before, which are not taken again and are no items.
    The overlay must hold the coefficients of the plan's round.
    Raises UserError as `two_point` and `shared.steprule.advance` do.
    """
    name = None if plan.common_seeds else device
    drawn = draw(plan.nonce, name, plan.local_steps, overlay.seeds, plan.levels)
    noise = rounding_noise(plan.nonce, device, plan.local_steps).tolist()
    state = start(plan.step)
    for step, k in enumerate(drawn.tolist()):
        if step < len(done):
            state, delta = advance(plan.step, state, np.float32(done[step]))
            overlay.nudge(k, delta)
            continue
        batch = batches(step)

        def measure(batch: Batch = batch, k: int = k, noise: int = noise[step]) -> Probe:
            return two_point(lambda: loss(batch), overlay, k, plan.eps, scalar_format, noise)

        probe = attempt(measure)
        state, delta = advance(plan.step, state, probe.scalar)
        overlay.nudge(k, delta)
        yield LocalStep(step, k, probe.scalar, probe.loss)
