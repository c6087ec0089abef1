"""Recorded conversations of this protocol version: shared/vectors/sessions/ (PROTOCOL.md, section 11).

The next version replays them: whoever speaks version 1 must answer these events with these very bytes.
"""

from __future__ import annotations

import math
import struct

import msgspec
import numpy as np

from shared.changes import write_change
from shared.messages import Change
from shared.wire import PROTOCOL_VERSION, encode
from tools.vectors_sessions_form import Json
from tools.vectors_sessions_record import Recorder, model_digest

OTHER_MODEL = b"another model..."


def session_vectors() -> dict[str, object]:
    """File name under shared/vectors/sessions/ -> its content."""
    scenarios = (_three_rounds, _late, _refusals, _diverged, _other_version, _stopped, _short_changes, _first_order)
    made = [scenario() for scenario in scenarios]
    return {f"{vector['name']}.json": vector for vector in made}


def _three_rounds() -> Json:
    about = "two devices, three rounds of normalised steps as f16, each update accepted, the last version evaluated"
    recorder = Recorder("three-rounds", about)
    recorder.aggregate("begin")
    recorder.connect("ann", "bob")
    return recorder.vector()


def _late() -> Json:
    about = "cas comes when bob has left: it takes the snapshot once and follows by changes; seeds by significance"
    recorder = Recorder("late-join", about, algorithm="fedkseed-pro", rounds=4, quorum=2)
    recorder.held.add(("bob", 1))
    recorder.connect("ann", "bob")  # before their run has ever been served
    recorder.aggregate("begin")
    recorder.tell("bob", "leave")
    recorder.connect("cas")
    return recorder.vector()


def _refusals() -> Json:
    about = "every refusal that an uplink can meet, each without a trace; the round closes on the two good updates"
    recorder = Recorder("refusals", about, devices=["ann", "bob", "cas"], quorum=2, max_samples=100, rounds=2)
    recorder.aggregate("begin")
    good = recorder.good_update("ann")
    payload = encode(good)

    def other(**fields: object) -> bytes:
        return encode(msgspec.structs.replace(good, **fields))

    recorder.uplink("ann", payload[:1])
    recorder.uplink("ann", payload[:-1])
    recorder.uplink("ann", payload + b"\0")
    recorder.uplink("ann", bytes((PROTOCOL_VERSION + 1,)) + payload[1:])
    recorder.uplink("ann", bytes((0,)) + payload[1:])
    recorder.uplink("ann", payload[:1] + b"\2" + payload[2:])
    recorder.uplink("ann", payload + bytes(100))
    recorder.uplink("ann", payload, is_retained=True)
    recorder.uplink("ann", payload, run="another")
    recorder.uplink("ann", other(round=1))
    recorder.uplink("eve", payload)
    recorder.uplink("ann", other(scalars=b"", change=_moved(1e-3)))
    recorder.uplink("ann", other(scalars=bytes(8)))
    recorder.uplink("ann", other(scalars=struct.pack("<2e", 1.0, math.nan)))
    recorder.uplink("ann", other(samples=101))
    recorder.uplink("ann", payload)
    recorder.uplink("ann", payload)
    recorder.uplink("ann", other(samples=11))
    bob, cas = recorder.good_update("bob"), recorder.good_update("cas")
    recorder.aggregate("pause", reason="maintenance")
    recorder.uplink("bob", encode(bob))
    recorder.aggregate("resume")
    recorder.uplink("bob", encode(bob))
    recorder.uplink("ann", payload)  # its receipt was lost
    recorder.uplink("cas", encode(cas))
    return recorder.vector()


def _short_changes() -> Json:
    about = "all devices draw the same seeds, which then do not travel; changes are f16, what they leave is carried"
    recorder = Recorder("short-changes", about, common_seeds=True, change_format="f16", local_steps=5, rounds=4)
    recorder.aggregate("begin")
    recorder.connect("ann", "bob")
    return recorder.vector()


def _first_order() -> Json:
    about = "ann and cas, no agents of ours, send changes in place of scalars: what does not fit is refused"
    recorder = Recorder("first-order", about, first_order="accept", change_format="f8", rounds=2)
    recorder.aggregate("begin")
    good = msgspec.structs.replace(recorder.good_update("ann"), scalars=b"", change=_moved(1e-3))
    assert good.change is not None
    outside = msgspec.structs.replace(good.change, seeds=b"\0\0\7\0\0\1")
    for change in (
        outside,
        msgspec.structs.replace(good.change, values=good.change.values[:4]),
        msgspec.structs.replace(good.change, seeds=None),
        msgspec.structs.replace(good.change, seeds=good.change.seeds and good.change.seeds[::-1]),
        msgspec.structs.replace(good.change, exponent=127),
        _moved(1.0),
    ):
        recorder.uplink("ann", encode(msgspec.structs.replace(good, change=change)))
    recorder.uplink("ann", encode(good))
    recorder.uplink("ann", encode(msgspec.structs.replace(good, change=_moved(2e-3))))
    recorder.uplink("bob", encode(recorder.good_update("bob")))
    dense = write_change(None, np.arange(-128, 128) / 2**20, "f16")
    recorder.uplink("cas", encode(msgspec.structs.replace(recorder.good_update("cas"), scalars=b"", change=dense)))
    recorder.connect("dan")
    return recorder.vector()


def _moved(size: float) -> Change:
    """A first-order device's change of three coefficients."""
    return write_change(np.array([0, 7, 255]), np.array([size, -size / 2, size / 3]), "f16")


def _diverged() -> Json:
    about = "cas rebuilds another model: it is left out, takes a fresh snapshot, and counts again"
    recorder = Recorder("diverged", about, quorum=3, rounds=3)
    recorder.model_digest = _another_for_cas
    recorder.aggregate("begin")
    recorder.connect("ann", "bob", "cas")
    return recorder.vector()


def _another_for_cas(device: str, version: int, coefficients: bytes) -> bytes:
    return OTHER_MODEL if (device, version) == ("cas", 1) else model_digest(device, version, coefficients)


def _other_version() -> Json:
    about = "ann meets a run of the next version, bob one of the version before: both leave with a goodbye, and no more"
    recorder = Recorder("other-versions", about)
    run = encode(recorder.aggregator.state.spec.facts)
    for device, version in (("ann", PROTOCOL_VERSION + 1), ("bob", PROTOCOL_VERSION - 1)):
        recorder.connect(device)
        recorder.downlink(device, "run", bytes((version,)) + run[1:])
    return recorder.vector()


def _stopped() -> Json:
    about = "a deadline passes with one update of two, the round is extended; the run is stopped with what it has"
    recorder = Recorder("stopped", about, quorum=2, min_updates=2, participation=0.5, rounds=5)
    recorder.held = {("bob", 0)}
    recorder.aggregate("begin")
    recorder.connect("ann", "bob")
    recorder.wait(60_000)
    recorder.aggregate("tick")
    recorder.wait(60_000)
    recorder.aggregate("tick")
    recorder.aggregate("stop", reason="enough")
    return recorder.vector()
