"""A byte stream cut into MQTT packets, whatever pieces it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import packets
from shared.packets import BROKEN, FOREIGN, PacketMeter, PacketStream
from shared.topics import LONGEST_TOPIC, Topic
from shared.transport import KindBytes

TOPIC = b"kseed/spring/update/ann"


def publish(topic: bytes, payload: bytes, *, qos: int = 1, properties: bytes | None = b"") -> bytes:
    """MQTT 5.0, 3.3; properties None: 3.1.1."""
    rest = len(topic).to_bytes(2, "big") + topic + (b"\x00\x07" if qos else b"")
    rest += payload if properties is None else bytes([len(properties)]) + properties + payload
    low, high = len(rest) % 128, len(rest) // 128
    return bytes([0x30 | qos << 1]) + (bytes([low | 0x80, high]) if high else bytes([low])) + rest


PACKETS = [
    (bytes([0x10, 3]) + b"abc", ("connect", 0, 5)),
    (publish(TOPIC, b"x" * 300), ("update", 300, 331)),
    (bytes([0x40, 2, 0, 7]), ("puback", 0, 4)),
    (publish(b"kseed/spring/plan", b"yy", properties=b"\x01\x02\x03"), ("plan", 2, 29)),
    (publish(b"kseed/spring/run", b"", qos=0), ("run", 0, 21)),
    (publish(b"news/\xff", b"abc"), (FOREIGN, 3, 16)),
    (bytes([0xC0, 0]), ("pingreq", 0, 2)),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_every_packet_is_found_in_pieces_of_any_size(size: int) -> None:
    data = b"".join(packet for packet, _ in PACKETS)
    stream = PacketStream(is_v5=True)
    found = [one for at in range(0, len(data), size) for one in stream.take(data[at : at + size])]
    assert found == [expected for _, expected in PACKETS]
    assert stream.pending_bytes == 0


def test_mqtt_3_has_no_properties_in_a_publication() -> None:
    packet = publish(TOPIC, b"\x05hello", properties=None)
    assert list(PacketStream(is_v5=False).take(packet)) == [("update", 6, len(packet))]


def test_topics_that_nobody_has_are_not_remembered() -> None:
    stream, before = PacketStream(is_v5=True), packets._kind_of.cache_info().currsize
    for number in range(20):
        topic = TOPIC + b"%016d" % number * 100  # a peer may choose 64 KB
        assert [kind for kind, _, _ in stream.take(publish(topic, b""))] == [FOREIGN]
    longest = str(Topic("r" * 64, "presence", "d" * 64)).encode()
    assert len(longest) == LONGEST_TOPIC
    assert [kind for kind, _, _ in stream.take(publish(longest, b""))] == ["presence"]
    assert packets._kind_of.cache_info().currsize <= before + 1


@given(st.lists(st.binary(max_size=40), max_size=20), st.booleans())
def test_no_bytes_break_it_and_none_is_lost(pieces: list[bytes], is_v5: bool) -> None:
    stream = PacketStream(is_v5=is_v5)
    found = [one for piece in pieces for one in stream.take(piece)]
    assert sum(whole for _, _, whole in found) + stream.pending_bytes == sum(map(len, pieces))
    assert all(0 <= payload <= whole for _, payload, whole in found)


def test_meter_sums_by_kind_in_both_directions_over_connections() -> None:
    meter = PacketMeter()
    for _ in range(2):
        meter.opened(is_v5=True)
        meter.sent(PACKETS[1][0])
        meter.received(PACKETS[2][0] + PACKETS[3][0])
        meter.closed()
    assert meter.kinds() == {
        "update": KindBytes(2, 600, 662, 0, 0, 0),
        "puback": KindBytes(0, 0, 0, 2, 0, 8),
        "plan": KindBytes(0, 0, 0, 2, 4, 58),
    }


def test_half_a_packet_at_the_end_of_a_connection_is_counted_as_broken() -> None:
    meter = PacketMeter()
    meter.opened(is_v5=True)
    meter.sent(PACKETS[1][0][:100])
    meter.closed()
    meter.opened(is_v5=True)
    meter.sent(PACKETS[1][0])
    assert meter.kinds() == {BROKEN: KindBytes(1, 0, 100, 0, 0, 0), "update": KindBytes(1, 300, 331, 0, 0, 0)}
