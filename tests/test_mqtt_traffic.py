"""The bytes of the MQTT transport: counted over every connection, and saved where acknowledgements share a write."""

from __future__ import annotations

import socket
import sys

import pytest

from shared import paho_link
from shared.transport import Connected, Delivered, Received
from tests.brokers import config_of, needs_mosquitto
from tests.scripted_broker import accepting, scripted_broker
from tests.transport_clients import client, connected, wait_for
from tools.broker import RunningBroker


@pytest.mark.broker
@needs_mosquitto
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux'")
def test_socket_bytes_are_counted_over_reconnects_and_after_the_close(mosquitto: RunningBroker) -> None:
    transport = connected(client(config_of(mosquitto)))
    transport.publish("news/x", b"x" * 5000)
    wait_for(transport, Delivered)
    first = transport.traffic().socket_sent_bytes
    assert first is not None
    assert 5000 < first < 5200
    mosquitto.restart()
    wait_for(transport, Connected)
    transport.publish("news/x", b"x" * 5000)
    wait_for(transport, Delivered)
    transport.close()
    second = transport.traffic().socket_sent_bytes
    assert second is not None
    assert 10_000 < second < 10_400


@pytest.mark.broker
@needs_mosquitto
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux'")
def test_a_broken_connection_does_not_lose_count_of_what_waited(mosquitto: RunningBroker) -> None:
    transport = connected(client(config_of(mosquitto)))
    transport.publish("kseed/spring/update/ann", b"x" * 5000)
    wait_for(transport, Delivered)
    mosquitto.restart()
    wait_for(transport, Connected)
    transport.publish("kseed/spring/update/ann", b"x" * 5000)
    wait_for(transport, Delivered)
    transport.close()
    traffic = transport.traffic()
    update = traffic.kinds["update"]
    assert (update.sent_packets, update.sent_payload_bytes) == (2, 10_000)
    assert traffic.kinds["connect"].sent_packets == 2
    assert traffic.kinds["disconnect"].sent_packets == 1
    assert traffic.mqtt_sent_bytes == traffic.socket_sent_bytes  # there is no TLS here
    assert traffic.mqtt_received_bytes is not None
    assert traffic.socket_received_bytes is not None
    assert 0 <= traffic.socket_received_bytes - traffic.mqtt_received_bytes < 8  # a dying broker's last word, unread


PUBACK = 4


@pytest.mark.parametrize(("saves_bytes", "most_reads"), [(True, 2), (False, 5)])
def test_acknowledgements_share_a_write_where_bytes_are_saved(
    saves_bytes: bool, most_reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paho_link, "_HOLD_ACKNOWLEDGEMENTS_S", 1.0)  # this thread may be slow to take five messages
    publications = b"".join(bytes([0x32, 7, 0, 1]) + b"t" + bytes([0, number, 0]) + b"a" for number in range(1, 6))
    reads: list[bytes] = []

    def delivers(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        accepting(sock)
        sock.sendall(publications)
        while sum(map(len, reads)) < 5 * PUBACK:
            reads.append(sock.recv(4096))

    with scripted_broker(delivers) as config:
        transport = client(config, saves_bytes=saves_bytes)
        transport.start()
        for _ in range(5):
            wait_for(transport, Received)
        transport.close()
    assert b"".join(reads)[: 5 * PUBACK] == b"".join(bytes([0x40, 2, 0, number]) for number in range(1, 6))
    assert len(reads) <= most_reads
