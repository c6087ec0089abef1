"""What no device should send: the aggregator refuses it, changes nothing and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.messages import Receipt
from shared.refusals import Refusal
from shared.transport import Received
from shared.wire import encode, scalars_to_bytes
from tests.aggregator_setting import Device, Setting, setting
from tests.runs import update_of

__all__ = ["setting"]  # fixture

BAD: dict[str, tuple[bytes, Refusal]] = {
    "one byte": (b"\x01", Refusal.MALFORMED),
    "noise": (b"\x01\x04\xff\xff", Refusal.MALFORMED),
    "another version": (b"\x09" + encode(update_of())[1:], Refusal.UNSUPPORTED_VERSION),
    "another kind": (encode(Receipt(0, 0, "")), Refusal.WRONG_KIND),
    "cut": (encode(update_of())[:-3], Refusal.MALFORMED),
    "longer than the run allows": (
        encode(update_of(scalars=scalars_to_bytes(np.ones(30, np.float32), "f32"))),
        Refusal.OVERSIZED,
    ),
    "many scalars": (
        encode(update_of(scalars=scalars_to_bytes(np.ones(4, np.float32), "f32"))),
        Refusal.SCALAR_COUNT,
    ),
    "nan": (
        encode(update_of()).replace(np.float32(2).tobytes(), np.float32("nan").tobytes()),
        Refusal.NON_FINITE,
    ),
    "weightless": (encode(update_of()).replace(b"\x0a", b"\x00", 1), Refusal.WEIGHT_OUT_OF_RANGE),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_payload_is_refused_changes_nothing_and_does_not_end_the_loop(setting: Setting, name: str) -> None:
    payload, code = BAD[name]
    a = Device(setting.network, "a")
    setting.run(a)
    before = setting.state
    a.send_bytes(payload)
    setting.run(a)
    assert a.codes == [code]
    assert setting.state is before
    assert setting.store.state("night") == before
    a.send(update_of())
    setting.run(a)
    assert a.codes[-1] == Refusal.ACCEPTED


def test_a_retained_uplink_is_refused(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    a = Device(setting.network, "a")
    setting.network.kill("aggregator")
    setting.network.expire_session("aggregator")
    a.send_bytes(encode(update_of()), retain=True)  # nobody is subscribed: the broker keeps it for who comes
    setting.restart()
    setting.run(a)
    assert a.codes == [Refusal.RETAINED]
    assert not setting.state.updates


def test_an_empty_payload_is_no_message(setting: Setting) -> None:
    a = Device(setting.network, "a")
    setting.run(a)
    a.send_bytes(b"")
    setting.run(a)
    assert a.codes == []


def test_a_foreign_topic_is_ignored_and_logged_once(setting: Setting) -> None:
    setting.run()
    setting.service._transport.subscribe("#")
    stranger = setting.network.transport("stranger")
    stranger.start()
    for topic in ("kseed/night/update/BAD+ID", "weather", "kseed/night/plan"):
        stranger.publish(topic, encode(update_of()))
    setting.run()
    assert setting.log.count("ignoring messages on foreign topics") == 1
    assert not setting.state.updates


def test_an_update_for_another_run_is_answered(setting: Setting) -> None:
    a = Device(setting.network, "a")
    setting.run(a)
    setting.service._transport.subscribe("kseed/day/update/+")
    a.transport.publish("kseed/day/update/a", encode(update_of()))
    setting.run(a)
    assert a.codes == [Refusal.UNKNOWN_RUN]


def test_our_own_bug_does_not_end_the_loop(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Device(setting.network, "a")
    setting.run(a)
    real = setting.service._event_of

    def broken(turn: Any, run: str, device: str, message: Received) -> Any:
        if len(message.payload) > 20:
            raise ZeroDivisionError("a bug")
        return real(turn, run, device, message)

    monkeypatch.setattr(setting.service, "_event_of", broken)
    a.send(update_of())
    setting.run(a)
    assert a.codes == [Refusal.MALFORMED]
    assert "BUG: an update of a raised ZeroDivisionError('a bug')" in setting.log
