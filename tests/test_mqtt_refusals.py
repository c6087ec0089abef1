"""What a broker limits or refuses, and how the MQTT transport tells it."""

from __future__ import annotations

import select
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from shared.config import BrokerConfig
from shared.outgoing import Publication
from shared.transport import TAKEN_OVER, Connected, Delivered, Disconnected, Undelivered
from tests.brokers import config_of, needs_mosquitto, running_mosquitto
from tests.scripted_broker import TAKEN_OVER as TAKEN_OVER_PACKET
from tests.scripted_broker import accepting, read_packet, scripted_broker, until_closed
from tests.transport_clients import client, connected, final, wait_for


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


@pytest.mark.broker
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


@pytest.mark.broker
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


@pytest.mark.broker
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
