"""The soak's proxy: the packets it cuts out of the stream, its witness, and what it does to a connection."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.messages import Receipt, Update
from shared.refusals import Refusal
from shared.wire import encode
from tools.certificates import make_certificates
from tools.soak import _server_side
from tools.soak_packets import Packets, Published, doubled, kind_of, published, version_of
from tools.soak_proxy import Proxy
from tools.soak_schedule import Weather
from tools.soak_witness import Witness

# --- packets

CONNECT_5 = bytes.fromhex("100f00044d5154540502003c0000026161")
CONNECT_311 = bytes.fromhex("100e00044d5154540402003c00026161")
PUBLISH_5 = bytes([0x33, 3 + 2 + 2 + 3 + 4]) + b"\0\3a/b" + b"\0\x09" + bytes([2, 1, 1]) + b"data"
PUBLISH_311 = bytes([0x32, 3 + 2 + 2 + 4]) + b"\0\3a/b" + b"\0\x09" + b"data"
LONG = bytes([0x30, 0xC8, 0x01]) + b"\0\1a" + b"x" * 197


@pytest.mark.parametrize("stride", [1, 2, 7, 1000])
def test_packets_are_cut_at_their_ends_however_the_bytes_come(stride: int) -> None:
    sent = [CONNECT_5, PUBLISH_5, LONG, bytes([0xC0, 0]), PUBLISH_311]
    stream, packets = b"".join(sent), Packets()
    got = [packet for at in range(0, len(stream), stride) for packet in packets.feed(stream[at : at + stride])]
    assert got == sent


def test_a_length_of_five_bytes_is_no_mqtt() -> None:
    with pytest.raises(ValueError, match="no MQTT"):
        Packets().feed(bytes([0x30, 0xFF, 0xFF, 0xFF, 0xFF, 1]))


def test_the_version_of_a_connection_is_read_from_its_first_packet() -> None:
    assert [version_of(CONNECT_5), version_of(CONNECT_311)] == [5, 4]


def test_a_publication_is_read_in_both_versions() -> None:
    assert published(PUBLISH_5, 5) == Published("a/b", b"data", 1, True)
    assert published(PUBLISH_311, 4) == Published("a/b", b"data", 1, False)
    assert published(LONG, 4) == Published("a", b"x" * 197, 0, False)


def test_a_double_differs_in_its_flag_alone() -> None:
    again = doubled(PUBLISH_311)
    assert kind_of(again) == kind_of(PUBLISH_311)
    assert again[0] == 0x3A
    assert again[1:] == PUBLISH_311[1:]


# --- the witness


def an_update(number: int) -> Update:
    return Update(number, 10, 1.0, None, None, b"\0" * 16, b"\0\0\0\0", None)


def test_the_witness_keeps_updates_and_receipts_and_names_what_does_not_decode() -> None:
    witness = Witness()
    payload = encode(an_update(3))
    for topic, sent in (
        ("kseed/soak/update/ash", payload),
        ("kseed/soak/receipt/ash", encode(Receipt(3, int(Refusal.ACCEPTED), ""))),
        ("kseed/soak/receipt/ash", encode(Receipt(2, int(Refusal.STALE_ROUND), ""))),
        ("kseed/soak/update/birch", b"\1"),
        ("elsewhere", b""),
    ):
        witness.see(Published(topic, sent, 1, False))
    assert dict(witness.updates) == {(3, "ash"): {payload}}
    assert witness.settled == {(3, "ash")}
    assert dict(witness.receipts) == {"ACCEPTED": 1, "STALE_ROUND": 1}
    assert len(witness.unreadable) == 1
    assert [witness.has_reached("birch", stage) for stage in ("started", "heard", "at work")] == [True, True, True]
    witness.forget("birch")
    assert [witness.has_reached("birch", stage) for stage in ("started", "heard", "at work")] == [True, False, False]
    assert witness.has_reached("aggregator", "at work")
    assert witness.passed() == {"receipt": 2, "update": 2}


# --- the proxy

CALM = Weather("calm", (0.0, 0.0))


class Line:
    """A client and a broker made of bare sockets, with the proxy between them."""

    def __init__(self, weather: Weather) -> None:
        self.witness = Witness()
        listener = socket.create_server(("127.0.0.1", 0))
        self.proxy = Proxy(listener.getsockname()[1], 1, weather, self.witness)
        self.proxy.start()
        self.client = socket.create_connection(("127.0.0.1", self.proxy.port), timeout=10.0)
        self.broker, _ = listener.accept()
        self.broker.settimeout(10.0)
        listener.close()

    def close(self) -> None:
        self.proxy.close()
        self.client.close()
        self.broker.close()


@pytest.fixture
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    made = Line(getattr(request, "param", CALM))
    yield made
    made.close()


def read(end: socket.socket, size: int) -> bytes:
    """`size` bytes, or those before the end of the connection."""
    got = b""
    while len(got) < size:
        try:
            data = end.recv(size - len(got))
        except ConnectionResetError:
            return got
        if not data:
            return got
        got += data
    return got


def test_the_proxy_passes_packets_on_in_both_directions(line: Line) -> None:
    line.client.sendall(CONNECT_311 + PUBLISH_311)
    assert read(line.broker, len(CONNECT_311 + PUBLISH_311)) == CONNECT_311 + PUBLISH_311
    line.broker.sendall(LONG)
    assert read(line.client, len(LONG)) == LONG
    assert line.proxy.count.old_connections == 1


@pytest.mark.parametrize("line", [Weather("double", (0.0, 0.0), doubled=1.0)], indirect=True)
def test_the_proxy_doubles_a_publication_with_its_flag(line: Line) -> None:
    line.client.sendall(CONNECT_5 + PUBLISH_5)
    expected = CONNECT_5 + PUBLISH_5 + doubled(PUBLISH_5)
    assert read(line.broker, len(expected)) == expected


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_proxy_can_speak_tls_to_clients_and_still_sees_what_passes(tmp_path: Path) -> None:
    files = make_certificates(tmp_path, ["127.0.0.1"])
    witness = Witness()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(listener.getsockname()[1], 1, CALM, witness, _server_side(files))
        proxy.start()
        try:
            bare = socket.create_connection(("127.0.0.1", proxy.port), timeout=10.0)
            trust = ssl.create_default_context(cafile=files.ca)
            with trust.wrap_socket(bare, server_hostname="127.0.0.1") as client:
                broker, _ = listener.accept()
                broker.settimeout(10.0)
                sent = encode(an_update(3))
                topic = b"kseed/soak/update/ash"
                packet = b"\0" + bytes([len(topic)]) + topic + b"\0\1" + sent
                client.sendall(CONNECT_311 + bytes([0x32, len(packet)]) + packet)
                size = len(CONNECT_311) + 2 + len(packet)
                assert read(broker, size).endswith(sent)
                broker.close()
        finally:
            proxy.close()
    assert dict(witness.updates) == {(3, "ash"): {sent}}


def test_a_cut_ends_both_sides(line: Line) -> None:
    line.client.sendall(CONNECT_311)
    assert read(line.broker, len(CONNECT_311)) == CONNECT_311
    line.proxy.cut(0.5, is_torn=False)
    assert read(line.broker, 1) == b""
    assert read(line.client, 1) == b""


def test_a_torn_packet_arrives_in_part_and_is_the_last(line: Line) -> None:
    line.client.sendall(CONNECT_311)
    assert read(line.broker, len(CONNECT_311)) == CONNECT_311
    line.proxy.cut(None, is_torn=True)
    line.client.sendall(LONG)
    got = read(line.broker, len(LONG))
    assert 0 < len(got) < len(LONG)
    assert LONG.startswith(got)
    assert line.proxy.count.torn == 1


def test_who_finds_no_broker_behind_the_proxy_is_turned_away(line: Line) -> None:
    with socket.create_connection(("127.0.0.1", line.proxy.port), timeout=10.0) as second:
        assert read(second, 1) == b""
    assert line.proxy.count.refused == 1


def test_a_moment_is_when_the_next_message_of_its_kind_passes(line: Line) -> None:
    assert not line.witness.wait_for("update", 0.0)
    waiting = threading.Event()
    seen: list[bool] = []

    def wait() -> None:
        waiting.set()
        seen.append(line.witness.wait_for("update", 10.0))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    while thread.is_alive():  # the first may pass before the thread waits
        line.witness.see(Published("kseed/soak/update/ash", encode(an_update(0)), 1, False))
        thread.join(0.01)
    assert seen == [True]
