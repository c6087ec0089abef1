"""The step rule from round to round: what the fleet's scalars and losses say about the next step.

The scalars promise a fall of the loss: were it a plane, a step that changes a coefficient by d along a scalar g would
lower it by |g d|. Where the loss curves, or the scalars are noise of their batches, less of the promise is kept. The
part that is kept, by held-out loss, tells whether steps are too short or too long, whatever model, data and fleet are:
a parabola keeps one half at the best step, and noise takes from that (trust regions; Conn, Gould & Toint 2000, 6.1).
And no round can keep a promise of many times the whole loss: that is the bound of Polyak's step, for a loss that cannot
fall below 0 (Loizou et al. 2021, arXiv 2002.10542). It holds in the first round too, and for a fleet of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from aggregator.config import RunConfig, server_factor
from shared.messages import NormalisedStep, PlainStep, StepRule

SMALLEST_PART, LARGEST_PART = 1.0 / 64, 2.0  # of the first step_rms, which it never leaves
GROW = 1.2  # the most that one round changes step_rms by, either way
SHRINK = 0.5  # the same after a rise of the loss


class Fleet(msgspec.Struct, frozen=True):
    """What the aggregator knows of the fleet's scalars and losses."""

    step_rms: float  # of the next plan
    mean_square: float = 0.0  # of the fleet's scalars
    count: int = 0  # steps that the mean square stands for, at most `horizon`
    reference_loss: float | None = None  # the last held-out loss that was measured
    promised: float = 0.0  # fall of the loss since then, by the scalars


class Magnitude(msgspec.Struct, frozen=True):
    """How large the scalars of one update are."""

    square_sum: float
    count: int

    @classmethod
    def of(cls, scalars: NDArray[np.float32]) -> Magnitude:
        """Of float32 (n,). A square of a float32 is exact in float64, and fsum rounds once."""
        wide = scalars.astype(np.float64)
        return cls(math.fsum((wide * wide).tolist()), scalars.size)


def start(config: RunConfig) -> Fleet:
    """The fleet before its first round."""
    return Fleet(step_rms=config.step_rms)


def step_rule(config: RunConfig, fleet: Fleet) -> StepRule:
    """The step rule of the next plan."""
    if config.step == "plain":
        return PlainStep(lr=config.lr)
    return NormalisedStep(
        step_rms=fleet.step_rms,
        clip=config.clip,
        decay=config.decay,
        prior_mean_square=fleet.mean_square,
        prior_count=fleet.count,
    )


def horizon(config: RunConfig) -> int:
    """How many steps the running mean square remembers: 1 / (1 - decay)."""
    return max(1, round(1.0 / (1.0 - config.decay)))


def after_round(
    config: RunConfig,
    fleet: Fleet,
    magnitudes: Sequence[Magnitude],
    held_out_loss: float | None,
    *,
    has_first_order: bool = False,
) -> tuple[float, Fleet]:
    """What a round's change is multiplied by, in (0, 1], and the fleet after the round.

    magnitudes: of each device's scalars, in device order. held_out_loss: of the version that the round trained from,
    weighted by samples, nats per token.

    The mean square is the median over devices of each one's mean square, so that one broken device cannot stop the
    fleet, mixed with the old one by the number of steps behind each. With `kept` the part of the promise that held-out
    loss kept since it was measured last, step_rms is multiplied by sqrt(kept / config.kept_promise), within 1 / GROW
    (after a rise of the loss SHRINK) and GROW: near the end scalars are mostly noise of their batches, so little of
    the promise is kept however short the step is, and what still lowers the loss must not be cut down to nothing.
    The step stays where `kept_promise` is 0, and where a round had first-order devices, which promise nothing.
    A round is shortened so that it promises no more than `promise_limit` times the last loss that is known; not by the
    plain rule, whose rate a person chose, not without a loss above 0, and not with first-order devices.
    """
    if config.step == "plain":
        return 1.0, fleet
    mean_square, count = _mixed(config, fleet, magnitudes)
    promised = _promised(config, fleet, magnitudes, mean_square)
    loss = fleet.reference_loss if held_out_loss is None else held_out_loss
    limit = math.inf if has_first_order or loss is None or loss <= 0.0 else config.promise_limit * loss
    length = limit / promised if 0.0 < limit < promised else 1.0
    promised *= length
    step_rms, reference = fleet.step_rms, fleet.reference_loss
    if held_out_loss is None:
        promised += fleet.promised
    else:
        if reference is not None and config.kept_promise and fleet.promised > 0.0:
            kept = max(0.0, reference - held_out_loss) / fleet.promised
            least = SHRINK if held_out_loss > reference else 1.0 / GROW
            factor = min(GROW, max(least, math.sqrt(kept / config.kept_promise)))
            wanted = max(SMALLEST_PART * config.step_rms, fleet.step_rms * factor)
            step_rms = min(LARGEST_PART * config.step_rms, wanted)
        reference = held_out_loss
    if has_first_order:
        promised, reference = 0.0, held_out_loss
    return length, Fleet(
        step_rms=step_rms,
        mean_square=mean_square,
        count=count,
        reference_loss=reference,
        promised=promised,
    )


def _promised(config: RunConfig, fleet: Fleet, magnitudes: Sequence[Magnitude], mean_square: float) -> float:
    """The fall of the loss that a round's steps promise: scalars of the fleet's RMS, each moved along by step_rms."""
    if not magnitudes:
        return 0.0
    steps = sum(one.count for one in magnitudes) / len(magnitudes)
    return server_factor(config.server_scale, len(magnitudes)) * fleet.step_rms * steps * math.sqrt(mean_square)


def _mixed(config: RunConfig, fleet: Fleet, magnitudes: Sequence[Magnitude]) -> tuple[float, int]:
    if not magnitudes:
        return fleet.mean_square, fleet.count
    squares = sorted(one.square_sum / one.count for one in magnitudes)
    middle = len(squares) // 2
    median = squares[middle] if len(squares) % 2 else (squares[middle - 1] + squares[middle]) / 2
    steps = sum(one.count for one in magnitudes)
    total = fleet.count + steps
    mixed = fleet.mean_square * (fleet.count / total) + median * (steps / total)
    return mixed, min(total, horizon(config))
