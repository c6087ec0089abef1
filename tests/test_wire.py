from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shared import ranges
from shared.errors import PeerError, UserError
from shared.messages import (
    Change,
    Everyone,
    Listed,
    NormalisedStep,
    PlainStep,
    Plan,
    Presence,
    Receipt,
    Run,
    Snapshot,
    Update,
)
from shared.refusals import Refusal
from shared.topics import KINDS
from shared.wire import (
    LIMIT_BYTES,
    MIN_VERSION,
    PROTOCOL_VERSION,
    decode,
    encode,
    kind_of,
    update_limit_bytes,
)

VECTORS = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted((Path(__file__).parents[1] / "shared" / "vectors" / "wire").glob("*.json"))
}
ACCEPTED = [name for name, vector in VECTORS.items() if "message" in vector["expect"]]
TAIL = b"\xc4\x02\x00\x3e"  # of an update
UPDATE = Update(7, 812, 2.5, None, None, bytes(16), b"\x00\x3e", None)
PLAN = Plan(
    round=7,
    phase="open",
    nonce=bytes(16),
    local_steps=200,
    one_sided=0,
    batch_size=8,
    eps=1e-3,
    step=PlainStep(3e-7),
    participation=Everyone(),
    common_seeds=False,
    levels=None,
    evaluate=False,
    published_at_ms=0,
    deadline_s=60.0,
    reason="",
    change=None,
)
RUN = Run("r", "m", "bf16", "hadamard", 256, 1, b"x", bytes(32), bytes(32), "f16", "f8", True)


def assert_both_ways(message, payload):
    assert encode(message) == payload
    assert decode(kind_of(message), payload) == message


def refusal_of(kind, payload, **options):
    with pytest.raises(PeerError) as error:
        decode(kind, payload, **options)
    return error.value.refusal


# Golden bytes.


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (Receipt(7, 0, ""), b"\x01\x05\x93\x07\x00\xa0"),
        (Receipt(300, 21, "old"), b"\x01\x05\x93\xcd\x01\x2c\x15\xa3old"),
        (
            Presence(True, 2**64 - 1, 1, 2, "k", ""),
            b"\x01\x06\x96\xc3\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x01\x02\xa1k\xa0",
        ),
        (
            UPDATE,
            b"\x01\x04\x98\x07\xcd\x03\x2c\xcb\x40\x04\0\0\0\0\0\0\xc0\xc0\xc4\x10"
            + bytes(16)
            + b"\xc4\x02\x00\x3e\xc0",
        ),
        (
            msgspec.structs.replace(UPDATE, scalars=b"", change=Change(b"\x05\x00", -24, b"\x00\x3e")),
            b"\x01\x04\x98\x07\xcd\x03\x2c\xcb\x40\x04\0\0\0\0\0\0\xc0\xc0\xc4\x10"
            + bytes(16)
            + b"\xc4\x00\x93\xc4\x02\x05\x00\xe8\xc4\x02\x00\x3e",
        ),
    ],
)
def test_message_has_these_bytes_and_no_others(message, payload):
    assert_both_ways(message, payload)


@pytest.mark.parametrize("name", ACCEPTED)
def test_golden_payload_is_what_its_message_encodes_to(name):
    vector = VECTORS[name]
    payload = bytes.fromhex(vector["payload_hex"])
    message = decode(vector["kind"], payload)
    if vector.get("canonical", True):
        assert_both_ways(message, payload)
    else:
        assert encode(message) != payload
        assert decode(vector["kind"], encode(message)) == message


@pytest.mark.parametrize("name", ACCEPTED)
def test_golden_payload_cut_anywhere_is_malformed(name):
    payload = bytes.fromhex(VECTORS[name]["payload_hex"])
    for length in range(len(payload)):
        assert refusal_of(VECTORS[name]["kind"], payload[:length]) is Refusal.MALFORMED


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("tail", [b"\x00", b"\xc0", b"\x90", b"\xc1"])
def test_golden_payload_with_trailing_bytes_is_malformed(name, tail):
    payload = bytes.fromhex(VECTORS[name]["payload_hex"]) + tail
    assert refusal_of(VECTORS[name]["kind"], payload) is Refusal.MALFORMED


@pytest.mark.parametrize("name", ACCEPTED)
def test_golden_payload_on_any_other_topic_is_of_the_wrong_kind(name):
    payload = bytes.fromhex(VECTORS[name]["payload_hex"])
    for kind in set(KINDS) - {VECTORS[name]["kind"]}:
        assert refusal_of(kind, payload, limit_bytes=len(payload)) in (Refusal.WRONG_KIND, Refusal.OVERSIZED)


# The order of checks.


def test_length_is_looked_at_before_anything_else():
    assert refusal_of("update", b"\xff" * 10, limit_bytes=9) is Refusal.OVERSIZED
    assert refusal_of("update", b"", limit_bytes=0) is Refusal.MALFORMED


def test_a_limit_can_only_lower_the_kinds_own():
    too_long = bytes(LIMIT_BYTES["receipt"] + 1)
    assert refusal_of("receipt", too_long, limit_bytes=10**9) is Refusal.OVERSIZED


def test_unknown_version_is_refused_naming_both_versions():
    assert (MIN_VERSION, PROTOCOL_VERSION) == (1, 1)
    with pytest.raises(PeerError) as error:
        decode("plan", b"\x02\x09junk")
    assert error.value.refusal is Refusal.UNSUPPORTED_VERSION
    assert error.value.detail == "the payload has version 2, this side speaks 1"


def test_wrong_kind_names_what_came_and_what_is_allowed():
    with pytest.raises(PeerError, match=r"kind number 5 on a plan topic; allowed: 2"):
        decode("plan", encode(Receipt(1, 0, "")))


def test_nothing_is_allocated_by_a_number_off_the_wire():
    lies = [
        b"\x01\x04\xdd\xff\xff\xff\xff",
        b"\x01\x03\x92\x01\xc6\xff\xff\xff\xff",
        b"\x01\x05\x93\x01\x00\xdb\xff\xff\xff\xff",
        encode(PLAN)[:-31].replace(b"\x91\xa8everyone", b"\x92\xa6listed\xdd\xff\xff\xff\xff"),
    ]
    tracemalloc.start()
    for kind, payload in zip(("update", "snapshot", "receipt", "plan"), lies, strict=True):
        assert refusal_of(kind, payload) is Refusal.MALFORMED
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_a_pickle_is_never_loaded():
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was loaded",))

    for payload in (pickle.dumps(Bomb()), b"\x01\x04" + pickle.dumps(Bomb())):
        assert refusal_of("update", payload) in (Refusal.UNSUPPORTED_VERSION, Refusal.MALFORMED)


@pytest.mark.parametrize("name", [name for name in VECTORS if name not in ACCEPTED])
def test_every_refusal_fits_into_a_receipt(name):
    vector = VECTORS[name]
    try:
        decode(vector["kind"], bytes.fromhex(vector["payload_hex"]))
    except PeerError as error:
        encode(Receipt(0, error.refusal, error.detail))


def test_a_refusal_does_not_quote_the_peer_at_length():
    fields = msgspec.msgpack.decode(encode(PLAN)[2:])
    for at, value in ((1, "x" * 60_000), (6, ["y" * 60_000]), (7, ["listed", ["z" * 60_000]])):
        payload = b"\x01\x02" + msgspec.msgpack.encode([*fields[:at], value, *fields[at + 1 :]])
        with pytest.raises(PeerError) as error:
            decode("plan", payload)
        assert len(error.value.detail) <= 300
        encode(Receipt(0, error.value.refusal, error.value.detail))


# Local misuse.


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (msgspec.structs.replace(PLAN, eps=0.0), "This plan cannot be sent: eps is 0.0; allowed: 1e-30 to 1."),
        (msgspec.structs.replace(PLAN, eps=float("nan")), "This plan cannot be sent: eps is nan."),
        (msgspec.structs.replace(PLAN, levels=bytes(300)), "length of levels is 300"),
        (msgspec.structs.replace(PLAN, participation=Listed(("A",))), "participation.devices is 'A'"),
        (msgspec.structs.replace(RUN, seeds=300), "seeds is 300; allowed: a power of two from 256 to 65536"),
        (msgspec.structs.replace(RUN, pool_key=2**64), "can't serialize ints"),
        (msgspec.structs.replace(RUN, dtype="int8"), "Invalid enum value 'int8'"),
        (msgspec.structs.replace(UPDATE, samples=0), "samples is 0"),
        (msgspec.structs.replace(UPDATE, round="7"), "Expected `int`, got `str`"),
        (msgspec.structs.replace(UPDATE, train_loss=np.float32(1.5)), "float32"),
        (Receipt(1, 0, "\ud800"), "surrogates not allowed"),
        (Receipt(1, 99, ""), "code is 99; allowed: a code of PROTOCOL.md's table"),
        (Snapshot(1, bytes(4 * 300)), "length of coefficients is 1200"),
    ],
)
def test_what_a_reader_would_refuse_is_not_sent(message, told):
    with pytest.raises(UserError) as error:
        encode(message)
    assert told in str(error.value)
    assert "See PROTOCOL.md, section 'Messages'." in str(error.value)


# Limits.


def longest_of_each_kind():
    eleven, top = "\U0001f600", 2**32 - 1
    devices = tuple(f"{number:064d}" for number in range(ranges.MAX_LISTED_DEVICES))
    step = NormalisedStep(1e-3, 3.0, 0.9, 1e300, top)
    plan = msgspec.structs.replace(PLAN, round=top - 1, step=step, participation=Listed(devices), levels=bytes(65536))
    reason = eleven * ranges.MAX_REASON
    keys = (65536, 2**64 - 1, bytes(2**20), bytes(32), bytes(32))
    dense = Change(None, -160, bytes(4 * 65536))
    return [
        Run("r" * 64, eleven * 256, "bf16", "rademacher", *keys, "f16", "f16", False),
        msgspec.structs.replace(plan, published_at_ms=2**53 - 1, reason=reason, change=dense),
        Snapshot(top, bytes(4 * 65536)),
        Update(top - 1, top, 1.0, 1.0, 1.0, bytes(16), b"", dense),
        Receipt(top, 41, eleven * ranges.MAX_DETAIL),
        Presence(True, 2**64 - 1, 255, 255, eleven * ranges.MAX_NAME, eleven * ranges.MAX_NOTE),
    ]


@pytest.mark.parametrize("message", longest_of_each_kind(), ids=kind_of)
def test_the_longest_message_of_a_kind_fits_its_limit(message):
    payload = encode(message)
    assert len(payload) <= LIMIT_BYTES[kind_of(message)]
    assert_both_ways(message, payload)


@pytest.mark.parametrize(("form", "size"), [("f8", 1), ("f16", 2), ("f32", 4)])
@pytest.mark.parametrize("steps", [1, 200, 16384])
def test_an_updates_limit_is_kept_by_the_longest_and_broken_by_a_few_more_scalars(form, size, steps):
    run = msgspec.structs.replace(RUN, scalar_format=form, first_order=False)
    longest = Update(2**32 - 2, 2**32 - 1, 1.5, 1.5, 0.5, bytes(16), bytes(size * steps), None)
    payload = encode(longest)
    limit = update_limit_bytes(steps, run)
    assert limit - 4 <= len(payload) <= limit
    assert decode("update", payload, limit_bytes=limit) == longest
    if steps < 16384:
        more = msgspec.structs.replace(longest, scalars=bytes(size * steps + 5))
        assert refusal_of("update", encode(more), limit_bytes=limit) is Refusal.OVERSIZED


@pytest.mark.parametrize(("form", "size"), [("f8", 1), ("f16", 2), ("f32", 4)])
@pytest.mark.parametrize("pool", [256, 4096, 65536])
def test_the_limit_of_a_run_with_first_order_devices_holds_a_dense_change(form, size, pool):
    run = msgspec.structs.replace(RUN, scalar_format=form, seeds=pool, first_order=True)
    dense = Update(2**32 - 2, 2**32 - 1, 1.5, 1.5, 0.5, bytes(16), b"", Change(None, -160, bytes(size * pool)))
    limit = update_limit_bytes(1, run)
    assert limit - 12 <= len(encode(dense)) <= limit
    assert update_limit_bytes(16384, run) >= limit
