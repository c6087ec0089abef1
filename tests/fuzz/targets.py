"""What is fuzzed: every reader of bytes that come from outside, and what must hold of it for any input.

Each target takes the fuzzer's bytes and raises where kseed is wrong; the peer's fault is no error. `tests/fuzz/run.py`
feeds them with atheris, `tests/test_fuzz_corpus.py` with the corpus that the fuzzer has found.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from typing import Any

from second_decoder import outcome as second_outcome
from second_maths import Refused, manifest_text, unpack_manifest

from shared import delta
from shared.errors import PeerError, UserError
from shared.manifest import Manifest
from shared.messages import Receipt
from shared.refusals import Refusal
from shared.topics import KINDS, parse_topic
from shared.wire import KIND_NUMBERS, PROTOCOL_VERSION, decode, encode
from tools.vectors_wire import outcome as first_outcome

SEED_COUNTS = {1 << bits for bits in range(8, 17)}
FRAMED, WITH_POOL, WITH_FORMAT, IS_F16, WITH_STEPS, WITH_LIMIT, IS_F8, WITH_KNOWN = (1 << bit for bit in range(8))


def frame(data: bytes) -> tuple[Any, bytes, dict[str, Any]]:
    """Kind, payload and context in the fuzzer's bytes: byte 0 is the kind, byte 1 flags, then the payload.

    FRAMED puts the right header before the payload, so that the fuzzer need not find it.
    """
    kind, flags = KINDS[data[0] % len(KINDS)], data[1]
    payload = data[2:]
    if flags & FRAMED:
        payload = bytes((PROTOCOL_VERSION, KIND_NUMBERS[kind])) + payload
    context: dict[str, Any] = {}
    if flags & WITH_POOL:
        context["seeds"] = 256
    if flags & WITH_FORMAT:
        form = "f16" if flags & IS_F16 else "f8" if flags & IS_F8 else "f32"
        context["change_format" if kind == "plan" else "scalar_format"] = form
    if flags & WITH_KNOWN:
        context["known_seeds"] = [1, 2, 200]
    if flags & WITH_STEPS:
        context["local_steps"] = 3
    if flags & WITH_LIMIT:
        context["limit_bytes"] = 70
    return kind, payload, context


def wire(data: bytes) -> None:
    """`decode` of every kind: a message or PeerError that fits into a receipt; what is taken is written back equal."""
    if len(data) < 2:
        return
    kind, payload, context = frame(data)
    try:
        message = decode(kind, payload, limit_bytes=context.get("limit_bytes"))
    except PeerError as error:
        assert error.refusal is not Refusal.ACCEPTED
        encode(Receipt(0, error.refusal, error.detail))
    else:
        again = decode(kind, encode(message))
        assert again == message, (message, again)


def both(data: bytes) -> None:
    """kseed's reader and the one of `second_decoder` come to the same, numbers in bytes fields included."""
    if len(data) < 2:
        return
    kind, payload, context = frame(data)
    expected, found = second_outcome(kind, payload, context), first_outcome(kind, payload, context)
    assert found == expected, (found, expected)
    if "message" in found:
        written = encode(decode(kind, payload))
        assert encode(decode(kind, written)) == written
        context.pop("limit_bytes", None)  # what a reader takes in a short form may be longer as a writer writes it
        assert first_outcome(kind, written, context) == found


def manifest(data: bytes) -> None:
    """`Manifest.unpack`: a manifest or PeerError; both readers agree.

    Byte 0 says what follows byte 1: the packed bytes, or the text of a stream that is whole, has a tail, or is cut.
    """
    if len(data) < 2:
        return
    rest = data[2:]
    packed = (
        rest,
        zlib.compress(rest, 0),
        zlib.compress(rest, 0) + data[1:2],
        zlib.compress(rest, 0)[: -1 - data[1] % 16],
    )[data[0] % 4]
    try:
        expected = unpack_manifest(packed)
    except Refused:
        expected = None
    try:
        found = Manifest.unpack(packed)
    except PeerError as error:
        assert error.refusal is Refusal.MALFORMED
        encode(Receipt(0, error.refusal, error.detail[:512]))
        assert expected is None, expected
        return
    assert {tensor.name: list(tensor.shape) for tensor in found.tensors} == expected
    assert found.canonical_text() == manifest_text(expected)
    assert Manifest.unpack(found.pack()) == found


def delta_file(data: bytes) -> None:
    """`delta.unpack`: a delta or UserError; what is taken is written back equal.

    Byte 0 odd: the rest is the file. Else it says how many coefficients there are, bytes 1 and 2 are the upper ones of
    the last, and what follows is the header's JSON, in which "SHA" stands for the right digest.
    """
    if len(data) < 3:
        return
    content = data[1:]
    if data[0] % 2 == 0:
        body = bytes(4 * (256, 0, 1, 255, 257, 512)[data[0] // 2 % 6])[:-2] + data[1:3]
        header = data[3:].replace(b'"SHA"', b'"' + hashlib.sha256(body).hexdigest().encode() + b'"')
        content = delta.MAGIC + struct.pack("<I", len(header)) + header + body
    try:
        found = delta.unpack(content, "a.delta")
    except UserError as error:
        assert str(error).startswith("a.delta: "), error
        return
    assert found.seeds in SEED_COUNTS and 0 <= found.version < 1 << 32 and 0 <= found.pool_key < 1 << 64
    written = delta.pack(found)
    again = delta.unpack(written, "a.delta")
    assert delta.pack(again) == written
    assert again.coefficients.tobytes() == found.coefficients.tobytes()


def topic(data: bytes) -> None:
    """`parse_topic`: a topic that is written back equal, or None; never an exception."""
    text = data.decode("utf-8", "surrogateescape")
    found = parse_topic(text)
    if found is not None:
        assert str(found) == text
        assert (found.device is not None) == (found.kind in ("update", "receipt", "presence"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "wire": wire,
    "both": both,
    "manifest": manifest,
    "delta": delta_file,
    "topic": topic,
}
