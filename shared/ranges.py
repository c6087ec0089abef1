"""What each field may be, past its type (PROTOCOL.md, section "Messages"). Pure checks, no I/O.

Checks run in the order of the specification: every float finite first, then the fields in message order, so that
two implementations refuse the same payload with the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from shared.errors import PeerError
from shared.messages import (
    Change,
    Listed,
    Message,
    NormalisedStep,
    Participation,
    PlainStep,
    Plan,
    Presence,
    Receipt,
    Run,
    Snapshot,
    StepRule,
    Threshold,
    Update,
)
from shared.refusals import Refusal
from shared.topics import is_id

MIN_SEEDS, MAX_SEEDS = 256, 65_536
MAX_U8, MAX_U32, MAX_U64 = 2**8 - 1, 2**32 - 1, 2**64 - 1
MAX_LOCAL_STEPS = 16_384
MIN_GROUP, MAX_GROUP = 2, 64  # directions that share a batch, where they are measured on one side
MAX_BATCH_SIZE = 4_096
MAX_LISTED_DEVICES = 1_024
MAX_MANIFEST_BYTES = 1_048_576  # compressed
MAX_DEADLINE_S = 31_536_000.0  # 365 days
MAX_TIME_MS = 2**53 - 1  # exact in a double, so that any language can hold it
MIN_EPS, MAX_EPS = 1e-30, 1.0
MAX_LR = 1.0  # so that a finite scalar always gives a finite delta: nobody can stop a round with one
MAX_STEP = 1e6  # of step_rms and clip; their product is far below float32's largest
NONCE_BYTES, DIGEST_BYTES, MODEL_DIGEST_BYTES = 16, 32, 16
MIN_EXPONENT, MAX_EXPONENT = -160, 127  # powers of two: float32 from its smallest number to its largest
MAX_NAME, MAX_REASON, MAX_DETAIL, MAX_NOTE = 256, 512, 512, 256  # Unicode code points


def check_message(message: Message) -> None:
    """Raise PeerError where a field of `message` is outside what PROTOCOL.md allows."""
    for name, value in _floats(message):
        if not math.isfinite(value):
            raise PeerError(Refusal.NON_FINITE, f"{name} is {value}")
    if isinstance(message, Run):
        _check_run(message)
    elif isinstance(message, Plan):
        _check_plan(message)
    elif isinstance(message, Snapshot):
        _check_snapshot(message)
    elif isinstance(message, Update):
        _check_update(message)
    elif isinstance(message, Receipt):
        _check_receipt(message)
    else:
        _check_presence(message)


def is_seed_count(value: int) -> bool:
    """True where `value` may be K: a power of two from 256 to 65536."""
    return MIN_SEEDS <= value <= MAX_SEEDS and value & (value - 1) == 0


def is_group(one_sided: int, local_steps: int) -> bool:
    """True where `local_steps` may be measured on one side in groups of `one_sided`, or on both (0)."""
    return one_sided == 0 or (MIN_GROUP <= one_sided <= MAX_GROUP and local_steps % one_sided == 0)


def _floats(message: msgspec.Struct) -> Iterator[tuple[str, float]]:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, float):
            yield name, value
        elif isinstance(value, msgspec.Struct):
            yield from _floats(value)


def _refuse(name: str, value: object, allowed: str) -> PeerError:
    return PeerError(Refusal.MALFORMED, f"{name} is {value!r}; allowed: {allowed}")


def _integer(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _refuse(name, value, f"{low} to {high}")


def _positive(name: str, value: float, high: float) -> None:
    if not 0.0 < value <= high:
        raise _refuse(name, value, f"above 0, at most {high:g}")


def _length(name: str, value: bytes, wanted: int) -> None:
    if len(value) != wanted:
        raise PeerError(Refusal.MALFORMED, f"{name} has {len(value)} bytes; allowed: {wanted}")


def _text(name: str, value: str, longest: int) -> None:
    if len(value) > longest:
        raise PeerError(Refusal.MALFORMED, f"{name} has {len(value)} characters; allowed: at most {longest}")


def _id(name: str, value: str) -> None:
    if not is_id(value):
        raise _refuse(name, value[:80], "an id of 1 to 64 characters of a-z, 0-9 and inner '-'")


def _check_run(run: Run) -> None:
    _id("run", run.run)
    _text("model", run.model, MAX_NAME)
    if not is_seed_count(run.seeds):
        raise _refuse("seeds", run.seeds, f"a power of two from {MIN_SEEDS} to {MAX_SEEDS}")
    _integer("pool_key", run.pool_key, 0, MAX_U64)
    if not 1 <= len(run.manifest) <= MAX_MANIFEST_BYTES:
        raise _refuse("length of manifest", len(run.manifest), f"1 to {MAX_MANIFEST_BYTES}")
    _length("manifest_digest", run.manifest_digest, DIGEST_BYTES)
    _length("base_digest", run.base_digest, DIGEST_BYTES)


def _check_plan(plan: Plan) -> None:
    _integer("round", plan.round, 0, MAX_U32 - 1)
    _length("nonce", plan.nonce, NONCE_BYTES)
    _integer("local_steps", plan.local_steps, 1, MAX_LOCAL_STEPS)
    if not is_group(plan.one_sided, plan.local_steps):
        allowed = f"0, or {MIN_GROUP} to {MAX_GROUP} and a divisor of local_steps, {plan.local_steps}"
        raise _refuse("one_sided", plan.one_sided, allowed)
    _integer("batch_size", plan.batch_size, 1, MAX_BATCH_SIZE)
    if not MIN_EPS <= plan.eps <= MAX_EPS:
        raise _refuse("eps", plan.eps, f"{MIN_EPS:g} to {MAX_EPS:g}")
    _check_step(plan.step)
    _check_participation(plan.participation)
    if plan.levels is not None and not is_seed_count(len(plan.levels)):
        raise _refuse("length of levels", len(plan.levels), f"a power of two from {MIN_SEEDS} to {MAX_SEEDS}")
    _integer("published_at_ms", plan.published_at_ms, 0, MAX_TIME_MS)
    _positive("deadline_s", plan.deadline_s, MAX_DEADLINE_S)
    _text("reason", plan.reason, MAX_REASON)
    if plan.change is not None:
        _check_change(plan.change)


def _check_step(step: StepRule) -> None:
    if isinstance(step, PlainStep):
        _positive("step.lr", step.lr, MAX_LR)
        return
    _check_normalised(step)


def _check_normalised(step: NormalisedStep) -> None:
    _positive("step.step_rms", step.step_rms, MAX_STEP)
    _positive("step.clip", step.clip, MAX_STEP)
    if not 0.0 <= step.decay < 1.0:
        raise _refuse("step.decay", step.decay, "0 or more, below 1")
    if step.prior_mean_square < 0.0:
        raise _refuse("step.prior_mean_square", step.prior_mean_square, "0 or more")
    _integer("step.prior_count", step.prior_count, 0, MAX_U32)
    if step.prior_count == 0 and step.prior_mean_square != 0.0:
        raise _refuse("step.prior_mean_square", step.prior_mean_square, "0 where step.prior_count is 0")


def _check_participation(participation: Participation) -> None:
    if isinstance(participation, Threshold):
        _integer("participation.below", participation.below, 0, 2**32)
    elif isinstance(participation, Listed):
        if len(participation.devices) > MAX_LISTED_DEVICES:
            raise _refuse("length of participation.devices", len(participation.devices), f"0 to {MAX_LISTED_DEVICES}")
        for device in participation.devices:
            _id("participation.devices", device)


def _check_snapshot(snapshot: Snapshot) -> None:
    _integer("version", snapshot.version, 0, MAX_U32)
    if len(snapshot.coefficients) % 4 or not is_seed_count(len(snapshot.coefficients) // 4):
        raise _refuse("length of coefficients", len(snapshot.coefficients), "4 K, K a power of two from 256 to 65536")


def _check_change(change: Change) -> None:
    if change.seeds is not None and (len(change.seeds) % 2 or len(change.seeds) > 2 * MAX_SEEDS):
        raise _refuse("length of change.seeds", len(change.seeds), f"an even number up to {2 * MAX_SEEDS}")
    _integer("change.exponent", change.exponent, MIN_EXPONENT, MAX_EXPONENT)
    if len(change.values) > 4 * MAX_SEEDS:
        raise _refuse("length of change.values", len(change.values), f"at most {4 * MAX_SEEDS}")


def _check_update(update: Update) -> None:
    _integer("round", update.round, 0, MAX_U32 - 1)
    if not 1 <= update.samples <= MAX_U32:
        raise PeerError(Refusal.WEIGHT_OUT_OF_RANGE, f"samples is {update.samples}; allowed: 1 to {MAX_U32}")
    if update.held_out_accuracy is not None and not 0.0 <= update.held_out_accuracy <= 1.0:
        raise _refuse("held_out_accuracy", update.held_out_accuracy, "0 to 1")
    _length("model_digest", update.model_digest, MODEL_DIGEST_BYTES)
    if update.change is not None:
        _check_change(update.change)
        if update.scalars:
            raise _refuse("length of scalars", len(update.scalars), "0 beside a change")
    elif not update.scalars:
        raise PeerError(Refusal.SCALAR_COUNT, "scalars is empty")
    if len(update.scalars) > 4 * MAX_LOCAL_STEPS:
        raise _refuse("length of scalars", len(update.scalars), f"at most {4 * MAX_LOCAL_STEPS}")


def _check_receipt(receipt: Receipt) -> None:
    _integer("round", receipt.round, 0, MAX_U32)
    if receipt.code not in Refusal.__members__.values():
        raise _refuse("code", receipt.code, "a code of PROTOCOL.md's table")
    _text("detail", receipt.detail, MAX_DETAIL)


def _check_presence(presence: Presence) -> None:
    _integer("session", presence.session, 0, MAX_U64)
    _integer("protocol_min", presence.protocol_min, 1, MAX_U8)
    _integer("protocol_max", presence.protocol_max, presence.protocol_min, MAX_U8)
    _text("agent", presence.agent, MAX_NAME)
    _text("note", presence.note, MAX_NOTE)
