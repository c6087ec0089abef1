"""A round on a device that has exact gradients: Adam on the K offsets, and what becomes of it as a change of a.

The plan's one knob, the RMS change of a weight per forward-only step, serves both kinds of device. n forward-only steps
in random directions take the weights about sqrt(n) * step_rms away; a first-order round goes no farther: its steps are
of RMS sqrt(n) * step_rms / m each, m of them, m being as many as cost the forward passes of n (`GRADIENT_COST`).
Steps are Adam's (Kingma & Ba 2015, algorithm 1) on y, scaled to that RMS, so that no learning rate has to be found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.directions import offsets
from shared.errors import UserError
from shared.messages import NormalisedStep, Plan, forwards_of

if TYPE_CHECKING:
    from edge_client.overlay import Overlay

Floats = NDArray[np.float64]
GRADIENT_COST = 5  # forward passes that a gradient costs: one, one again, two and a half for backward (measured: 5.1)
_DECAY_MEAN, _DECAY_SQUARE = 0.9, 0.99
_TINY = 1e-12  # of the gradient's root mean square per bucket


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a round's local steps are. Arrays are float64 (K,)."""

    moved: Floats  # of the offsets, since the round's version
    mean: Floats  # Adam's, over the whole run
    square: Floats
    seen: int  # gradients in the two
    steps: int  # of this round
    loss_sum: float  # nats per token, over this round's steps

    @classmethod
    def of(cls, seeds: int) -> Progress:
        """Before a run's first step."""
        zeros = np.zeros(seeds)
        return cls(zeros, zeros, zeros, 0, 0, 0.0)

    def next_round(self) -> Progress:
        """Before a round's first step; what Adam has learned of the gradient's size stays."""
        return replace(self, moved=np.zeros_like(self.moved), steps=0, loss_sum=0.0)


def steps_of(plan: Plan) -> int:
    """How many gradient steps cost the forward passes of the plan's forward-only steps; at least one."""
    return max(1, forwards_of(plan) // GRADIENT_COST)


def step_rms_of(plan: Plan) -> float:
    """The RMS change of a weight per gradient step (module docstring). Raises UserError for the paper's plain rule."""
    if not isinstance(plan.step, NormalisedStep):
        raise UserError(
            "the run's step rule is plain, whose lr means nothing to exact gradients; they need a normalised one. "
            "Join with the estimator forward."
        )
    return plan.step.step_rms * math.sqrt(plan.local_steps) / steps_of(plan)


def advanced(progress: Progress, loss: float, gradient: Floats, step_rms: float) -> Progress:
    """`progress` after one step. gradient: dL/dy. Raises UserError where it vanishes or is not finite."""
    seen = progress.seen + 1
    mean = _DECAY_MEAN * progress.mean + (1 - _DECAY_MEAN) * gradient
    square = _DECAY_SQUARE * progress.square + (1 - _DECAY_SQUARE) * gradient * gradient
    ratio = mean / (1 - _DECAY_MEAN**seen) / (np.sqrt(square / (1 - _DECAY_SQUARE**seen)) + _TINY)
    rms = math.sqrt(float(np.mean(ratio * ratio)))
    if not 0.0 < rms < math.inf:
        raise UserError(f"a gradient step has the RMS {rms}; it must be finite and above 0. Check data and model.")
    return Progress(
        moved=progress.moved - step_rms / rms * ratio,
        mean=mean,
        square=square,
        seen=seen,
        steps=progress.steps + 1,
        loss_sum=progress.loss_sum + loss,
    )


def change_of(moved: Floats) -> NDArray[np.float32]:
    """The change of the coefficients that moves the offsets so: a = H y / K, float32 (K,)."""
    return offsets(moved.astype(np.float32)) / np.float32(moved.size)


def gradient_steps(
    overlay: Overlay, plan: Plan, progress: Progress, measure: Callable[[int], tuple[float, Floats]]
) -> Iterator[tuple[float, Progress]]:
    """The steps of `plan` that `progress` lacks: the loss before each, and what is done after it.

    measure: loss and dL/dy of the batch of a step (0-based) by the model under `overlay`, which must hold the
    coefficients of the plan's round, and holds those after the steps so far between two items.
    """
    before, step_rms = overlay.coefficients, step_rms_of(plan)
    for step in range(progress.steps, steps_of(plan)):
        overlay.set_coefficients(before + change_of(progress.moved))
        loss, gradient = measure(step)
        progress = advanced(progress, loss, gradient, step_rms)
        yield loss, progress
