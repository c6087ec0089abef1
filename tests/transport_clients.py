"""Clients of a network as tests drive them: connected, subscribed, and waited for."""

from __future__ import annotations

import itertools
import time
from typing import TypeVar

from shared.config import BrokerConfig
from shared.mqtt import MqttTransport
from shared.reconnecting import ReconnectPolicy
from shared.transport import Connected, Delivered, Disconnected, Received, Transport

E = TypeVar("E")
DEADLINE_S = 60.0
FAST = ReconnectPolicy(first_s=0.05, longest_s=0.2, refused_s=0.05, refused_longest_s=0.1)
MARKS = itertools.count()


def client(
    config: BrokerConfig, client_id: str = "client", policy: ReconnectPolicy = FAST, **more: object
) -> MqttTransport:
    return MqttTransport(config, client_id, policy=policy, **more)  # type: ignore[arg-type]


def wait_for(transport: Transport, kind: type[E] | tuple[type[E], ...]) -> E:
    """The next event of `kind`; others are passed over."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        event = transport.poll(0.5)
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind} within {DEADLINE_S} s")


def final(transport: Transport) -> str:
    for _ in range(20):
        event = wait_for(transport, Disconnected)
        if event.is_final:
            return event.reason
    raise AssertionError("it goes on trying")


def connected(transport: Transport) -> Transport:
    transport.start()
    wait_for(transport, Connected)
    return transport


def subscribed(transport: Transport, topic_filter: str) -> Transport:
    """Subscribe, and wait until the broker has it: what one sends oneself after it comes back.

    The mark is retained, because amqtt does not keep the order of a subscription and a publication that follow each
    other at once (seen from Python 3.12 on).
    """
    mark_topic = f"marks/{next(MARKS)}"
    transport.subscribe(topic_filter)
    transport.subscribe(mark_topic)
    token = transport.publish(mark_topic, b"mark", retain=True)
    events = [wait_for(transport, (Received, Delivered)) for _ in range(2)]  # in either order
    assert Delivered(token) in events  # else a broken connection would send it a second time
    mark = next(event for event in events if isinstance(event, Received))
    assert mark.payload == b"mark"
    mark.acknowledge()
    transport.unsubscribe(mark_topic)
    return transport
