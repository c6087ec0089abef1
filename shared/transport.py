"""What a service needs of a message network: publish, subscribe, and a queue of events to read.

Two implementations share this interface: `shared.mqtt.MqttTransport` (a real broker) and
`shared.loopback.LoopbackTransport` (in-process, with faults, for tests). Network threads only fill the queue;
everything that decides or computes runs on the thread that calls `poll`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Protocol, Union

TAKEN_OVER = "another client connected with this client id and took over the session; two devices must not share an id"


@dataclass(frozen=True)
class Connected:
    """The broker accepted the connection (first or again). Subscriptions made before are in force again."""

    protocol: str  # "MQTT 5" or "MQTT 3.1.1" or "in-process"
    session_present: bool
    largest_packet_bytes: int | None = field(compare=False, default=None)  # that the broker takes; None: it did not say


@dataclass(frozen=True)
class Disconnected:
    """The connection is gone; the transport reconnects by itself unless `is_final`."""

    reason: str
    is_final: bool = False  # taken over, refused credentials given up, or closed


@dataclass(frozen=True)
class Received:
    """A message. `acknowledge` tells the broker it has been dealt with (durably, if the receiver promises that)."""

    topic: str
    payload: bytes
    is_retained: bool
    acknowledge: Callable[[], None] = field(compare=False, repr=False, default=lambda: None)


@dataclass(frozen=True)
class Delivered:
    """The broker took the publication `token`. Not end-to-end: only a receipt is."""

    token: int
    took_s: float | None = field(compare=False, default=None)  # from the socket to the broker's answer


@dataclass(frozen=True)
class Undelivered:
    """The broker or the limits refused the publication `token`; `reason` says why. It is not retried."""

    token: int
    reason: str


Event = Union[Connected, Disconnected, Received, Delivered, Undelivered]


@dataclass(frozen=True)
class KindBytes:
    """Whole MQTT packets of one kind, each way: how many, their payloads, all of them. TLS and TCP/IP not counted."""

    sent_packets: int = 0
    sent_payload_bytes: int = 0
    sent_mqtt_bytes: int = 0
    received_packets: int = 0
    received_payload_bytes: int = 0
    received_mqtt_bytes: int = 0

    def __add__(self, other: KindBytes) -> KindBytes:
        return KindBytes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: KindBytes) -> KindBytes:
        return KindBytes(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class TrafficCount:
    """Bytes since the transport was made, across reconnects, in layers that contain each other.

    None: this platform, or this transport, cannot tell. `kinds`: MQTT packets by kind, those of `shared.topics` and
    MQTT's own in lower case ("puback"); their sums are the payload and MQTT layers.
    """

    payload_sent_bytes: int
    payload_received_bytes: int
    socket_sent_bytes: int | None  # TCP payload, each byte once: MQTT with TLS around it
    socket_received_bytes: int | None
    mqtt_sent_bytes: int | None = None
    mqtt_received_bytes: int | None = None
    ip_sent_bytes: int | None = None  # TCP/IP with TLS: headers, handshakes and retransmissions too
    ip_received_bytes: int | None = None
    kinds: Mapping[str, KindBytes] = field(default_factory=dict)

    def since(self, before: TrafficCount) -> TrafficCount:
        """What went over the wire from `before` until this count; kinds that did not are left out."""

        def known(now: int | None, was: int | None) -> int | None:
            return None if now is None or was is None else now - was

        kinds = {name: count - before.kinds.get(name, KindBytes()) for name, count in self.kinds.items()}
        return TrafficCount(
            self.payload_sent_bytes - before.payload_sent_bytes,
            self.payload_received_bytes - before.payload_received_bytes,
            known(self.socket_sent_bytes, before.socket_sent_bytes),
            known(self.socket_received_bytes, before.socket_received_bytes),
            known(self.mqtt_sent_bytes, before.mqtt_sent_bytes),
            known(self.mqtt_received_bytes, before.mqtt_received_bytes),
            known(self.ip_sent_bytes, before.ip_sent_bytes),
            known(self.ip_received_bytes, before.ip_received_bytes),
            {name: count for name, count in kinds.items() if count != KindBytes()},
        )


class Transport(Protocol):
    """A client of the message network. Not thread-safe except `poll`'s queue; use it from one thread."""

    def start(self) -> None:
        """Begin connecting, in the background. The result arrives as Connected or Disconnected events."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Queue a QoS 1 publication, in order, also while offline; returns its token."""

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe (QoS 1) now and after every reconnect; retained messages are sent once per call."""

    def unsubscribe(self, topic_filter: str) -> None:
        """End a subscription."""

    def poll(self, timeout_s: float) -> Event | None:
        """The next event, waiting up to `timeout_s` seconds (0: do not wait); None if there is none."""

    def traffic(self) -> TrafficCount:
        """What went over the wire so far."""

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued (up to `timeout_s` seconds), then disconnect cleanly. No event follows."""
