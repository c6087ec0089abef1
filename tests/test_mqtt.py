"""The MQTT transport where it differs from the in-process one: connecting, losing the connection, connecting again."""

from __future__ import annotations

import queue
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shared.config import BrokerConfig
from shared.mqtt_link import Accepted, LinkEvent
from shared.mqtt_thread import NetworkThread
from shared.outgoing import Publication
from shared.transport import Connected, Delivered, Disconnected, Received
from tests.brokers import config_of, needs_mosquitto, running_broker, running_mosquitto
from tests.scripted_broker import accepting, read_packet, scripted_broker, until_closed
from tests.transport_clients import DEADLINE_S, FAST, client, connected, subscribed, wait_for
from tools.broker import RunningBroker, free_port


@pytest.mark.broker
@needs_mosquitto
def test_broker_that_is_down_at_the_start_is_named_and_found_later(tmp_path: Path) -> None:
    with running_mosquitto(tmp_path) as broker:
        broker.stop()
        transport = client(config_of(broker))
        transport.publish("news/x", b"early")
        transport.start()
        reason = f"nothing listens on 127.0.0.1:{broker.port}; is the broker running?"
        assert wait_for(transport, Disconnected) == Disconnected(reason)
        assert wait_for(transport, Disconnected) == Disconnected(reason)
        broker.restart()
        assert wait_for(transport, Connected) == Connected("MQTT 5", session_present=False)
        assert wait_for(transport, Delivered) == Delivered(1)
        transport.close()


@pytest.mark.broker
@needs_mosquitto
def test_nothing_is_lost_when_the_broker_restarts_in_mid_stream(mosquitto: RunningBroker) -> None:
    receiver = subscribed(connected(client(config_of(mosquitto), "receiver")), "news/+")
    sender = client(config_of(mosquitto), "sender")
    payloads = [str(number).encode() for number in range(1000)]
    for payload in payloads:
        sender.publish("news/x", payload)
    sender.start()
    delivered = [wait_for(sender, Delivered).token for _ in range(40)]
    mosquitto.restart()
    delivered += [wait_for(sender, Delivered).token for _ in range(960)]
    assert delivered == list(range(1, 1001))
    received: set[bytes] = set()
    while len(received) < 1000:
        received.add(wait_for(receiver, Received).payload)
    assert received == set(payloads)
    for transport in (sender, receiver):
        transport.close(1.0)


@pytest.mark.broker
@needs_mosquitto
def test_subscriptions_hold_after_a_killed_broker_forgot_the_session(mosquitto: RunningBroker) -> None:
    receiver = subscribed(connected(client(config_of(mosquitto), "receiver")), "news/+")
    mosquitto.kill()
    (mosquitto.log_path.parent / "mosquitto.db").unlink(missing_ok=True)
    wait_for(receiver, Disconnected)
    mosquitto.restart()
    assert not wait_for(receiver, Connected).session_present
    subscribed(receiver, "mark")  # the broker has handled the other subscription too
    receiver.publish("news/x", b"a")
    assert wait_for(receiver, Received).payload == b"a"
    receiver.close()


@pytest.mark.broker
@needs_mosquitto
def test_keepalive_and_commands_do_not_need_traffic(mosquitto: RunningBroker) -> None:
    transport = connected(client(config_of(mosquitto, keepalive_s=3)))
    assert transport.poll(5.5) is None  # a broker drops a client that is silent for 1.5 times the keepalive
    transport.publish("news/x", b"a")
    assert wait_for(transport, Delivered) == Delivered(1)
    transport.close()


def test_broker_gone_silent_is_noticed_by_the_keepalive() -> None:
    def falls_silent(sock: socket.socket) -> None:
        accepting(sock)
        until_closed(sock)

    with scripted_broker(falls_silent) as config:
        quick = BrokerConfig(host=config.host, port=config.port, keepalive_s=1)
        transport = connected(client(quick))
        assert wait_for(transport, Disconnected).reason == "the broker has not answered within the keepalive time"
        transport.close(0.0)


def test_peer_that_never_answers_is_tried_in_both_versions_and_named() -> None:
    asked: queue.Queue[int] = queue.Queue()

    def silent(sock: socket.socket) -> None:
        asked.put(read_packet(sock)[1][6])  # 3.1.2.2: protocol level
        until_closed(sock)

    with scripted_broker(silent) as config:
        transport = client(config, policy=replace(FAST, answer_timeout_s=0.5))
        transport.start()
        reason = f"127.0.0.1:{config.port} does not answer; is it an MQTT broker?"
        assert wait_for(transport, Disconnected).reason == reason
        assert [asked.get(timeout=DEADLINE_S) for _ in range(2)] == [5, 4]
        transport.close(0.0)


def test_peer_that_talks_nonsense_is_left_and_tried_again() -> None:
    def nonsense(sock: socket.socket) -> None:
        accepting(sock)
        sock.sendall(b"\xff\xff\xff\xff\xff\xff\xff\xff")
        until_closed(sock)

    def patient(sock: socket.socket) -> None:
        accepting(sock)
        until_closed(sock)

    with scripted_broker(nonsense, patient) as config:
        transport = connected(client(config))
        assert wait_for(transport, Disconnected) == Disconnected("the connection broke")
        assert wait_for(transport, Connected).protocol == "MQTT 5"
        transport.close(0.0)


def test_closing_while_the_broker_is_away_returns_in_time() -> None:
    transport = client(BrokerConfig(host="127.0.0.1", port=free_port()))
    transport.publish("news/x", b"never")
    transport.start()
    wait_for(transport, Disconnected)
    before = time.monotonic()
    transport.close(0.3)
    assert 0.2 < time.monotonic() - before < 10.0
    assert transport.poll(0) is None


def test_unknown_host_is_named() -> None:
    transport = client(BrokerConfig(host="no-such-host.invalid"))
    transport.start()
    assert wait_for(transport, Disconnected).reason == (
        "the host name no-such-host.invalid is not known here; check it and the network"
    )
    transport.close(0.0)


@pytest.mark.broker
def test_broker_without_mqtt_5_is_used_in_3_1_1_and_that_is_remembered(tmp_path: Path) -> None:
    pytest.importorskip("amqtt")
    with running_broker(tmp_path, "amqtt") as broker:
        transport = client(config_of(broker), policy=replace(FAST, answer_timeout_s=2.0))  # amqtt never answers MQTT 5
        transport.start()
        assert wait_for(transport, Connected).protocol == "MQTT 3.1.1"
        broker.kill()
        wait_for(transport, Disconnected)
        broker.restart()
        before = time.monotonic()
        while not isinstance(event := transport.poll(1.0), Connected):
            assert not event or "does not answer" not in getattr(event, "reason", "")
            assert time.monotonic() - before < DEADLINE_S
        assert event.protocol == "MQTT 3.1.1"
        transport.close()


def test_acknowledging_a_message_of_a_lost_connection_is_harmless() -> None:
    def delivers(sock: socket.socket) -> None:
        accepting(sock)
        sock.sendall(bytes([0x32, 7, 0, 1]) + b"t" + bytes([0, 9, 0]) + b"a")  # 3.3: QoS 1, topic t, packet 9

    heard: list[tuple[int, bytes]] = []

    def listens(sock: socket.socket) -> None:
        accepting(sock)
        heard.append(read_packet(sock))

    with scripted_broker(delivers, listens) as config:
        transport = connected(client(config, manual_acknowledge=True))
        message = wait_for(transport, Received)
        wait_for(transport, Connected)
        message.acknowledge()
        transport.publish("t", b"b")
        wait_for(transport, Disconnected)
        assert heard[0][0] == 3  # the publication, and no acknowledgement before it
        transport.close(0.0)


_CHILD = """
import sys
from shared.config import BrokerConfig
from shared.mqtt import MqttTransport
from shared.transport import Connected
transport = MqttTransport(BrokerConfig(host="127.0.0.1", port=int(sys.argv[1])), "child", will=("state/child", b"gone"))
transport.start()
while not isinstance(transport.poll(1.0), Connected):
    pass
print("connected", flush=True)
while True:
    transport.poll(1.0)
"""


@pytest.mark.broker
@needs_mosquitto
def test_killed_process_leaves_its_will_retained(mosquitto: RunningBroker) -> None:
    watcher = subscribed(connected(client(config_of(mosquitto), "watcher")), "state/+")
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(mosquitto.port)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "connected\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert wait_for(watcher, Received) == Received("state/child", b"gone", is_retained=False)
    late = connected(client(config_of(mosquitto), "late"))
    late.subscribe("state/+")
    assert wait_for(late, Received) == Received("state/child", b"gone", is_retained=True)
    for transport in (watcher, late):
        transport.close()


class BrokenLink:
    """A connection that is accepted and then fails as no library should."""

    def open(self) -> None:
        pass

    def step(self, wake: socket.socket, timeout_s: float) -> list[LinkEvent]:
        return [Accepted(False, None, None)]

    def publish(self, publication: Publication) -> None:
        raise SystemError("boom")

    def subscribe(self, topic_filter: str) -> None:
        pass

    def unsubscribe(self, topic_filter: str) -> None:
        pass

    def acknowledge(self, packet_id: int) -> None:
        pass

    def disconnect(self) -> None:
        pass

    def abort(self) -> None:
        pass


def test_exception_on_the_network_thread_is_a_final_event_and_not_silence() -> None:
    thread = NetworkThread(lambda version: BrokenLink(), FAST, random.Random(0))
    thread.publish(Publication(1, "t", b"", False))
    thread.start()
    assert thread.events.get(timeout=DEADLINE_S) == Connected("MQTT 5", False)
    assert thread.events.get(timeout=DEADLINE_S) == Disconnected(
        "the network thread failed: SystemError('boom'); this is a bug", is_final=True
    )
    thread.publish(Publication(2, "t", b"", False))  # harmless
    thread.close(1.0)
