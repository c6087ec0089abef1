"""Floods on a real broker: what nobody reads waits in the broker or the socket, and all of it is read later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aggregator.service import Service
from aggregator.store import Store
from shared.paho_link import MOST_UNACKNOWLEDGED
from shared.refusals import Refusal
from shared.transport import Connected, Delivered, Received
from shared.wire import decode, encode, scalars_to_bytes
from tests.brokers import config_of, needs_mosquitto, running_mosquitto
from tests.runs import START_MS, spec_of, update_of


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
