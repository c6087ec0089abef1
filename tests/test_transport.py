"""What every transport does alike: the same sentences hold for the in-process network and for real brokers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.loopback import LoopbackNetwork
from shared.mqtt import MqttTransport
from shared.reconnecting import ReconnectPolicy
from shared.transport import Connected, Delivered, Received, Transport
from tests.brokers import config_of, needs_mosquitto, running_broker
from tests.transport_clients import connected, subscribed, wait_for

Make = Callable[..., Transport]


@pytest.fixture(
    params=[
        "in-process",
        pytest.param("mosquitto", marks=[needs_mosquitto, pytest.mark.broker]),
        pytest.param("amqtt", marks=pytest.mark.broker),
    ]
)
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Make]]:
    """The kind of network, and what makes an unstarted client of it."""
    made: list[Transport] = []
    kind = request.param

    def remembered(transport: Transport) -> Transport:
        made.append(transport)
        return transport

    if kind == "in-process":
        inside = LoopbackNetwork()
        yield kind, lambda client_id, **more: remembered(inside.transport(client_id, **more))
        return
    if kind == "amqtt":
        pytest.importorskip("amqtt")
    with running_broker(tmp_path, kind) as broker:
        config = config_of(broker)
        # amqtt does not answer an MQTT 5 client at all: every connection waits out this time once.
        policy = ReconnectPolicy(answer_timeout_s=1.0 if kind == "amqtt" else 5.0)
        yield kind, lambda client_id, **more: remembered(MqttTransport(config, client_id, policy=policy, **more))
        for transport in made:
            transport.close(1.0)


@pytest.fixture
def make(network: tuple[str, Make]) -> Make:
    return network[1]


def test_publication_reaches_subscribers_and_is_reported_delivered(make: Make) -> None:
    receiver = subscribed(connected(make("receiver")), "news/+")
    sender = connected(make("sender"))
    token = sender.publish("news/x", b"\x00\xff")
    assert wait_for(sender, Delivered) == Delivered(token)
    assert wait_for(receiver, Received) == Received("news/x", b"\x00\xff", is_retained=False)


def test_publications_of_one_client_arrive_in_order(make: Make) -> None:
    receiver = subscribed(connected(make("receiver")), "news/+")
    sender = make("sender")
    # mosquitto 2.0.11 mixes the order up when more wait for a receiver than its window of 100 takes.
    payloads = [str(number).encode() for number in range(80)]
    for payload in payloads:  # before it is connected
        sender.publish("news/x", payload)
    sender.start()
    assert [wait_for(receiver, Received).payload for _ in payloads] == payloads


def test_retained_message_comes_to_a_later_subscriber_once_per_subscription(make: Make) -> None:
    sender = connected(make("sender"))
    sender.publish("state/x", b"old", retain=True)
    sender.publish("state/x", b"new", retain=True)
    for _ in range(2):
        wait_for(sender, Delivered)
    receiver = connected(make("receiver"))
    for _ in range(2):
        receiver.subscribe("state/+")
        assert wait_for(receiver, Received) == Received("state/x", b"new", is_retained=True)
        receiver.unsubscribe("state/+")
    subscribed(receiver, "none")  # would have seen another copy first


def test_retained_message_is_removed_by_an_empty_one(make: Make) -> None:
    sender = connected(make("sender"))
    sender.publish("state/x", b"old", retain=True)
    sender.publish("state/x", b"", retain=True)
    for _ in range(2):
        wait_for(sender, Delivered)
    receiver = connected(make("receiver"))
    receiver.subscribe("state/+")
    subscribed(receiver, "none")  # would have seen the retained message first


def test_unsubscribed_client_hears_no_more(make: Make) -> None:
    receiver = subscribed(connected(make("receiver")), "news/+")
    receiver.unsubscribe("news/+")
    subscribed(receiver, "other/+")  # the broker has handled the unsubscription
    sender = connected(make("sender"))
    sender.publish("news/x", b"a")
    sender.publish("other/x", b"b")
    assert wait_for(receiver, Received).payload == b"b"


def test_will_is_not_published_after_a_clean_close(make: Make) -> None:
    watcher = subscribed(connected(make("watcher")), "state/+")
    client = connected(make("client", will=("state/client", b"gone")))
    client.publish("state/client", b"bye", retain=True)
    client.close()
    assert wait_for(watcher, Received).payload == b"bye"
    subscribed(watcher, "none")  # would have seen the will first


def test_closing_sends_what_is_queued_and_no_event_follows(network: tuple[str, Make]) -> None:
    kind, make = network
    if kind == "amqtt" and sys.version_info >= (3, 12):
        pytest.skip("amqtt loses what it took from a client just before that left, from Python 3.12 on")
    receiver = subscribed(connected(make("receiver")), "news/+")
    sender = make("sender")
    for number in range(100):
        sender.publish("news/x", str(number).encode())
    sender.start()
    sender.close()
    assert sender.poll(0) is None
    assert [wait_for(receiver, Received).payload for _ in range(100)] == [str(n).encode() for n in range(100)]


def test_payload_bytes_are_counted_in_both_directions(make: Make) -> None:
    client = subscribed(connected(make("client")), "news/+")
    before = client.traffic()
    client.publish("news/x", b"x" * 1000)
    wait_for(client, Received)
    after = client.traffic()
    assert after.payload_sent_bytes - before.payload_sent_bytes == 1000
    assert after.payload_received_bytes - before.payload_received_bytes == 1000


def test_session_keeps_what_arrives_while_its_client_is_away(network: tuple[str, Make]) -> None:
    kind, make = network
    if kind == "amqtt":
        pytest.skip("amqtt keeps sessions only of clients that log in")
    subscribed(connected(make("receiver")), "news/+").close()
    sender = connected(make("sender"))
    sender.publish("news/x", b"a")
    wait_for(sender, Delivered)
    receiver = make("receiver")
    receiver.start()
    assert wait_for(receiver, Connected).session_present
    assert wait_for(receiver, Received).payload == b"a"


def test_unacknowledged_message_comes_again_to_the_next_process(network: tuple[str, Make]) -> None:
    kind, make = network
    if kind == "amqtt":
        pytest.skip("amqtt does not redeliver")
    receiver = subscribed(connected(make("receiver", manual_acknowledge=True)), "news/+")
    sender = connected(make("sender"))
    for payload in (b"a", b"b"):
        sender.publish("news/x", payload)
    wait_for(receiver, Received).acknowledge()
    assert wait_for(receiver, Received).payload == b"b"
    receiver.close()
    again = connected(make("receiver"))
    assert wait_for(again, Received).payload == b"b"
