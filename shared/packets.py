"""Which MQTT packets a connection carried, and how long they were: its byte stream, before TLS, cut into packets.

Both versions of MQTT frame alike: a byte whose upper half is the packet's type, the length of the rest in one to four
bytes of seven bits, the rest (MQTT 5.0, section 2.1). Pure: no I/O.
"""

from __future__ import annotations

import threading
from functools import lru_cache

from shared.topics import LONGEST_TOPIC, parse_topic
from shared.transport import KindBytes

_PUBLISH = 3
_NAMES = {
    1: "connect",
    2: "connack",
    4: "puback",
    5: "pubrec",
    6: "pubrel",
    7: "pubcomp",
    8: "subscribe",
    9: "suback",
    10: "unsubscribe",
    11: "unsuback",
    12: "pingreq",
    13: "pingresp",
    14: "disconnect",
    15: "auth",
}
FOREIGN = "foreign"  # a publication on a topic that is not kseed's
BROKEN = "broken"  # what a connection had of a packet when it ended, or bytes that are no packet


class PacketStream:
    """One direction of one connection. `take` gives what has become whole."""

    def __init__(self, *, is_v5: bool) -> None:
        self._is_v5 = is_v5
        self._pending = bytearray()
        self._wanted = 2  # with fewer bytes there is nothing to find

    @property
    def pending_bytes(self) -> int:
        """What there is of a packet that is not whole."""
        return len(self._pending)

    def take(self, data: bytes) -> list[tuple[str, int, int]]:
        """Each packet that `data` completes: kind, bytes of its payload (0 but for PUBLISH), bytes of all of it."""
        found: list[tuple[str, int, int]] = []
        self._pending += data
        while len(self._pending) >= self._wanted:
            header = _variable_int(self._pending, 1)
            if header is None:
                self._wanted = len(self._pending) + 1
                break
            length, start = header
            self._wanted = start + length
            if len(self._pending) < self._wanted:
                break
            packet = self._pending[: self._wanted]
            del self._pending[: self._wanted]
            self._wanted = 2
            found.append((*self._describe(packet, start), len(packet)))
        return found

    def _describe(self, packet: bytearray, start: int) -> tuple[str, int]:
        """Kind and bytes of payload of a whole packet; `start`: where its rest begins."""
        if packet[0] >> 4 != _PUBLISH:
            return _NAMES.get(packet[0] >> 4, BROKEN), 0
        at = start + 2 + int.from_bytes(packet[start : start + 2], "big")
        kind = _kind_of(bytes(packet[start + 2 : at])) if at - start - 2 <= LONGEST_TOPIC else FOREIGN
        if packet[0] & 0x06:  # QoS 1 and 2 have a packet id
            at += 2
        if self._is_v5:
            properties = _variable_int(packet, at)
            at = sum(properties) if properties is not None else len(packet)
        return kind, max(0, len(packet) - at)


@lru_cache(maxsize=4096)  # a server hears the same devices again and again
def _kind_of(topic: bytes) -> str:
    parsed = parse_topic(topic.decode("utf-8", "replace"))
    return parsed.kind if parsed is not None else FOREIGN


def _variable_int(data: bytearray, at: int) -> tuple[int, int] | None:
    """The number that begins at `at`, and where it ends; None where it is not there in full. Four bytes at most."""
    value = 0
    for place, byte in enumerate(data[at : at + 4]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80 or place == 3:
            return value, at + place + 1
    return None


class PacketMeter:
    """All packets of a client, by kind, over its connections. Fed by the network thread, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, list[int]] = {}  # in the order of KindBytes' fields: this runs for every packet
        self.opened(is_v5=True)

    def opened(self, *, is_v5: bool) -> None:
        """A connection begins."""
        self._sent, self._received = PacketStream(is_v5=is_v5), PacketStream(is_v5=is_v5)

    def sent(self, data: bytes) -> None:
        """These bytes went out."""
        for packet in self._sent.take(data):
            self._add(0, *packet)

    def received(self, data: bytes) -> None:
        """These bytes came in."""
        for packet in self._received.take(data):
            self._add(3, *packet)

    def closed(self) -> None:
        """The connection is over; what it had of a packet went over the wire for nothing."""
        for first, stream in ((0, self._sent), (3, self._received)):
            if stream.pending_bytes:
                self._add(first, BROKEN, 0, stream.pending_bytes)
        self.opened(is_v5=True)

    def kinds(self) -> dict[str, KindBytes]:
        """What there has been so far, by kind."""
        with self._lock:
            return {kind: KindBytes(*sums) for kind, sums in self._sums.items()}

    def _add(self, first: int, kind: str, payload_bytes: int, packet_bytes: int) -> None:
        with self._lock:
            sums = self._sums.setdefault(kind, [0] * 6)
            sums[first] += 1
            sums[first + 1] += payload_bytes
            sums[first + 2] += packet_bytes
