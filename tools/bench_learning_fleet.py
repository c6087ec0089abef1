"""A run of simulated devices in one process: the real round logic and local steps, one overlay, no network.

Every way of learning that is compared is a `RunConfig`; nothing of it is implemented again here. The devices take turns
on one overlay, each from the round's coefficients, and the aggregator's pure state machine combines their updates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from aggregator.config import RunConfig
from aggregator.events import Begin, UpdateArrived
from aggregator.rounds import step
from aggregator.schedule import Fleet
from aggregator.spec import KEY_BYTES, new_spec
from aggregator.state import State, coefficients_of, new_state, plan_of
from edge_client.data.batches import Batch, Tokens, batch_for_step, collate
from edge_client.data.task import Task
from edge_client.estimator import local_steps
from edge_client.evaluate import Evaluation, evaluate
from edge_client.loss import labelled_loss
from edge_client.model import LoadedModel
from edge_client.overlay import Overlay
from shared.manifest import RunBase
from shared.messages import Plan, Update, forwards_of
from shared.ranges import MODEL_DIGEST_BYTES
from shared.wire import encode, scalars_to_bytes

_SAME_MODEL = bytes(MODEL_DIGEST_BYTES)  # one overlay: the devices cannot differ


@dataclass(frozen=True)
class Device:
    """A simulated device: its examples to learn from, and those that it holds out to judge a version by."""

    name: str
    train: tuple[Tokens, ...]
    held_out: tuple[Tokens, ...]


@dataclass(frozen=True)
class Point:
    """A version of the model on examples that no device has."""

    version: int
    forwards: float  # passes of a batch behind it, of all devices together: probes and held-out evaluations
    loss: float  # nats per token
    accuracy: float | None
    step: float  # of the plan that comes next: step_rms or lr
    seconds: float  # since the run began, without the time that went into points


@dataclass(frozen=True, eq=False)
class Bench:
    """A model under an overlay, its data, and the examples to judge by."""

    loaded: LoadedModel
    overlay: Overlay
    task: Task
    judged: tuple[Tokens, ...]

    def score(self, rows: Sequence[Tokens]) -> Evaluation:
        """The loss and accuracy of the overlay's model on `rows`."""
        return evaluate(self.loaded.model, self.loaded.tokenizer, rows, labelled_loss, answers=self.task.answers)


def learn(
    bench: Bench, config: RunConfig, devices: Sequence[Device], key: int, forwards: float, every: float
) -> Iterator[Point]:
    """The run of `config` until `forwards` are spent; a point at the start, about each `every` forwards, at the end.

    key: makes the run's nonces, hence its seeds and batches. The overlay's own seeds and directions must be the run's.
    """
    state, spent, next_point = _begun(bench, config, key), 0.0, 0.0
    began_s, judging_s = time.perf_counter(), 0.0
    while True:
        is_over = spent >= forwards or state.progress.phase == "finished"
        if spent >= next_point or is_over:
            asked_s = time.perf_counter()
            bench.overlay.set_coefficients(coefficients_of(state.coefficients))
            found = bench.score(bench.judged)
            judging_s += time.perf_counter() - asked_s
            seconds = time.perf_counter() - began_s - judging_s
            yield Point(state.progress.round, spent, found.loss, found.accuracy, _step_of(state.fleet, config), seconds)
            next_point += every
        if is_over:
            return
        plan = plan_of(state)
        for device in devices:
            bench.overlay.set_coefficients(coefficients_of(state.coefficients))
            update, cost = _update(bench, plan, device, config)
            spent += cost
            arrived = UpdateArrived(device.name, update, encode(update), now_ms=plan.published_at_ms)
            state = step(state, arrived).state
        assert state.progress.round == plan.round + 1  # the quorum is all of them


def _begun(bench: Bench, config: RunConfig, key: int) -> State:
    overlay = bench.overlay
    base = RunBase("bench", overlay.dtype, overlay.manifest, bytes(32))
    nonce_key = key.to_bytes(KEY_BYTES, "little")
    spec = new_spec("bench", base, config, pool_key=overlay.pool_key, nonce_key=nonce_key)
    return step(new_state(spec), Begin(now_ms=1)).state


def _update(bench: Bench, plan: Plan, device: Device, config: RunConfig) -> tuple[Update, float]:
    """A device's update and the forward passes that it took, as `edge_client.trainer` works."""
    forwards, held_out = 0.0, None
    if plan.evaluate:
        held_out = bench.score(device.held_out)
        forwards += len(device.held_out) / plan.batch_size
    taken = list(
        local_steps(
            bench.overlay,
            plan,
            device.name,
            lambda number: _batch(bench, plan, device, number),
            lambda batch: float(labelled_loss(bench.loaded.model, batch)),
            config.scalar_format,
        )
    )
    update = Update(
        round=plan.round,
        samples=len(device.train),
        train_loss=math.fsum(one.loss for one in taken) / len(taken),
        held_out_loss=None if held_out is None else held_out.loss,
        held_out_accuracy=None if held_out is None else held_out.accuracy,
        model_digest=_SAME_MODEL,
        scalars=scalars_to_bytes([one.scalar for one in taken], config.scalar_format),
        change=None,
    )
    return update, forwards + forwards_of(plan)


def _batch(bench: Bench, plan: Plan, device: Device, number: int) -> Batch:
    rows = batch_for_step(device.train, nonce=plan.nonce, device=device.name, step=number, batch_size=plan.batch_size)
    return collate(rows, bench.task.padding).to(bench.loaded.device)


def _step_of(fleet: Fleet, config: RunConfig) -> float:
    return config.lr if config.step == "plain" else fleet.step_rms


def dealt(rows: Sequence[Tokens], held_out: int, devices: int, skewed: Callable[[Tokens], int] | None) -> list[Device]:
    """`rows` dealt to so many devices, each holding out `held_out` of its own. `skewed`: by class."""
    ordered = list(rows)
    if skewed is not None:  # stretches of the sorted rows: most devices have one class alone
        ordered.sort(key=skewed)
    else:
        ordered = [row for first in range(devices) for row in ordered[first::devices]]
    size = len(ordered) // devices
    parts = [tuple(ordered[number * size : (number + 1) * size]) for number in range(devices)]
    return [Device(f"device-{number:02d}", part[held_out:], part[:held_out]) for number, part in enumerate(parts)]
