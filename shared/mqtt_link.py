"""One connection to an MQTT broker, as the network thread sees it: what to ask of it, and what it reports."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, Union

from shared.outgoing import Publication


class Cause(Enum):
    """Why a connection ended or did not come about."""

    UNREACHABLE = auto()  # no TCP or TLS connection
    UNANSWERED = auto()  # connected, but no CONNACK came
    WRONG_VERSION = auto()  # the broker does not speak this version of MQTT
    CREDENTIALS = auto()  # the broker refuses who we are, or is not who we trust
    LOST = auto()  # broke, or the broker ended it, for a while
    TAKEN_OVER = auto()  # another client has our id
    UNFIT = auto()  # the broker lacks or forbids what kseed cannot do without
    GOODBYE = auto()  # we disconnected


@dataclass(frozen=True)
class Accepted:
    """The broker took the connection, with its limits (None: none named)."""

    session_present: bool
    receive_maximum: int | None
    largest_packet_bytes: int | None
    keepalive_s: int | None = None  # that it wants in place of ours


@dataclass(frozen=True)
class Answered:
    """The broker took the publication `token`, or refused it with `failure`."""

    token: int
    failure: str | None


@dataclass(frozen=True)
class Arrived:
    """A message; `packet_id` is for its acknowledgement, 0 where it needs none."""

    topic: str
    payload: bytes
    is_retained: bool
    packet_id: int


@dataclass(frozen=True)
class Subscribed:
    """The broker knows the change of `topic_filter`, or refused it with `failure`."""

    topic_filter: str
    failure: str | None


@dataclass(frozen=True)
class Ended:
    """The connection is over; nothing follows it."""

    cause: Cause
    reason: str


LinkEvent = Union[Accepted, Answered, Arrived, Subscribed, Ended]


class Link(Protocol):
    """One connection to the broker, used from the network thread alone. Its last event is Ended."""

    is_reading: bool  # False: `step` leaves what the broker sends in the socket

    def open(self) -> None:
        """Connect; raises nothing."""

    def step(self, wake: socket.socket, timeout_s: float) -> list[LinkEvent]:
        """Wait until there is something to do, `wake` is readable or the time is over; do it; what came of it."""

    def publish(self, publication: Publication) -> None:
        """Send it."""

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe, retained messages included."""

    def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""

    def acknowledge(self, packet_id: int) -> None:
        """The message has been dealt with. Does nothing once the connection is over."""

    def disconnect(self) -> None:
        """Say goodbye and close, once everything handed over has been written."""

    def abort(self) -> None:
        """Close now."""
