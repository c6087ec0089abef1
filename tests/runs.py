"""Small runs for the aggregator's tests: K = 256, three steps, plain rule, and devices that send what they are told."""

from __future__ import annotations

from typing import Any

import numpy as np

from aggregator.config import RunConfig
from aggregator.events import (
    Begin,
    Event,
    KeepProgress,
    KeepUpdate,
    KeepVersion,
    Note,
    Publish,
    SendReceipt,
    UpdateArrived,
)
from aggregator.reports import RoundReport
from aggregator.rounds import Transition, step
from aggregator.spec import Spec, new_spec
from aggregator.state import State, new_state
from aggregator.store import Store
from shared.manifest import Manifest, RunBase, Tensor
from shared.messages import Update
from shared.refusals import Refusal
from shared.wire import encode, scalars_to_bytes

BASE = RunBase("tiny/model", "bf16", Manifest((Tensor("w", (16, 32)),)), bytes(range(32)))
START_MS = 1_700_000_000_000
DEADLINE_MS = START_MS + 60_000
FLEET_MODEL, OTHER_MODEL, THIRD_MODEL = b"m" * 16, b"o" * 16, b"t" * 16


def spec_of(**settings: Any) -> Spec:
    """A run of 4 rounds that closes at 2 updates, numbers in f32; `settings` change it."""
    small = {"seeds": 256, "local_steps": 3, "rounds": 4, "deadline_s": 60.0, "step": "plain", "lr": 0.5}
    small |= {"scalar_format": "f32", "change_format": "f32"}
    return new_spec("night", BASE, RunConfig(**{**small, **settings}), pool_key=7, nonce_key=bytes(32))


def update_of(round_number: int = 0, **fields: Any) -> Update:
    """An update of three scalars 1, 2, 3."""
    usual: dict[str, Any] = {
        "round": round_number,
        "samples": 10,
        "train_loss": 2.0,
        "held_out_loss": 3.0,
        "held_out_accuracy": None,
        "model_digest": FLEET_MODEL,
        "scalars": scalars_to_bytes(np.array([1, 2, 3], np.float32), "f32"),
        "change": None,
    }
    return Update(**{**usual, **fields})


def arrival(device: str, update: Update, now_ms: int = START_MS + 1000) -> UpdateArrived:
    """The event of its arrival."""
    return UpdateArrived(device, update, encode(update), now_ms)


def opened(**settings: Any) -> State:
    """A run in round 0, just begun."""
    return step(new_state(spec_of(**settings)), Begin(START_MS)).state


def after(state: State, *events: Any) -> Transition:
    """All events in order; the state after the last, and the actions of all."""
    actions: list[Any] = []
    for event in events:
        state, more = step(state, event)
        actions += more
    return Transition(state, tuple(actions))


def played(store: Store, state: State, *events: Event) -> State:
    """Step and commit, as the service does."""
    for event in events:
        state, actions = step(state, event)
        keeps = [a for a in actions if isinstance(a, (KeepUpdate, KeepVersion, KeepProgress, Note))]
        store.commit(state.spec.name, keeps, START_MS)
    return state


def closed_round() -> Transition:
    """A run in round 1: two equal updates have closed round 0."""
    return after(opened(), arrival("a", update_of()), arrival("b", update_of()))


def receipts(actions: Any) -> list[tuple[str, Refusal]]:
    """Who was answered, and with which code."""
    return [(a.device, Refusal(a.receipt.code)) for a in actions if isinstance(a, SendReceipt)]


def published(actions: Any, kind: type) -> Any:
    """The one message of its kind that went out."""
    (message,) = [a.message for a in actions if isinstance(a, Publish) and isinstance(a.message, kind)]
    return message


def report_in(actions: Any) -> RoundReport:
    """What is kept about the one round that was closed."""
    (keep,) = [a for a in actions if isinstance(a, KeepVersion)]
    return keep.report


def notes(actions: Any) -> str:
    """What the operator is told, a line each."""
    return "\n".join(a.text for a in actions if isinstance(a, Note))
