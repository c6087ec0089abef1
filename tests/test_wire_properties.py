"""Properties of the wire over every message, and over noise."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

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
    Threshold,
    Update,
)
from shared.refusals import Refusal
from shared.topics import KINDS
from shared.wire import (
    KIND_NUMBERS,
    decode,
    encode,
    kind_of,
)

VECTORS = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted((Path(__file__).parents[1] / "shared" / "vectors" / "wire").glob("*.json"))
}
ACCEPTED = [name for name, vector in VECTORS.items() if "message" in vector["expect"]]

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
ids = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?", fullmatch=True)
pools = st.sampled_from([2**bits for bits in range(8, 17)])


def texts(longest):
    return st.text(max_size=longest, alphabet=st.characters(exclude_categories=["Cs"]))


def binary(size):
    return st.binary(min_size=size, max_size=size)


positive = st.floats(1e-30, 1e6)
steps = st.builds(PlainStep, st.floats(1e-30, 1.0)) | st.builds(
    NormalisedStep, positive, positive, st.floats(0, 0.999), st.floats(0, 1e30), st.integers(1, 2**32 - 1)
)
selections = (
    st.just(Everyone())
    | st.builds(Threshold, st.integers(0, 2**32))
    | st.builds(Listed, st.lists(ids, max_size=3).map(tuple))
)
formats = st.sampled_from(["f32", "f16", "f8"])
exponents = st.integers(-160, 127)
changes = st.integers(0, 50).flatmap(lambda n: st.builds(Change, binary(2 * n) | st.none(), exponents, binary(2 * n)))
messages = st.one_of(
    st.builds(
        Run,
        ids,
        texts(256),
        st.sampled_from(["bf16", "fp16", "fp32"]),
        st.sampled_from(["hadamard", "rademacher", "gaussian"]),
        pools,
        u64,
        st.binary(min_size=1, max_size=40),
        binary(32),
        binary(32),
        formats,
        formats,
        st.booleans(),
    ),
    st.builds(
        Plan,
        st.integers(0, 2**32 - 2),
        st.sampled_from(["open", "paused", "finished"]),
        binary(16),
        st.sampled_from([2, 64, 16384]) | st.integers(1, 8192).map(lambda pairs: 2 * pairs),
        st.sampled_from([0, 2]),
        st.integers(1, 4096),
        st.floats(1e-30, 1.0),
        steps,
        selections,
        st.booleans(),
        st.none() | pools.map(bytes),
        st.booleans(),
        st.integers(0, 2**53 - 1),
        st.floats(1e-3, 31_536_000.0),
        texts(512),
        st.none() | changes,
    ),
    st.builds(Snapshot, u32, pools.map(lambda pool: bytes(4 * pool))),
    *(
        st.builds(
            Update,
            st.integers(0, 2**32 - 2),
            st.integers(1, 2**32 - 1),
            finite,
            st.none() | finite,
            st.none() | st.floats(0, 1),
            binary(16),
            *work,
        )
        for work in ((st.binary(min_size=1, max_size=120), st.none()), (st.just(b""), changes))
    ),
    st.builds(Receipt, u32, st.sampled_from(Refusal).map(int), texts(512)),
    st.integers(1, 255).flatmap(
        lambda low: st.builds(Presence, st.booleans(), u64, st.just(low), st.integers(low, 255), texts(256), texts(256))
    ),
)


@given(messages)
@settings(deadline=None)
def test_every_message_survives_the_wire(message):
    payload = encode(message)
    assert payload[:2] == bytes((1, KIND_NUMBERS[kind_of(message)]))
    assert decode(kind_of(message), payload) == message


anything = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=600),
    st.binary(max_size=40),
    st.none(),
    st.booleans(),
    st.lists(ids, max_size=2).map(tuple),
    steps,
    selections,
)


@given(messages, anything, st.data())
@settings(max_examples=300)
def test_a_message_with_any_value_in_any_field_is_refused_here_or_survives_the_wire(message, value, data):
    name = data.draw(st.sampled_from(message.__struct_fields__))
    changed = msgspec.structs.replace(message, **{name: value})
    try:
        payload = encode(changed)
    except UserError:
        return
    assert decode(kind_of(changed), payload) == changed


@given(st.sampled_from(KINDS), st.binary(max_size=200), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_message_or_the_peers_fault(kind, noise, is_framed):
    payload = bytes((1, KIND_NUMBERS[kind])) + noise if is_framed else noise
    try:
        message = decode(kind, payload)
    except PeerError as error:
        encode(Receipt(0, error.refusal, error.detail))
    else:
        assert decode(kind, encode(message)) == message


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_payload_is_a_message_or_the_peers_fault(data):
    vector = VECTORS[data.draw(st.sampled_from(ACCEPTED))]
    payload = bytearray.fromhex(vector["payload_hex"])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        message = decode(vector["kind"], bytes(payload))
    except PeerError as error:
        encode(Receipt(0, error.refusal, error.detail))
    else:
        assert decode(vector["kind"], encode(message)) == message
