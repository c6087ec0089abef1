"""A device that has exact gradients, in a round: steps, what is kept of them, and the update that tells them.

The update has the form of a change of coefficients (PROTOCOL.md): all K numbers, in fewer bits each where the owner's
byte budget has no room for them as they are, and only the largest where there is not a bit for each. What the update
leaves out, by rounding or for want of room, the next one tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_client.data.batches import Batch
from edge_client.first_order_fit import gradients_beside
from edge_client.first_order_gradient import OffsetGradient
from edge_client.first_order_kept import KeptGradient, RoundUnderWay, begun
from edge_client.first_order_steps import gradient_steps, steps_of
from edge_client.fit import MOST_AT_ONCE
from edge_client.jobs import Report, StepReport
from edge_client.kept_steps import work_of
from edge_client.model import LoadedModel
from edge_client.overlay import Overlay
from edge_client.shortage import Portions
from shared.changes import FEW_BITS, read_change, write_change, write_few_bits
from shared.errors import UserError
from shared.messages import Change, NumberFormat, Plan, Run
from shared.numbers import NUMBER_BYTES
from shared.steprule import longest_change
from shared.wire import encode

REST_BYTES = 1200  # of a round's budget: all of it but the update's numbers, in all layers
_SEED_BYTES = 2
_FEWEST = 16  # numbers, however small the budget
_ROUNDING_ROOM = 0.9  # of the longest change: 8-bit numbers may be read a sixteenth larger


@dataclass(frozen=True)
class Told:
    """What a round's local steps put into an update: scalars, or a change."""

    train_loss: float  # mean over the steps, nats per token
    scalars: bytes
    change: Change | None


@dataclass(frozen=True)
class GradientSettings:
    """What the owner wants of exact gradients, and where they keep what must survive a kill."""

    estimator: Literal["forward", "gradient", "auto"]
    kept: KeptGradient
    round_bytes: int = 0  # the owner's budget; 0: none
    max_length: int = 1024  # tokens of the longest example


def chosen(
    settings: GradientSettings | None,
    overlay: Overlay,
    loaded: LoadedModel,
    run: Run,
    data_digest: bytes,
    say: Callable[[str], None],
    at_once: int | None = None,
) -> FirstOrderRounds | None:
    """Exact gradients, or None: forward passes alone. Raises UserError where they are demanded and the run has none.

    `auto` leaves them where the memory that is free does not reach for a single sequence; who demands them tries.
    at_once: sequences that go through the model together to begin with, where a gradient has room for so many; None
    for all.
    """
    if settings is None or settings.estimator == "forward":
        return None
    why = _refusal(run)
    if why is None:
        config, place = loaded.model.config.to_dict(), str(loaded.device)
        length = settings.max_length
        fits, sums = gradients_beside(config, overlay.dtype, place, seeds=run.seeds, max_length=length)
        if fits or settings.estimator == "gradient":
            say(f"estimator gradient: exact gradients by backprop; updates are changes of coefficients; {sums}")
            if fits < MOST_AT_ONCE:
                at_once = min(at_once or MOST_AT_ONCE, fits or 1)
            return FirstOrderRounds(overlay, loaded, run, settings, data_digest, say, at_once)
        why = f"exact gradients do not fit: {sums}"
    if settings.estimator == "gradient":
        raise UserError(f"{why}. Join with the estimator forward.")
    say(f"estimator forward, because {why}")
    return None


def _refusal(run: Run) -> str | None:
    if run.directions != "hadamard":
        return f"the run's directions are {run.directions}, and exact gradients need hadamard"
    if not run.first_order:
        return "the run takes no updates of devices with exact gradients (first_order = refuse)"
    return None


class FirstOrderRounds:
    """The rounds of one run on one device. `say` tells people what was chosen and why."""

    def __init__(
        self,
        overlay: Overlay,
        loaded: LoadedModel,
        run: Run,
        settings: GradientSettings,
        data_digest: bytes,
        say: Callable[[str], None],
        at_once: int | None,
    ) -> None:
        """data_digest: of the examples. Raises as OffsetGradient does."""
        self._gradient = OffsetGradient(overlay)
        self._overlay = overlay
        self._loaded = loaded
        self._run = run
        self._data_digest = data_digest
        self._kept = settings.kept
        self._numbers = numbers_for(settings.round_bytes, run)
        self._portions = Portions("gradient step", say, at_once)
        self._say = say

    def steps(self, plan: Plan, model_digest: bytes, batch: Callable[[int], Batch]) -> Generator[Report, bool, Told]:
        """The local steps of a round from where an earlier life left them. batch: of a step (0-based).

        Raises TooLittleMemory where a single sequence is too much; the overlay is then as before.
        """
        now = self._begun(plan, model_digest)
        if now.progress.steps:
            self._say(f"round {plan.round}: going on after gradient step {now.progress.steps} of {steps_of(plan)}")
        before = self._overlay.coefficients

        def measure(step: int) -> tuple[float, NDArray[np.float64]]:
            drawn = batch(step)

            def attempt() -> tuple[float, NDArray[np.float64]]:
                return self._gradient.measure(self._loaded.model, drawn, self._portions.at_once)

            return self._portions.attempt(attempt, len(drawn.input_ids))

        try:
            for loss, progress in gradient_steps(self._overlay, plan, now.progress, measure):
                now = replace(now, progress=progress)
                self._kept.save(now)
                if (yield StepReport(progress.steps, steps_of(plan), loss, None)):
                    break
        finally:
            self._overlay.set_coefficients(before)
        change = told(now.to_say, self._run.scalar_format, self._numbers, longest_change(plan.step, plan.local_steps))
        self._kept.save(replace(now, told=self._read(change)), at_once=True)
        return Told(now.progress.loss_sum / now.progress.steps, b"", change)

    def _begun(self, plan: Plan, model_digest: bytes) -> RoundUnderWay:
        run = hashlib.sha256(encode(self._run)).digest()
        work = work_of(self._run, plan, model_digest, self._data_digest, self._kept.agent)
        return begun(self._kept.read(run, self._run.seeds), run, work, plan.round, self._run.seeds)

    def _read(self, change: Change) -> NDArray[np.float64]:
        """What the aggregator reads, float64 (K,)."""
        seeds, values = read_change(change, self._run.scalar_format, self._run.seeds)
        whole = np.zeros(self._run.seeds)
        whole[seeds] = values
        return whole


def numbers_for(round_bytes: int, run: Run) -> int:
    """How many of the K numbers an update may hold in a budget of `round_bytes`, 0 for no budget."""
    size = NUMBER_BYTES[run.scalar_format]
    room = round_bytes - REST_BYTES
    if not round_bytes or room >= run.seeds * size:
        return run.seeds
    return min(run.seeds, max(_FEWEST, room // (size + _SEED_BYTES)))


def told(to_say: NDArray[np.float32], form: NumberFormat, numbers: int, longest: float) -> Change:
    """The change as it travels: all of to_say (K,), or what the bytes of `numbers` of them with their seeds can hold.

    That is all K in as many bits as there is room for, which keeps more of it than the largest; those where there is
    not even a bit for each. longest: the Euclidean norm that the aggregator takes; what is longer is told in part.
    """
    values = to_say.astype(np.float64)
    if numbers >= len(values):
        return write_change(None, _within(values, longest), form)
    room = numbers * (NUMBER_BYTES[form] + _SEED_BYTES)
    bits = next((bits for bits in FEW_BITS if len(values) * bits // 8 <= room), None)
    if bits is not None:
        return _in_few_bits(_within(values, longest), bits, longest)
    seeds = np.sort(np.argsort(-np.abs(values), kind="stable")[:numbers]).astype(np.int64)
    return write_change(seeds, _within(values[seeds], longest), form)


def _within(values: NDArray[np.float64], longest: float) -> NDArray[np.float64]:
    norm = float(np.linalg.norm(values))
    return values * min(1.0, _ROUNDING_ROOM * longest / norm) if norm else values


def _in_few_bits(values: NDArray[np.float64], bits: int, longest: float) -> Change:
    change = write_few_bits(values, bits)
    while float(np.linalg.norm(read_change(change, "f32", len(values))[1].astype(np.float64))) > longest:
        change = msgspec.structs.replace(change, exponent=change.exponent - 1)  # a power of two is a coarse scale
    return change
