"""Step rules: from the scalars of a device, in order, to changes of the coefficients.

Devices apply `advance` step by step; `deltas` replays a whole update and `deltas_of_many` a round, all three to the
same bits.
Everything is float64 with + - * / and sqrt alone (correctly rounded on every machine), rounded to float32 at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import PeerError, UserError
from shared.messages import NormalisedStep, PlainStep, StepRule
from shared.refusals import Refusal

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class StepState:
    """What the normalised rule remembers between the steps of one round; the plain rule leaves it alone."""

    mean_square: float  # running mean of the squared scalars
    count: int  # steps behind the mean, those of the plan's prior included


def start(rule: StepRule) -> StepState:
    """The state before a round's first step: the plan's prior."""
    if isinstance(rule, PlainStep):
        return StepState(0.0, 0)
    return StepState(rule.prior_mean_square, rule.prior_count)


def advance(rule: StepRule, state: StepState, scalar: float | np.float32) -> tuple[StepState, np.float32]:
    """The state after one step, and the delta to a[k] of the step's seed.

    Plain (FedKSeed, equation 4): delta = -lr * g.
    Normalised (step t; n and m start at the plan's prior):
        n_t = n_{t-1} + 1; beta = min(decay, 1 - 1 / n_t); m_t = beta * m_{t-1} + (1 - beta) * g^2
        x = clip(g / sqrt(m_t), -clip, clip), 0 where m_t = 0; delta = -step_rms * x
    Raises UserError if the scalar or the delta is not finite.
    """
    mean_square, count, delta = _step(rule, state.mean_square, state.count, float(scalar))
    return StepState(mean_square, count), np.float32(delta)


def deltas(rule: StepRule, scalars: NDArray[np.float32]) -> NDArray[np.float32]:
    """The deltas of a device's whole update. scalars: float32 (n,) in step order. Returns float32 (n,).

    Raises PeerError (NON_FINITE) if a scalar or a delta is not finite.
    """
    before = start(rule)
    mean_square, count = before.mean_square, before.count
    out: list[float] = []
    for scalar in scalars.tolist():
        try:
            mean_square, count, delta = _step(rule, mean_square, count, scalar)
        except UserError as error:
            raise PeerError(Refusal.NON_FINITE, f"step {len(out)}: {error}") from error
        out.append(delta)
    return np.array(out, dtype=np.float64).astype(np.float32)


def deltas_of_many(rule: StepRule, scalars: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """`deltas` of many devices at once, one numpy operation per step for all of them.

    scalars: float32 (devices, steps), rows in step order, anything finite behind a row's length. lengths: int64
    (devices,), steps per device. Returns float32 (devices, steps), 0 behind a row's length.
    Raises PeerError (NON_FINITE) if a scalar or a delta is not finite.
    """
    wide = scalars.T.astype(np.float64)  # (steps, devices): what one step needs lies together
    with np.errstate(over="ignore", invalid="ignore"):  # the squares of large scalars; `deltas` lets them be too
        out = -rule.lr * wide if isinstance(rule, PlainStep) else _normalised(rule, wide)
        is_over = np.arange(len(wide))[:, None] >= lengths[None, :]
        out[is_over] = 0.0
        is_bad = ~((np.abs(out) <= _LARGEST) & (np.isfinite(wide) | is_over))
    for row in np.flatnonzero(is_bad.any(axis=0))[:1]:
        deltas(rule, scalars[row, : lengths[row]])  # raises, naming the step
    return np.ascontiguousarray(out.T.astype(np.float32))


def longest_change(rule: StepRule, local_steps: int) -> float:
    """The longest change of coefficients, in the Euclidean norm, that a round's scalars can make; weight units.

    Every step moves one coefficient by clip * step_rms at most. The plain rule bounds nothing: infinity.
    """
    return math.inf if isinstance(rule, PlainStep) else local_steps * rule.clip * rule.step_rms


def check_length(values: NDArray[np.float32], rule: StepRule, local_steps: int) -> None:
    """Raise PeerError (LARGE_CHANGE) where a change of coefficients, float32 (n,), is longer than `longest_change`."""
    wide = values.astype(np.float64)
    norm, longest = math.sqrt(math.fsum((wide * wide).tolist())), longest_change(rule, local_steps)
    if norm > longest:
        raise PeerError(Refusal.LARGE_CHANGE, f"its norm is {norm:.6g}; allowed: {longest:.6g}")


def _normalised(rule: NormalisedStep, wide: NDArray[np.float64]) -> NDArray[np.float64]:
    """`_step` for float64 scalars (steps, devices), operation by operation."""
    mean_square = np.full(wide.shape[1], rule.prior_mean_square, dtype=np.float64)
    out = np.zeros_like(wide)
    ratio = np.empty_like(mean_square)
    for step, g in enumerate(wide):
        beta = min(rule.decay, 1.0 - 1.0 / (rule.prior_count + step + 1))
        mean_square = beta * mean_square + (1.0 - beta) * (g * g)
        rms = np.sqrt(mean_square)
        ratio.fill(0.0)
        np.divide(g, rms, out=ratio, where=rms > 0.0)
        out[step] = -rule.step_rms * np.maximum(-rule.clip, np.minimum(rule.clip, ratio))
    return out


def _step(rule: StepRule, mean_square: float, count: int, g: float) -> tuple[float, int, float]:
    """Mean square and count after the step, and its delta, which float32 can hold but has not rounded yet."""
    if not math.isfinite(g):
        raise UserError(f"a scalar is {g}; it must be finite. Check the model's loss and lower the step or eps.")
    if isinstance(rule, PlainStep):
        delta = -rule.lr * g
    else:
        count += 1
        beta = min(rule.decay, 1.0 - 1.0 / count)
        mean_square = beta * mean_square + (1.0 - beta) * (g * g)
        rms = math.sqrt(mean_square)
        ratio = g / rms if rms > 0.0 else 0.0
        delta = -rule.step_rms * max(-rule.clip, min(rule.clip, ratio))
    if abs(delta) > _LARGEST:
        raise UserError(f"a step changes a coefficient by {delta}; float32 cannot hold it. Lower the step.")
    return mean_square, count, delta
