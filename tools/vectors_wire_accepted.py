"""Golden vectors of payloads that are taken: what a writer writes, and what a reader takes besides."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from shared.changes import FEW_BITS, NOTHING, write_change, write_few_bits
from shared.messages import Change, Listed, Message, PlainStep, Presence, Receipt, Snapshot, Threshold, Update
from shared.wire import coefficients_to_bytes, encode, kind_of, scalars_to_bytes
from tools.vectors_wire_form import MODEL_DIGEST, PLAN, PRESENCE, RUN, UPDATE, Scenario


def accepted() -> Iterator[Scenario]:
    """Scenarios whose payload is taken."""
    yield from _written()
    yield from _read_only()


def _of(name: str, about: str, message: Message, **context: object) -> Scenario:
    return Scenario(name, about, kind_of(message), encode(message), message, context=dict(context))


def _written() -> Iterator[Scenario]:
    """Payloads that a writer writes."""
    change = msgspec.structs.replace
    yield _of("run", "a run with the default directions", RUN)
    other = change(RUN, run="a", model="", dtype="fp32", directions="gaussian", seeds=65536, scalar_format="f32")
    yield _of("run-extremes", "shortest id, no name, largest pool and key", change(other, pool_key=2**64 - 1))
    yield _of("plan-normalised", "everyone, normalised steps, uniform seeds", PLAN)
    paper = change(PLAN, round=0, batch_size=1, eps=5e-4, step=PlainStep(3e-7), evaluate=False)
    yield _of("plan-paper", "the paper's plan for 5% of a fleet", change(paper, participation=Threshold(214_748_364)))
    listed = change(PLAN, participation=Listed(("jetson-1", "laptop")), common_seeds=True)
    yield _of("plan-listed", "two devices by name, who draw the same seeds", listed)
    few = change(PLAN, one_sided=8, local_steps=40, batch_size=16)
    yield _of("plan-one-sided", "groups of 8 directions share a batch and are measured on one side", few)
    yield _of("plan-one-sided-least", "a single pair", change(PLAN, one_sided=2, local_steps=2))
    yield _of("plan-one-sided-most", "groups as large as can be", change(PLAN, one_sided=64, local_steps=16384))
    levels = bytes(k * 37 % 256 for k in range(256))
    yield _of("plan-levels", "seeds by significance, K = 256", change(PLAN, levels=levels))
    yield _of("plan-paused", "paused, with a reason in UTF-8", change(PLAN, phase="paused", reason="Pause für alle"))
    last = change(PLAN, round=2**32 - 2, phase="finished", published_at_ms=2**53 - 1, reason="done")
    yield _of("plan-finished", "the last round there can be", last)
    a = np.arange(-128, 128, dtype=np.float32) * np.float32(1 / 3)
    yield _of("snapshot", "256 coefficients", Snapshot(7, coefficients_to_bytes(a)), seeds=256)
    yield from _changes()
    yield _of("update", "three steps as f16, evaluated", UPDATE, scalar_format="f16", local_steps=3)
    floats = scalars_to_bytes([0.1, -3.0e38, 1e-45], "f32")
    bare = change(UPDATE, held_out_loss=None, held_out_accuracy=None, scalars=floats)
    yield _of("update-f32", "f32, not evaluated", bare, scalar_format="f32", local_steps=200)
    eighths = [0.9, -1.1, 1.125, 1.375, 0.0, 57344.0, -1e6, 2.0**-16, 2.0**-17, 3 * 2.0**-17, -(2.0**-14)]
    short = change(bare, scalars=scalars_to_bytes(eighths, "f8"))
    yield _of("update-f8", "8 bits: ties to even, the largest, subnormal ones", short, scalar_format="f8")
    clamped = change(UPDATE, scalars=scalars_to_bytes([1e6, -65520.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1e-8], "f16"))
    yield _of("update-f16-clamped", "f16 clamps at the largest and rounds to even", clamped, scalar_format="f16")
    yield _of("update-at-limit", "as long as three f16 scalars can be", _longest(), limit_bytes=71)
    yield _of("receipt-accepted", "the usual answer", Receipt(7, 0, ""))
    yield _of("receipt-stale", "a refusal with a detail", Receipt(6, 21, "round 6 is over; the current one is 7"))
    yield _of("presence-online", "at work", PRESENCE)
    offline = Presence(False, 0, 1, 255, "x" * 256, "é" * 256)
    yield _of("presence-offline", "lengths count code points, not bytes", offline)


def _longest() -> Update:
    return Update(2**32 - 2, 2**32 - 1, 2.5, 2.5, 1.0, MODEL_DIGEST, bytes(6), None)


def _changes() -> Iterator[Scenario]:
    """Plans with the change that leads to their version, and updates with one in place of scalars."""

    def plan(name: str, about: str, change: Change, form: str, **context: object) -> Scenario:
        message = msgspec.structs.replace(PLAN, change=change)
        return _of(f"plan-change{name}", about, message, change_format=form, **{"seeds": 256, **context})

    three = np.array([0, 5, 255], np.int64)
    extreme = np.array([-0.0, 1e-45, 3.4028234663852886e38])
    yield plan("", "f32: minus zero, the smallest, the largest", write_change(three, extreme, "f32"), "f32")
    small = np.array([1e-3, -2.5e-7, 3e-4])
    yield plan("-f16", "f16, scaled by a power of two", write_change(three, small, "f16"), "f16")
    yield plan("-f8", "f8, scaled by a power of two", write_change(three, small, "f8"), "f8")
    tiny = np.array([1e-45, -3e-45, 0.0])
    yield plan("-subnormal", "f16 where f32 is subnormal", write_change(three, tiny, "f16"), "f16")
    unnamed = write_change(None, small, "f16")
    yield plan("-drawn", "the seeds that all devices drew do not travel", unnamed, "f16", known_seeds=[3, 4, 200])
    dense = write_change(None, np.arange(-128, 128) / 1000, "f8")
    yield plan("-dense", "all K", dense, "f8", known_seeds=[3, 4])
    yield plan("-dense-all-drawn", "all K, and all were drawn", dense, "f8", known_seeds=list(range(256)))
    for bits in FEW_BITS:
        packed = write_few_bits(np.arange(-128, 128) / 1000, bits)
        few = msgspec.structs.replace(UPDATE, scalars=b"", change=packed)
        about = f"all K coefficients in {bits} bits each"
        yield _of(f"update-change-{bits}-bits", about, few, scalar_format="f16", seeds=256)
    yield plan("-empty", "a round that changed nothing", NOTHING, "f16")
    last = write_change(np.array([65535], np.int64), np.array([1.0]), "f32")
    yield plan("-last-seed", "the last seed of the largest pool", last, "f32", seeds=65536)
    first_order = msgspec.structs.replace(UPDATE, scalars=b"", change=write_change(three, small, "f16"))
    yield _of("update-change", "a first-order device's three coefficients", first_order, scalar_format="f16", seeds=256)
    first_order = msgspec.structs.replace(first_order, change=dense)
    yield _of("update-change-dense", "all K coefficients", first_order, scalar_format="f8", seeds=256)


def _read_only() -> Iterator[Scenario]:
    """Payloads that a reader takes although a writer would write other bytes."""
    whole = msgspec.structs.replace(UPDATE, train_loss=2.0, held_out_loss=None, held_out_accuracy=1.0)
    tail = b"\xc4\x10" + MODEL_DIGEST + b"\xc4\x02\x00\x3e\xc0"
    whole = msgspec.structs.replace(whole, scalars=b"\x00\x3e")
    payload = b"\x01\x04\x98\x07\xcd\x03\x2c\x02\xc0\x01" + tail
    yield Scenario("update-whole-floats", "2.0 and 1.0 as integers", "update", payload, whole, is_canonical=False)
    payload = b"\x01\x04\x98\x07\xcd\x03\x2c\xca\x40\x00\x00\x00\xc0\xca\x3f\x80\x00\x00" + tail
    yield Scenario("update-float32", "floats as float 32", "update", payload, whole, is_canonical=False)
    wide = b"\x01\x05\xdd\x00\x00\x00\x03\xd3" + (7).to_bytes(8, "big") + b"\xcc\x00\xdb\x00\x00\x00\x01!"
    yield Scenario(
        "receipt-wide", "every header wider than needed", "receipt", wide, Receipt(7, 0, "!"), is_canonical=False
    )
