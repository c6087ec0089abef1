"""The MQTT transport where it differs from the in-process one: real brokers, and peers that misbehave."""

from __future__ import annotations

import random
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.config import BrokerConfig
from shared.errors import UserError
from shared.mqtt import MqttTransport
from shared.mqtt_link import Accepted, LinkEvent
from shared.mqtt_thread import NetworkThread
from shared.outgoing import Publication
from shared.reconnecting import ReconnectPolicy
from shared.transport import TAKEN_OVER, Connected, Delivered, Disconnected, Received, Transport, Undelivered
from tests.brokers import config_of, needs_mosquitto, running_broker, running_mosquitto
from tests.scripted_broker import CONNACK, accepting, read_packet, scripted_broker, until_closed
from tests.scripted_broker import TAKEN_OVER as TAKEN_OVER_PACKET
from tests.test_transport import DEADLINE_S, connected, subscribed, wait_for
from tools.broker import RunningBroker, free_port

FAST = ReconnectPolicy(first_s=0.05, longest_s=0.2, refused_s=0.05, refused_longest_s=0.1, answer_timeout_s=0.5)
broker_test = pytest.mark.broker


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[RunningBroker]:
    with running_mosquitto(tmp_path) as broker:
        yield broker


def client(config: BrokerConfig, client_id: str = "client", **more: object) -> MqttTransport:
    return MqttTransport(config, client_id, policy=FAST, **more)  # type: ignore[arg-type]


def final(transport: Transport) -> str:
    for _ in range(20):
        event = wait_for(transport, Disconnected)
        if event.is_final:
            return event.reason
    raise AssertionError("it goes on trying")


# Connecting, losing the connection, and connecting again.


@broker_test
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


@broker_test
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


@broker_test
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


@broker_test
@needs_mosquitto
def test_keepalive_and_commands_do_not_need_traffic(mosquitto: RunningBroker) -> None:
    transport = connected(client(config_of(mosquitto, keepalive_s=1)))
    assert transport.poll(2.5) is None  # a broker drops a client that is silent for 1.5 times the keepalive
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
    asked: list[int] = []

    def silent(sock: socket.socket) -> None:
        asked.append(read_packet(sock)[1][6])  # 3.1.2.2: protocol level
        until_closed(sock)

    with scripted_broker(silent) as config:
        transport = client(config)
        transport.start()
        reason = f"127.0.0.1:{config.port} does not answer; is it an MQTT broker?"
        assert wait_for(transport, Disconnected).reason == reason
        assert asked[:2] == [5, 4]
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
    assert 0.2 < time.monotonic() - before < 1.2
    assert transport.poll(0) is None


def test_unknown_host_is_named() -> None:
    transport = client(BrokerConfig(host="no-such-host.invalid"))
    transport.start()
    assert wait_for(transport, Disconnected).reason == (
        "the host name no-such-host.invalid is not known here; check it and the network"
    )
    transport.close(0.0)


@broker_test
def test_broker_without_mqtt_5_is_used_in_3_1_1_and_that_is_remembered(tmp_path: Path) -> None:
    pytest.importorskip("amqtt")
    with running_broker(tmp_path, "amqtt") as broker:
        transport = client(config_of(broker))
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


# Limits and refusals.


def test_no_more_is_in_flight_than_the_broker_allows() -> None:
    arrived: list[bytes] = []

    def narrow(sock: socket.socket) -> None:
        read_packet(sock)
        sock.sendall(bytes([0x20, 6, 0, 0, 3, 0x21, 0, 3]))  # 3.2.2.3.3: receive maximum 3
        for _ in range(9):
            waiting = [read_packet(sock)[1] for _ in range(3)]
            arrived.extend(body[-1:] for body in waiting)
            may_be_more, _, _ = select.select([sock], [], [], 0.05)  # a fourth would be there by then
            assert not may_be_more
            for body in waiting:
                sock.sendall(bytes([0x40, 2]) + body[3:5])  # 3.4: topic t has 3 bytes, then the packet id
        until_closed(sock)

    with scripted_broker(narrow) as config:
        transport = client(config)
        for number in range(27):
            transport.publish("t", bytes([number]))
        transport.start()
        assert [wait_for(transport, Delivered).token for _ in range(27)] == list(range(1, 28))
        assert arrived == [bytes([number]) for number in range(27)]
        transport.close(1.0)


@broker_test
@needs_mosquitto
def test_payload_above_the_brokers_packet_limit_is_told_and_blocks_nothing(tmp_path: Path) -> None:
    with running_mosquitto(tmp_path, extra_config="max_packet_size 1000") as broker:
        transport = client(config_of(broker))
        fits = 1000 - Publication(0, "news/x", b"x" * 900, False).packet_bytes + 900
        transport.publish("news/x", b"x" * (fits + 1))
        transport.publish("news/x", b"x" * fits)
        transport.start()
        refused = wait_for(transport, Undelivered)
        assert refused.token == 1
        assert refused.reason.startswith("news/x: the packet has 1001 bytes; the broker takes up to 1000")
        assert wait_for(transport, Delivered) == Delivered(2)
        transport.close()


@broker_test
@needs_mosquitto
def test_publication_that_access_rules_forbid_is_undelivered(tmp_path: Path) -> None:
    rules = tmp_path / "rules.acl"
    rules.write_text("topic readwrite open/#\n")
    rules.chmod(0o600)
    with running_mosquitto(tmp_path, extra_config=f"acl_file {rules}") as broker:
        transport = connected(client(config_of(broker)))
        transport.publish("closed/x", b"a")
        transport.publish("open/x", b"b")
        assert wait_for(transport, Undelivered) == Undelivered(1, "the broker refused it: Not authorized")
        assert wait_for(transport, Delivered) == Delivered(2)
        transport.close()


def test_topic_no_broker_takes_is_undelivered() -> None:
    def patient(sock: socket.socket) -> None:
        accepting(sock)
        until_closed(sock)

    with scripted_broker(patient) as config:
        transport = connected(client(config))
        transport.publish("news/+", b"a")
        assert wait_for(transport, Undelivered).reason.startswith("news/+: ")
        transport.close(0.0)


def test_refused_subscription_is_final_and_names_the_filter() -> None:
    def refuses(sock: socket.socket) -> None:
        accepting(sock)
        kind, body = read_packet(sock)
        assert kind == 8
        sock.sendall(bytes([0x90, 4]) + body[:2] + bytes([0, 0x87]))  # 3.9: not authorized
        until_closed(sock)

    with scripted_broker(refuses) as config:
        transport = connected(client(config))
        transport.subscribe("secret/+")
        assert final(transport) == (
            "the broker refuses the subscription to secret/+: Not authorized; check its access rules"
        )


def test_broker_without_qos_1_is_refused() -> None:
    def poor(sock: socket.socket) -> None:
        read_packet(sock)
        sock.sendall(bytes([0x20, 5, 0, 0, 2, 0x24, 0]))  # 3.2.2.3.4: maximum QoS 0
        until_closed(sock)

    with scripted_broker(poor) as config:
        transport = client(config)
        transport.start()
        assert "has no QoS 1 or no retained messages; use another" in final(transport)


def test_being_taken_over_is_final() -> None:
    def taken_over(sock: socket.socket) -> None:
        accepting(sock)
        sock.sendall(TAKEN_OVER_PACKET)
        until_closed(sock)

    with scripted_broker(taken_over) as config:
        transport = connected(client(config))
        assert final(transport) == TAKEN_OVER
        assert transport.poll(0.3) is None


def passwords(tmp_path: Path) -> str:
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    file = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", file, "ada", "right"], check=True)
    file.chmod(0o600)
    return f"allow_anonymous false\npassword_file {file}"


@broker_test
@needs_mosquitto
def test_wrong_password_is_given_up_after_three_tries_and_the_right_one_works(tmp_path: Path) -> None:
    with running_mosquitto(tmp_path, extra_config=passwords(tmp_path)) as broker:
        for word, works in (("wrong", False), ("right", True)):
            (tmp_path / "mine").write_text(word)
            config = BrokerConfig(broker.host, broker.port, username="ada", password_file=tmp_path / "mine")
            transport = client(config)
            transport.start()
            if works:
                wait_for(transport, Connected)
                transport.close()
            else:
                first = wait_for(transport, Disconnected)
                assert first.reason.startswith(f"the broker 127.0.0.1:{broker.port} refused client: Not authorized;")
                assert not first.is_final
                assert not wait_for(transport, Disconnected).is_final
                last = wait_for(transport, Disconnected)
                assert last == Disconnected(f"{first.reason} (given up after 3 tries)", is_final=True)


# TLS.


NEW_KEY = ("-newkey", "rsa:2048", "-nodes", "-subj")


def certificates(folder: Path) -> None:
    """ca.pem, and server.pem and device.pem signed by it, each with its .key; other.pem signs nothing."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")

    def run(*arguments: object) -> None:
        subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True)

    usage = ("-addext", "keyUsage=critical,keyCertSign")  # Python 3.13 refuses an authority without it
    for name in ("ca", "other"):
        files = ("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem")
        run("req", "-x509", *NEW_KEY, f"/CN={name}", *usage, *files)
    # The key identifier, too, is what Python 3.13 asks for.
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    for name in ("server", "device"):
        run("req", *NEW_KEY, f"/CN={name}", "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.csr")
        signed_by = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial")
        files = ("-in", folder / f"{name}.csr", "-extfile", folder / "names", "-out", folder / f"{name}.pem")
        run("x509", "-req", *signed_by, *files)


@broker_test
@needs_mosquitto
def test_tls_with_client_certificates(tmp_path: Path) -> None:
    certificates(tmp_path)
    extra = (
        f"cafile {tmp_path}/ca.pem\ncertfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key\n"
        "require_certificate true"
    )
    with running_mosquitto(tmp_path, extra_config=extra) as broker:

        def config(trusted: str, own: str | None) -> BrokerConfig:
            return BrokerConfig(
                broker.host,
                broker.port,
                tls=True,
                ca_file=tmp_path / f"{trusted}.pem",
                cert_file=tmp_path / f"{own}.pem" if own else None,
                key_file=tmp_path / f"{own}.key" if own else None,
            )

        good = subscribed(connected(client(config("ca", "device"))), "news/+")
        good.publish("news/x", b"x" * 100_000)  # many TLS records
        assert wait_for(good, Received).payload == b"x" * 100_000
        traffic = good.traffic()
        if sys.platform.startswith("linux"):
            assert traffic.socket_sent_bytes is not None
            assert traffic.socket_received_bytes is not None
            assert 100_000 < traffic.socket_sent_bytes < 105_000
            assert 100_000 < traffic.socket_received_bytes < 105_000
        good.close()

        wary = client(config("other", "device"))
        wary.start()
        assert final(wary).startswith(f"the certificate of 127.0.0.1:{broker.port} is not trusted: ")
        nameless = client(config("ca", None))
        nameless.start()
        assert wait_for(nameless, Disconnected).reason.endswith("does it want a client certificate?")
        nameless.close(0.0)
        plain = client(BrokerConfig(broker.host, broker.port))
        plain.start()
        assert wait_for(plain, Disconnected).reason.endswith(
            "closed the connection before it answered; does it want TLS?"
        )
        plain.close(0.0)


def test_packets_that_share_a_tls_record_are_all_read(tmp_path: Path) -> None:
    certificates(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")

    def one_record(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            read_packet(secure)
            secure.sendall(CONNACK + TAKEN_OVER_PACKET)
            until_closed(secure)

    with scripted_broker(one_record) as config:
        transport = client(BrokerConfig(config.host, config.port, tls=True, ca_file=tmp_path / "ca.pem"))
        before = time.monotonic()
        transport.start()
        assert final(transport) == TAKEN_OVER
        assert time.monotonic() - before < 10.0  # at once, and not when the peer has run out of patience


@broker_test
@needs_mosquitto
def test_tls_to_a_port_without_it_says_so(mosquitto: RunningBroker) -> None:
    transport = client(BrokerConfig(mosquitto.host, mosquitto.port, tls=True))
    transport.start()
    reason = wait_for(transport, Disconnected).reason
    assert reason.startswith(f"TLS with 127.0.0.1:{mosquitto.port} failed: ")
    assert reason.endswith("; does this port speak TLS?")
    transport.close(0.0)


def test_files_that_are_no_certificates_are_refused_before_connecting(tmp_path: Path) -> None:
    file = tmp_path / "junk.pem"
    file.write_text("junk")
    with pytest.raises(UserError, match=r"junk.pem cannot be used: .*; they must be PEM and belong together"):
        MqttTransport(BrokerConfig(tls=True, ca_file=file), "client")


# What belongs to the process.

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


@broker_test
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


@broker_test
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


PUBACK = 4


@pytest.mark.parametrize(("saves_bytes", "most_reads"), [(True, 2), (False, 5)])
def test_acknowledgements_share_a_write_where_bytes_are_saved(saves_bytes: bool, most_reads: int) -> None:
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


@broker_test
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
