"""Counts of bytes as values, and what the aggregator says of them."""

from __future__ import annotations

import msgspec

from aggregator.reports import Traffic
from aggregator.telling import traffic_text
from shared.transport import KindBytes, TrafficCount

BEFORE = TrafficCount(1, 2, 3, 4, 5, 6, 7, 8, {"plan": KindBytes(received_packets=1, received_mqtt_bytes=50)})
AFTER = TrafficCount(
    11,
    22,
    33,
    44,
    55,
    66,
    77,
    88,
    {"plan": KindBytes(received_packets=1, received_mqtt_bytes=50), "update": KindBytes(1, 400, 430)},
)


def test_traffic_of_a_round_is_the_difference_of_two_counts() -> None:
    expected = TrafficCount(10, 20, 30, 40, 50, 60, 70, 80, {"update": KindBytes(1, 400, 430)})
    assert AFTER.since(BEFORE) == expected


def test_a_layer_that_was_unknown_once_is_unknown_between() -> None:
    bare = TrafficCount(1, 2, None, None)
    between = AFTER.since(bare)
    assert (between.payload_sent_bytes, between.socket_sent_bytes, between.ip_sent_bytes) == (10, None, None)


def test_counts_survive_the_metrics_file_and_the_store() -> None:
    assert msgspec.json.decode(msgspec.json.encode(AFTER), type=Traffic) == AFTER
    old = b'{"payload_sent_bytes":1,"payload_received_bytes":2,"socket_sent_bytes":3,"socket_received_bytes":null}'
    assert msgspec.json.decode(old, type=Traffic) == TrafficCount(1, 2, 3, None)


def test_only_the_layers_that_are_known_are_told() -> None:
    assert traffic_text(TrafficCount(1, 2, None, None)) == "payload 1 B sent, 2 B received"
    assert traffic_text(AFTER) == "payload 11 B sent, 22 B received, MQTT 55 + 66, TCP/IP with TLS 77 + 88"
