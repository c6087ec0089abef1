"""Floods: every queue of the aggregator is bounded, nobody is dropped in silence, everything counts in the end."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator import admission, intake, listing
from aggregator.attendance import Attendance, Seen
from aggregator.events import SendReceipt
from aggregator.lock import RunLock
from aggregator.rounds import step
from aggregator.service import Service
from aggregator.store import Store
from shared.messages import Presence
from shared.paho_link import MOST_UNACKNOWLEDGED
from shared.refusals import Refusal
from shared.transport import Connected, Delivered, Received
from shared.wire import decode, encode, scalars_to_bytes
from tests.aggregator_setting import Device, Setting
from tests.brokers import config_of, needs_mosquitto, running_mosquitto
from tests.runs import START_MS, after, arrival, opened, spec_of, update_of


class Stuck:
    """A transport whose broker takes nothing from us for a while: no Delivered comes."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.is_stuck = True
        self._held: deque[Delivered] = deque()
        self.acknowledged = 0

    def poll(self, timeout_s: float) -> Any:
        if not self.is_stuck and self._held:
            return self._held.popleft()
        while isinstance(event := self._inner.poll(timeout_s), Delivered) and self.is_stuck:
            self._held.append(event)
        if isinstance(event, Received):
            return Received(event.topic, event.payload, event.is_retained, lambda: self._acknowledge(event))
        return event

    def _acknowledge(self, event: Received) -> None:
        self.acknowledged += 1
        event.acknowledge()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_WAITING", 20)
    monkeypatch.setattr(intake, "MAX_UNSETTLED", 30)
    monkeypatch.setattr(intake, "ROOM_FOR_BUSY", 10)


def stuck(setting: Setting) -> Stuck:
    setting.run()
    transport = Stuck(setting.service._transport)
    setting.service._transport = setting.service._answers._transport = transport  # type: ignore[assignment]
    return transport


def test_while_the_broker_takes_no_answers_nothing_is_decided_and_the_rest_is_told_to_wait(
    tmp_path: Path, small: None
) -> None:
    setting = Setting(tmp_path, quorum=1000)
    transport = stuck(setting)
    devices = [Device(setting.network, f"d{i:03}") for i in range(200)]
    for device in devices:
        device.send(update_of())
    setting.run(*devices, turns=30)
    codes = [code for device in devices for code in device.codes]
    accepted, busy = codes.count(Refusal.ACCEPTED), codes.count(Refusal.BUSY)
    assert accepted + busy == len(codes) == transport.acknowledged  # acknowledged is answered
    assert 0 < accepted <= 30
    assert 0 < busy <= 40
    assert setting.service._answers.unsettled == 40
    # The loopback has no window. What waits here beyond MAX_WAITING is what a real broker would not have sent.
    assert len(setting.service._intake) == 200 - len(codes)
    assert len(setting.state.updates) == accepted


def test_when_the_broker_is_back_every_update_is_accepted_and_everyone_knows(tmp_path: Path, small: None) -> None:
    setting = Setting(tmp_path, quorum=1000)
    transport = stuck(setting)
    devices = [Device(setting.network, f"d{i:03}") for i in range(200)]
    for device in devices:
        device.send(update_of())
    setting.run(*devices, turns=10)
    transport.is_stuck = False
    answered = dict.fromkeys(devices, 0)
    for _ in range(60):
        setting.run(*devices, turns=1)
        for device in devices:
            if len(device.codes) > answered[device] and device.codes[-1] is Refusal.BUSY:
                answered[device] = len(device.codes)
                device.send(update_of())
    assert [device.codes[-1] for device in devices] == [Refusal.ACCEPTED] * 200
    assert len(setting.state.updates) == 200
    assert not len(setting.service._intake)


def test_a_busy_receipt_names_the_round_of_the_update(setting_of_two: Setting, small: None) -> None:
    setting = setting_of_two
    stuck(setting)
    setting.service._answers.unsettled = 30
    devices = [Device(setting.network, f"d{i:03}") for i in range(30)]
    for device in devices:
        device.send(update_of(7))
    setting.run(*devices, turns=2)
    told = [m for device in devices for m in device.heard if getattr(m, "code", None) == Refusal.BUSY]
    assert told
    assert {message.round for message in told} == {7}


@pytest.fixture
def setting_of_two(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def test_what_waits_when_the_connection_is_lost_comes_again_and_counts_once(tmp_path: Path, small: None) -> None:
    setting = Setting(tmp_path, quorum=1000)
    transport = stuck(setting)
    setting.service._answers.unsettled = 30
    devices = [Device(setting.network, f"d{i}") for i in range(10)]
    for device in devices:
        device.send(update_of())
    setting.run(turns=2)
    assert len(setting.service._intake) == 10
    setting.network.cut("aggregator")
    setting.run(turns=1)
    assert len(setting.service._intake) == 0
    transport.is_stuck = False
    setting.service._answers.unsettled = 0
    setting.run(*devices, turns=60)
    assert len(setting.state.updates) == 10
    assert all(device.codes == [Refusal.ACCEPTED] for device in devices)


# --- memory of the round


def test_late_updates_cannot_fill_a_round() -> None:
    state = opened(late="fold", quorum=2, rounds=9)
    state = after(state, arrival("a", update_of()), arrival("b", update_of())).state
    assert state.progress.round == 1
    codes = []
    for number in range(12):
        before = state
        state, actions = step(state, arrival(f"d{number}", update_of(0)))
        codes += [action.receipt.code for action in actions if isinstance(action, SendReceipt)]
        assert (state is before) == (codes[-1] == Refusal.BUSY)
    assert codes == [0] * (2 * admission.FULL_ROUND) + [Refusal.BUSY] * (12 - 2 * admission.FULL_ROUND)
    state = after(state, arrival("a", update_of(1)), arrival("b", update_of(1))).state  # those it waits for get in
    assert state.progress.round == 2
    assert step(state, arrival("d11", update_of(0))).state is not state  # and the others may try again


# --- presence


def presence(online: bool, note: str = "") -> bytes:
    return encode(Presence(online, 1, 1, 1, "kseed/0.1", note))


def test_presence_of_more_devices_than_fit_is_not_listed() -> None:
    attendance = Attendance(max_devices=3)
    for number in range(5):
        attendance.hear(f"d{number}", presence(True), START_MS)
    assert (attendance.online, attendance.unlisted, len(attendance.changes())) == (3, 2, 3)
    attendance.hear("d0", presence(False), START_MS + 1)
    attendance.hear("d1", presence(True, "on battery"), START_MS + 2)
    attendance.hear("d2", b"", START_MS + 3)
    attendance.hear("d1", b"\x01\x06noise", START_MS + 4)
    assert attendance.online == 1
    assert attendance.changes()[1] == Seen("d1", True, "on battery", "kseed/0.1", START_MS + 2)
    attendance.forget_changes()
    assert attendance.changes() == []


def test_who_is_there_is_kept_in_the_store_and_counts_for_over_selection(tmp_path: Path) -> None:
    setting = Setting(tmp_path, over_selection=2.0)
    names = [f"d{i}" for i in range(8)]
    for name in names:
        device = Device(setting.network, name)
        device.transport.publish(
            f"kseed/night/presence/{name}", presence(True, "on battery" * (name == "d3")), retain=True
        )
    setting.run(turns=2)
    setting.clock.now_ms += 5_000
    setting.run()
    lock = RunLock.take(setting.path, "night", wait_s=0)  # as the process that serves it holds it
    with Store.open(setting.path, may_write=False) as reader:
        assert sorted(reader.presences("night")) == names
        assert reader.presences("night")["d3"].is_online
        assert "devices online: 8, at work: 7" in (text := listing.run(reader, "night", False, 5))
        assert [line.split("  ")[-1].strip() for line in text.splitlines() if line.startswith("d3 ")] == [
            "online, on battery"
        ]
    lock.release()
    assert setting.state.progress.online == 8
    assert setting.state.progress.part == 1.0  # the first round began before anyone was heard


# --- the real network


@needs_mosquitto
@pytest.mark.broker
def test_a_flood_on_mosquitto_waits_in_the_broker_and_all_of_it_counts(tmp_path: Path) -> None:
    from shared.mqtt import MqttTransport

    count = 3000
    rng = np.random.default_rng(0)
    payloads = {}
    for number in range(count):
        scalars = scalars_to_bytes(rng.normal(size=200).astype(np.float32), "f32")
        payloads[f"d{number:04}"] = encode(update_of(scalars=scalars))
    with running_mosquitto(tmp_path) as broker, Store.open(tmp_path / "s", may_create=True) as store:
        store.create(spec_of(quorum=count + 1, local_steps=200, deadline_s=3600.0), START_MS)
        aggregator = MqttTransport(config_of(broker), "kseed-aggregator-night", manual_acknowledge=True)
        flood = MqttTransport(config_of(broker), "flood")
        service = Service(store, "night", aggregator, lambda: START_MS, lambda _: None)
        try:
            service.start()
            while not service._is_connected:
                service.turn(0.1)
            flood.subscribe("kseed/night/receipt/+")
            flood.start()
            for device, payload in payloads.items():
                flood.publish(f"kseed/night/update/{device}", payload)
            told: dict[str, int] = {}
            sent = 0
            while sent < count:  # the aggregator does nothing, and the broker takes all of it
                sent += isinstance(flood.poll(10.0), Delivered)
            queued = aggregator._thread.events.qsize()
            while sum(code == Refusal.ACCEPTED for code in told.values()) < count:
                service.turn(0.0)
                while (event := flood.poll(0.0)) is not None:
                    if isinstance(event, Received):
                        device = event.topic.split("/")[-1]
                        told[device] = decode("receipt", event.payload).code  # type: ignore[union-attr]
                        if told[device] == Refusal.BUSY:
                            flood.publish(f"kseed/night/update/{device}", payloads[device])
        finally:
            for transport in (aggregator, flood):
                transport.close()
    assert 0 < queued <= MOST_UNACKNOWLEDGED + 20
    assert set(told.values()) == {Refusal.ACCEPTED}
    assert len(service.state.updates) == count


@needs_mosquitto
@pytest.mark.broker
def test_what_nobody_reads_stays_in_the_socket_and_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared import mqtt_thread
    from shared.mqtt import MqttTransport

    monkeypatch.setattr(mqtt_thread, "MOST_UNREAD", 20)
    count = 2000
    with running_mosquitto(tmp_path) as broker:
        reader, flood = MqttTransport(config_of(broker), "reader"), MqttTransport(config_of(broker), "flood")
        try:
            reader.subscribe("news/#")
            reader.start()
            assert isinstance(reader.poll(10.0), Connected)
            reader.publish("news/own", b"")  # once it is back, the subscription is there
            while not isinstance(reader.poll(10.0), Received):
                pass
            flood.start()
            for number in range(count):
                flood.publish("news/all", number.to_bytes(4, "big") + bytes(996))
            delivered = 0
            while delivered < count:
                delivered += isinstance(flood.poll(10.0), Delivered)
            unread = reader._thread.events.qsize()
            read = []
            while len(read) < count:
                event = reader.poll(10.0)
                assert event is not None
                if isinstance(event, Received):
                    read.append(int.from_bytes(event.payload[:4], "big"))
                    unread = max(unread, reader._thread.events.qsize())
        finally:
            reader.close()
            flood.close()
    assert read == list(range(count))
    assert 0 < unread <= 25  # one reading of the socket beyond the limit; without it 120


def test_answers_in_flight_go_by_the_smaller_of_what_we_want_and_what_the_broker_names() -> None:
    from shared.outgoing import MOST_IN_FLIGHT, Outgoing, Publication

    for wanted, named, expected in ((500, 1000, 500), (500, 50, 50), (500, None, MOST_IN_FLIGHT), (20, 1000, 20)):
        outgoing = Outgoing(wanted)
        for token in range(600):
            outgoing.add(Publication(token, "t", b"", False))
        outgoing.connected(named, None)
        taken = 0
        while outgoing.take() is not None:
            taken += 1
        assert taken == expected


def test_long_updates_that_wait_are_bounded_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = encode(update_of())
    monkeypatch.setattr(intake, "MAX_WAITING_BYTES", 5 * len(payload))
    setting = Setting(tmp_path)
    queue = intake.Intake(setting.service._answers)
    message = Received("kseed/night/update/a", payload, False)
    assert [queue.offer(message) for _ in range(7)] == ["waits"] * 5 + ["busy"] * 2
    assert queue.take(0) is not None
    assert [queue.offer(message) for _ in range(2)] == ["waits", "busy"]
    queue.clear()
    assert queue.offer(message) == "waits"
