"""Golden vectors of payloads that are refused: each differs from a good one in one respect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from shared.messages import Message
from shared.refusals import Refusal
from shared.topics import Kind
from shared.wire import KIND_NUMBERS, encode, kind_of
from tools.vectors_wire_form import MODEL_DIGEST, NONCE, PLAN, PRESENCE, RUN, UPDATE, Scenario

R = Refusal
NAN, INFINITY = float("nan"), float("inf")
Changes = tuple[str, str, dict[str, Any], Refusal]


def refused() -> Iterator[Scenario]:
    """Scenarios whose payload is refused."""
    yield from _headers()
    yield from _structures()
    for message, changes in ((RUN, _RUN), (PLAN, _PLAN), (UPDATE, _UPDATE), (PRESENCE, _PRESENCE)):
        for name, about, fields, refusal in changes:
            kind = kind_of(message)
            yield Scenario(f"refused-{kind}-{name}", about, kind, _changed(message, fields), refusal=refusal)
    yield from _numbers()
    yield from _changes()


def frame(kind: Kind, fields: object) -> bytes:
    """A payload with any fields, unchecked."""
    return bytes((1, KIND_NUMBERS[kind])) + msgspec.msgpack.encode(fields)


def _fields(message: Message) -> dict[str, Any]:
    return dict(zip(message.__struct_fields__, msgspec.msgpack.decode(msgspec.msgpack.encode(message)), strict=True))


def _changed(message: Message, changes: dict[str, Any]) -> bytes:
    fields = _fields(message)
    assert changes.keys() <= fields.keys()
    return frame(kind_of(message), list((fields | changes).values()))


def _headers() -> Iterator[Scenario]:
    good = encode(UPDATE)
    scenarios: tuple[tuple[str, str, bytes, Refusal], ...] = (
        ("empty", "no byte at all", b"", R.MALFORMED),
        ("version-0", "version 0", b"\x00" + good[1:], R.UNSUPPORTED_VERSION),
        ("version-2", "a newer version", b"\x02" + good[1:], R.UNSUPPORTED_VERSION),
        (
            "version-255-alone",
            "the version is looked at before the length of the header",
            b"\xff",
            R.UNSUPPORTED_VERSION,
        ),
        ("version-2-other-kind", "the version is looked at before the kind", b"\x02\x01", R.UNSUPPORTED_VERSION),
        ("header-cut", "half a header", b"\x01", R.MALFORMED),
        ("header-alone", "a header and nothing else", b"\x01\x04", R.MALFORMED),
        ("kind-run", "a run's kind number", b"\x01\x01" + good[2:], R.WRONG_KIND),
        ("kind-unknown", "a kind number that does not exist", b"\x01\x63" + good[2:], R.WRONG_KIND),
        ("json", "JSON", b'{"round": 7}', R.UNSUPPORTED_VERSION),
        ("pickle", "a pickle that would call os.system", b"\x80\x04cos\nsystem\n(S'id'\ntR.", R.UNSUPPORTED_VERSION),
        ("pickle-framed", "the same behind a good header", b"\x01\x04\x80\x04cos\nsystem\n(S'id'\ntR.", R.MALFORMED),
    )
    for name, about, payload, refusal in scenarios:
        yield Scenario(f"refused-{name}", about, "update", payload, refusal=refusal)
    limit: dict[str, Any] = {"limit_bytes": len(good) - 1}
    yield Scenario("refused-oversized", "one byte too long", "update", good, refusal=R.OVERSIZED, context=limit)
    junk = b"\xff" * len(good)
    about = "the length is looked at before anything else"
    yield Scenario("refused-oversized-junk", about, "update", junk, refusal=R.OVERSIZED, context=limit)
    yield Scenario("refused-oversized-receipt", "a kind's own limit", "receipt", bytes(4097), refusal=R.OVERSIZED)


def _structures() -> Iterator[Scenario]:
    good = encode(UPDATE)
    fields = list(_fields(UPDATE).values())
    start = b"\x01\x04\x98\x07\xcd\x03\x2c"
    scenarios: tuple[tuple[str, str, bytes], ...] = (
        ("cut", "the last byte is missing", good[:-1]),
        ("trailing", "a byte after the array", good + b"\x00"),
        ("trailing-array", "a second array", good + b"\x90"),
        ("field-missing", "seven fields", frame("update", fields[:-1])),
        ("field-extra", "nine fields", frame("update", [*fields, None])),
        ("map", "a map in place of the array", frame("update", _fields(UPDATE))),
        ("not-an-array", "an integer in place of the array", b"\x01\x04\x07"),
        ("array-lies", "an array header that promises 2^32 - 1 fields", b"\x01\x04\xdd\xff\xff\xff\xff" + good[3:]),
        ("bytes-lie", "a bytes header that promises 4 GB", good[: -len(UPDATE.scalars) - 3] + b"\xc6\xff\xff\xff\xff"),
        ("float-for-integer", "round 7.0", frame("update", [7.0, *fields[1:]])),
        ("bool-for-integer", "round true", frame("update", [True, *fields[1:]])),
        ("text-for-integer", 'round "7"', frame("update", ["7", *fields[1:]])),
        ("nil-for-float", "no training loss", frame("update", [*fields[:2], None, *fields[3:]])),
        ("bool-for-float", "training loss false", frame("update", [*fields[:2], False, *fields[3:]])),
        ("text-for-bytes", "a digest as text", frame("update", [*fields[:5], "a" * 16, *fields[6:]])),
        ("ext", "an ext type in place of an integer", b"\x01\x04\x98\xd4\x01\x06" + good[4:]),
        ("reserved", "the byte 0xC1, which MessagePack never uses", b"\x01\x04\x98\xc1" + good[4:]),
        ("deep", "a thousand arrays inside each other", start + b"\x91" * 1000 + b"\x00"),
    )
    for name, about, payload in scenarios:
        yield Scenario(f"refused-{name}", about, "update", payload, refusal=R.MALFORMED)
    bad_text = b"\x01\x05\x93\x07\x00\xa2\xc3\x28"
    yield Scenario("refused-not-utf-8", "text that is no UTF-8", "receipt", bad_text, refusal=R.MALFORMED)
    surrogate = b"\x01\x05\x93\x07\x00\xa3\xed\xa0\x80"
    yield Scenario("refused-surrogate", "text with a surrogate", "receipt", surrogate, refusal=R.MALFORMED)
    bytes_text = b"\x01\x05\x93\x07\x00\xc4\x00"
    yield Scenario("refused-bytes-for-text", "bytes where text stands", "receipt", bytes_text, refusal=R.MALFORMED)
    for name, about, fields_of_receipt in (
        ("unknown-code", "a code that is not in the table", [7, 99, ""]),
        ("negative-code", "a negative code", [7, -1, ""]),
        ("long-detail", "513 characters", [7, 10, "x" * 513]),
    ):
        payload = frame("receipt", fields_of_receipt)
        yield Scenario(f"refused-receipt-{name}", about, "receipt", payload, refusal=R.MALFORMED)


_RUN: tuple[Changes, ...] = (
    ("id-upper-case", "an id in upper case", {"run": "First"}, R.MALFORMED),
    ("id-wildcard", "an id that would be a wildcard", {"run": "a/+"}, R.MALFORMED),
    ("id-hyphen", "an id that ends with a hyphen", {"run": "a-"}, R.MALFORMED),
    ("id-line-end", "an id with a line end after it", {"run": "a\n"}, R.MALFORMED),
    ("id-long", "an id of 65 characters", {"run": "a" * 65}, R.MALFORMED),
    ("dtype", "a dtype that does not exist", {"dtype": "int8"}, R.MALFORMED),
    ("directions", "directions that do not exist", {"directions": "uniform"}, R.MALFORMED),
    ("seeds-4095", "K is no power of two", {"seeds": 4095}, R.MALFORMED),
    ("seeds-128", "K is too small", {"seeds": 128}, R.MALFORMED),
    ("seeds-131072", "K is too large", {"seeds": 131072}, R.MALFORMED),
    ("seeds-negative", "K is negative", {"seeds": -4096}, R.MALFORMED),
    ("pool-key-negative", "a negative key", {"pool_key": -1}, R.MALFORMED),
    ("manifest-empty", "no manifest", {"manifest": b""}, R.MALFORMED),
    ("digest-short", "a digest of 31 bytes", {"base_digest": bytes(31)}, R.MALFORMED),
)
_PLAN: tuple[Changes, ...] = (
    ("round-too-large", "round 2^32 - 1 has no next version", {"round": 2**32 - 1}, R.MALFORMED),
    ("phase", "a phase that does not exist", {"phase": "closed"}, R.MALFORMED),
    ("nonce-short", "a nonce of 15 bytes", {"nonce": NONCE[1:]}, R.MALFORMED),
    ("no-steps", "0 local steps", {"local_steps": 0}, R.MALFORMED),
    ("steps", "16385 local steps", {"local_steps": 16385}, R.MALFORMED),
    ("one-sided-one", "a group of one has no mean to differ from", {"one_sided": 1}, R.MALFORMED),
    ("one-sided-65", "a group of 65", {"one_sided": 65, "local_steps": 650}, R.MALFORMED),
    ("one-sided-negative", "a group of -8", {"one_sided": -8}, R.MALFORMED),
    ("one-sided-rest", "200 steps in groups of 16", {"one_sided": 16}, R.MALFORMED),
    ("batch", "a batch of 4097", {"batch_size": 4097}, R.MALFORMED),
    ("eps-nan", "eps is NaN", {"eps": NAN}, R.NON_FINITE),
    ("eps-zero", "eps is 0", {"eps": 0.0}, R.MALFORMED),
    ("eps-negative", "eps is negative", {"eps": -1e-3}, R.MALFORMED),
    ("eps-vanishes", "eps that is 0 as f32", {"eps": 1e-50}, R.MALFORMED),
    ("finite-first", "NaN is found before a wrong round", {"round": 2**32, "eps": NAN}, R.NON_FINITE),
    ("lr-infinite", "lr is infinite", {"step": ["plain", INFINITY]}, R.NON_FINITE),
    ("lr-zero", "lr is 0", {"step": ["plain", 0.0]}, R.MALFORMED),
    ("lr-large", "lr above 1", {"step": ["plain", 1.5]}, R.MALFORMED),
    ("step-unknown", "a step rule that does not exist", {"step": ["adam", 1e-3]}, R.MALFORMED),
    ("step-without-name", "a step rule without its name", {"step": []}, R.MALFORMED),
    ("step-extra", "a plain step with two fields", {"step": ["plain", 1e-3, 1e-3]}, R.MALFORMED),
    ("step-rms-zero", "a step of nothing", {"step": ["normalised", 0.0, 3.0, 0.99, 0.0, 0]}, R.MALFORMED),
    ("clip-negative", "a negative clip", {"step": ["normalised", 1e-3, -3.0, 0.99, 0.0, 0]}, R.MALFORMED),
    ("decay-one", "a mean that never moves", {"step": ["normalised", 1e-3, 3.0, 1.0, 0.0, 0]}, R.MALFORMED),
    ("prior-infinite", "an infinite prior", {"step": ["normalised", 1e-3, 3.0, 0.9, INFINITY, 5]}, R.NON_FINITE),
    ("prior-negative", "a negative square", {"step": ["normalised", 1e-3, 3.0, 0.9, -1.0, 5]}, R.MALFORMED),
    ("prior-of-nothing", "a mean over no step", {"step": ["normalised", 1e-3, 3.0, 0.9, 1.0, 0]}, R.MALFORMED),
    ("below", "a threshold above 2^32", {"participation": ["threshold", 2**32 + 1]}, R.MALFORMED),
    ("listed-id", "a device id that is none", {"participation": ["listed", ["ok", "#"]]}, R.MALFORMED),
    ("listed-many", "1025 devices", {"participation": ["listed", ["a"] * 1025]}, R.MALFORMED),
    ("levels-255", "255 levels", {"levels": bytes(255)}, R.MALFORMED),
    ("levels-none", "levels that are empty, not absent", {"levels": b""}, R.MALFORMED),
    ("time", "a time that a double cannot hold", {"published_at_ms": 2**53}, R.MALFORMED),
    ("deadline-zero", "no time at all", {"deadline_s": 0.0}, R.MALFORMED),
    ("deadline-infinite", "all the time there is", {"deadline_s": INFINITY}, R.NON_FINITE),
    ("reason-long", "a reason of 513 characters", {"reason": "x" * 513}, R.MALFORMED),
    ("change-half-seed", "a seed and a half", {"change": [b"\1\0\2", 0, bytes(6)]}, R.MALFORMED),
    ("change-exponent", "an exponent of 128", {"change": [b"", 128, b""]}, R.MALFORMED),
    ("change-exponent-low", "an exponent of -161", {"change": [b"", -161, b""]}, R.MALFORMED),
    ("change-long", "more values than any pool", {"change": [None, 0, bytes(4 * 65536 + 1)]}, R.MALFORMED),
    ("change-fields", "a change of two fields", {"change": [None, 0]}, R.MALFORMED),
    ("change-map", "a change as a map", {"change": {"seeds": None, "exponent": 0, "values": b""}}, R.MALFORMED),
)
_UPDATE: tuple[Changes, ...] = (
    ("round-negative", "a negative round", {"round": -1}, R.MALFORMED),
    ("round-too-large", "a round that cannot be", {"round": 2**32 - 1}, R.MALFORMED),
    ("weightless", "no samples", {"samples": 0}, R.WEIGHT_OUT_OF_RANGE),
    ("heavy", "2^32 samples", {"samples": 2**32}, R.WEIGHT_OUT_OF_RANGE),
    ("loss-nan", "training loss NaN", {"train_loss": NAN}, R.NON_FINITE),
    ("loss-infinite", "held-out loss -infinity", {"held_out_loss": -INFINITY}, R.NON_FINITE),
    ("accuracy", "accuracy 1.5", {"held_out_accuracy": 1.5}, R.MALFORMED),
    ("accuracy-nan", "accuracy NaN", {"held_out_accuracy": NAN}, R.NON_FINITE),
    ("digest", "a digest of 32 bytes", {"model_digest": MODEL_DIGEST * 2}, R.MALFORMED),
    ("no-scalars", "no scalar", {"scalars": b""}, R.SCALAR_COUNT),
    ("long-scalars", "more scalars than any round has steps", {"scalars": bytes(65537)}, R.MALFORMED),
    ("both", "scalars and a change", {"change": [b"", 0, b""]}, R.MALFORMED),
)
_PRESENCE: tuple[Changes, ...] = (
    ("integer-for-bool", "online 1", {"online": 1}, R.MALFORMED),
    ("session-negative", "a negative session", {"session": -1}, R.MALFORMED),
    ("version-0", "protocol version 0", {"protocol_min": 0}, R.MALFORMED),
    ("versions-crossed", "newest below oldest", {"protocol_min": 3, "protocol_max": 2}, R.MALFORMED),
    ("version-256", "a version that no header can name", {"protocol_max": 256}, R.MALFORMED),
    ("note-long", "a note of 257 characters", {"note": "x" * 257}, R.MALFORMED),
)


def _f32(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


def _f16(*values: float) -> bytes:
    return np.array(values, dtype="<f2").tobytes()


def _u16(*values: int) -> bytes:
    return np.array(values, dtype="<u2").tobytes()


def _numbers() -> Iterator[Scenario]:
    """What bytes fields hold, with the run's K, format and local steps known."""
    pool: dict[str, Any] = {"seeds": 256}
    full = _f32(*([0.5] * 255))
    half: dict[str, Any] = {"scalar_format": "f16", "local_steps": 2}
    single: dict[str, Any] = {"scalar_format": "f32", "local_steps": 2}
    eighth: dict[str, Any] = {"scalar_format": "f8", "local_steps": 2}
    scenarios: tuple[tuple[str, str, Kind, list[Any], dict[str, Any], Refusal], ...] = (
        ("snapshot-count", "512 coefficients where K is 256", "snapshot", [1, bytes(2048)], pool, R.COEFFICIENT_COUNT),
        ("snapshot-odd", "a byte too many", "snapshot", [1, bytes(1025)], pool, R.MALFORMED),
        ("snapshot-nan", "a coefficient is NaN", "snapshot", [1, full + _f32(NAN)], pool, R.NON_FINITE),
        ("snapshot-infinite", "one is infinite", "snapshot", [1, full + _f32(-INFINITY)], pool, R.NON_FINITE),
    )
    for name, about, kind, fields, context, refusal in scenarios:
        yield Scenario(f"refused-{name}", about, kind, frame(kind, fields), refusal=refusal, context=context)
    for name, about, scalars, context, refusal in (
        ("f16-nan", "a scalar is NaN", _f16(1.0, NAN), half, R.NON_FINITE),
        ("f16-infinite", "a scalar is infinite", _f16(INFINITY, 1.0), half, R.NON_FINITE),
        ("f32-nan", "an f32 scalar is NaN", _f32(1.0, NAN), single, R.NON_FINITE),
        ("f32-half", "one and a half f32 scalars", bytes(6), single, R.MALFORMED),
        ("f16-half", "one and a half f16 scalars", bytes(3), half, R.MALFORMED),
        ("f8-infinite", "an f8 scalar is infinite", b"\x3c\x7c", eighth, R.NON_FINITE),
        ("f8-nan", "an f8 scalar is NaN", b"\x3c\xff", eighth, R.NON_FINITE),
        ("too-many", "three scalars for two steps", _f16(1.0, 2.0, 3.0), half, R.SCALAR_COUNT),
        ("too-many-nan", "their number is looked at first", _f16(1.0, 2.0, NAN), half, R.SCALAR_COUNT),
    ):
        payload = _changed(UPDATE, {"scalars": scalars})
        yield Scenario(f"refused-update-{name}", about, "update", payload, refusal=refusal, context=context)


def _changes() -> Iterator[Scenario]:
    """What a change holds, with the run's K and format known, in a plan and in an update."""
    two = _f32(1.0, 2.0)
    scenarios: tuple[tuple[str, str, list[Any], str, Refusal], ...] = (
        ("outside", "seed 256 of 256", [_u16(3, 256), 0, two], "f32", R.SEED_OUTSIDE_POOL),
        ("order", "seeds in descending order", [_u16(9, 3), 0, two], "f32", R.MALFORMED),
        ("twice", "a seed twice", [_u16(9, 9), 0, two], "f32", R.MALFORMED),
        ("lengths", "two seeds, one value", [_u16(1, 2), 0, _f32(1.0)], "f32", R.COEFFICIENT_COUNT),
        ("half-value", "half a value", [_u16(1, 2), 0, bytes(3)], "f16", R.MALFORMED),
        ("nan", "a value is NaN", [_u16(1, 2), 0, _f32(1.0, NAN)], "f32", R.NON_FINITE),
        ("overflow", "a value that float32 cannot hold", [_u16(1, 2), 127, _f16(1.0, 2.0)], "f16", R.NON_FINITE),
        ("unnamed", "two values for nobody knows which seeds", [None, 0, two], "f32", R.COEFFICIENT_COUNT),
        ("nan-first", "values are read before seeds", [_u16(9, 3), 0, _f32(1.0, NAN)], "f32", R.NON_FINITE),
    )
    for name, about, fields, form, refusal in scenarios:
        plan = _changed(PLAN, {"change": fields})
        context = {"seeds": 256, "change_format": form}
        yield Scenario(f"refused-plan-change-{name}", about, "plan", plan, refusal=refusal, context=context)
        update = _changed(UPDATE, {"scalars": b"", "change": fields})
        context = {"seeds": 256, "scalar_format": form}
        yield Scenario(f"refused-update-change-{name}", about, "update", update, refusal=refusal, context=context)
    few = _changed(PLAN, {"change": [None, 0, two]})
    known = {"seeds": 256, "change_format": "f32", "known_seeds": [1, 2, 3]}
    about = "two values, three seeds that all devices drew"
    yield Scenario("refused-plan-change-drawn", about, "plan", few, refusal=R.COEFFICIENT_COUNT, context=known)
    update = _changed(UPDATE, {"scalars": b"", "change": [None, 0, two]})
    drawn = {"seeds": 256, "scalar_format": "f32", "known_seeds": [1, 2]}
    about = "what all devices drew names nothing in an update: its change has all K"
    yield Scenario("refused-update-change-drawn", about, "update", update, refusal=R.COEFFICIENT_COUNT, context=drawn)
