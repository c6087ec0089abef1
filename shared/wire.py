"""Messages to bytes and back (PROTOCOL.md, sections "Framing" and "Messages"). No I/O.

A payload is two header bytes (protocol version, kind number) and one msgpack array. What comes off the wire is
hostile: its length is looked at first, then the header, then the structure, then each field; nothing is allocated
by a number that the peer wrote. `decode` raises PeerError alone, and `encode` raises UserError for whatever `decode`
would refuse, so a bad message never leaves this side.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shared.errors import PeerError, UserError
from shared.messages import Message, NumberFormat, Plan, Presence, Receipt, Run, Snapshot, Update
from shared.numbers import NUMBER_BYTES, numbers_from_bytes, numbers_to_bytes
from shared.ranges import MAX_LISTED_DEVICES, MAX_LOCAL_STEPS, MAX_MANIFEST_BYTES, MAX_SEEDS, check_message
from shared.refusals import Refusal
from shared.topics import Kind

PROTOCOL_VERSION = 1  # what this side writes
MIN_VERSION = 1  # the oldest this side still reads

_TYPES: dict[Kind, type[Any]] = {
    "run": Run,
    "plan": Plan,
    "snapshot": Snapshot,
    "update": Update,
    "receipt": Receipt,
    "presence": Presence,
}
KIND_NUMBERS: dict[Kind, int] = {kind: number for number, kind in enumerate(_TYPES, start=1)}
_KIND_OF = {message_type: kind for kind, message_type in _TYPES.items()}
_DECODERS = {kind: msgspec.msgpack.Decoder(message_type) for kind, message_type in _TYPES.items()}
_ENCODER = msgspec.msgpack.Encoder()

_LONGEST_DETAIL = 200  # characters: msgspec quotes the peer's strings, and a receipt's detail has a limit
_UPDATE_FIXED_BYTES = 64  # header, array, every field but the scalars: 64 at the most
_UPDATE_CHANGE_BYTES = 80  # the same for every field but what its change holds
LIMIT_BYTES: dict[Kind, int] = {
    "run": MAX_MANIFEST_BYTES + 4096,
    "plan": 5 * MAX_SEEDS + 66 * MAX_LISTED_DEVICES + 4096,  # levels, and a change no longer than a snapshot
    "snapshot": 4 * MAX_SEEDS + 64,
    "update": 4 * MAX_SEEDS + _UPDATE_CHANGE_BYTES,
    "receipt": 4096,
    "presence": 4096,
}


def encode(message: Message) -> bytes:
    """The payload of `message`.

    Raises UserError where a field has another type or value than PROTOCOL.md allows: this side's mistake.
    """
    kind = _KIND_OF[type(message)]
    try:
        payload = bytes((PROTOCOL_VERSION, KIND_NUMBERS[kind])) + _ENCODER.encode(message)
        decode(kind, payload)
    except (PeerError, TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        detail = error.detail if isinstance(error, PeerError) else str(error)
        raise UserError(f"This {kind} cannot be sent: {detail}. See PROTOCOL.md, section 'Messages'.") from error
    return payload


def decode(kind: Kind, payload: bytes, *, limit_bytes: int | None = None) -> Message:
    """The message of `kind` in `payload`.

    `limit_bytes` lowers the kind's own limit, for example to `update_limit_bytes` of the current plan.
    Raises PeerError with the refusal code of the first check that fails, in this order: OVERSIZED,
    UNSUPPORTED_VERSION, WRONG_KIND, MALFORMED (structure and types), NON_FINITE, then the range of each field.
    """
    limit = LIMIT_BYTES[kind] if limit_bytes is None else min(limit_bytes, LIMIT_BYTES[kind])
    if len(payload) > limit:
        raise PeerError(Refusal.OVERSIZED, f"{len(payload)} bytes; allowed: at most {limit}")
    _check_header(kind, payload)
    try:
        message: Message = _DECODERS[kind].decode(memoryview(payload)[2:])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise PeerError(Refusal.MALFORMED, str(error)[:_LONGEST_DETAIL]) from error
    check_message(message)
    return message


def _check_header(kind: Kind, payload: bytes) -> None:
    if not payload:
        raise PeerError(Refusal.MALFORMED, "the payload is empty")
    version = payload[0]
    if not MIN_VERSION <= version <= PROTOCOL_VERSION:
        spoken = f"{MIN_VERSION}" if MIN_VERSION == PROTOCOL_VERSION else f"{MIN_VERSION} to {PROTOCOL_VERSION}"
        raise PeerError(Refusal.UNSUPPORTED_VERSION, f"the payload has version {version}, this side speaks {spoken}")
    if len(payload) < 2:
        raise PeerError(Refusal.MALFORMED, "the payload ends inside its header")
    if payload[1] != KIND_NUMBERS[kind]:
        raise PeerError(
            Refusal.WRONG_KIND, f"kind number {payload[1]} on a {kind} topic; allowed: {KIND_NUMBERS[kind]}"
        )


def kind_of(message: Message) -> Kind:
    """The kind of `message`, as it stands in a topic."""
    return _KIND_OF[type(message)]


def update_limit_bytes(local_steps: int, run: Run) -> int:
    """The longest payload, in bytes, that an update of `run` can have in a round of `local_steps`."""
    size = NUMBER_BYTES[run.scalar_format]
    longest = _UPDATE_FIXED_BYTES + local_steps * size
    return max(longest, _UPDATE_CHANGE_BYTES + run.seeds * size) if run.first_order else longest


def scalars_to_bytes(scalars: npt.ArrayLike, scalar_format: NumberFormat) -> bytes:
    """Scalars (n,) as an update carries them, in step order: rounded to nearest even, clamped at the largest.

    A step rule that clips loses nothing by the clamp, and a finite scalar stays finite.
    Raises UserError for no scalar, NaN or infinity.
    """
    values = np.asarray(scalars, dtype=np.float32)
    if values.ndim != 1 or not 1 <= len(values) <= MAX_LOCAL_STEPS or not np.isfinite(values).all():
        raise UserError(
            f"Scalars of shape {values.shape} cannot be sent; allowed: 1 to {MAX_LOCAL_STEPS} finite numbers. "
            "Check the model for NaN and lower the step."
        )
    return numbers_to_bytes(values.astype(np.float64), scalar_format)


def scalars_from_bytes(data: bytes, scalar_format: NumberFormat) -> npt.NDArray[np.float32]:
    """Scalars (n,) of an update; n >= 1. Raises PeerError: MALFORMED, SCALAR_COUNT or NON_FINITE."""
    if not data:
        raise PeerError(Refusal.SCALAR_COUNT, "scalars is empty")
    return numbers_from_bytes(data, scalar_format, "scalar")


def coefficients_to_bytes(coefficients: npt.ArrayLike) -> bytes:
    """Coefficients (n,) as little-endian float32. Raises UserError for NaN or infinity."""
    values = np.asarray(coefficients, dtype=np.float32)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise UserError(
            f"Coefficients of shape {values.shape} cannot be sent; allowed: finite numbers in one dimension. "
            "Lower the step of the run."
        )
    return values.astype("<f4").tobytes()


def coefficients_from_bytes(data: bytes, seeds: int) -> npt.NDArray[np.float32]:
    """Coefficients (seeds,) of a snapshot with `seeds` = K.

    Raises PeerError: COEFFICIENT_COUNT or NON_FINITE.
    """
    if len(data) != 4 * seeds:
        raise PeerError(Refusal.COEFFICIENT_COUNT, f"{len(data)} bytes; allowed: {4 * seeds} for {seeds} float32")
    return numbers_from_bytes(data, "f32", "coefficient")


def seeds_to_bytes(seeds: npt.ArrayLike) -> bytes:
    """Seeds (n,) as little-endian uint16. Raises UserError unless strictly increasing in [0, 65536)."""
    values = np.asarray(seeds, dtype=np.int64)
    if values.ndim != 1 or not _is_increasing(values) or (len(values) and (values[0] < 0 or values[-1] >= MAX_SEEDS)):
        raise UserError("Seeds of a change must be strictly increasing in [0, 65536); sort them and drop doubles.")
    return values.astype("<u2").tobytes()


def seeds_from_bytes(data: bytes, seeds: int) -> npt.NDArray[np.int64]:
    """Seeds (n,) of a change of a run with K = `seeds`.

    Raises PeerError: MALFORMED (half a seed, not strictly increasing) or SEED_OUTSIDE_POOL.
    """
    if len(data) % 2:
        raise PeerError(Refusal.MALFORMED, f"{len(data)} bytes do not hold whole uint16 seeds")
    values = np.frombuffer(data, dtype="<u2").astype(np.int64)
    if not _is_increasing(values):
        raise PeerError(Refusal.MALFORMED, "seeds are not strictly increasing")
    if len(values) and values[-1] >= seeds:
        raise PeerError(Refusal.SEED_OUTSIDE_POOL, f"seed {values[-1]}; allowed: 0 to {seeds - 1}")
    return values


def _is_increasing(values: npt.NDArray[np.int64]) -> bool:
    return bool((np.diff(values) > 0).all())
