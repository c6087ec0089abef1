"""MQTT 5, or 3.1.1 where the broker cannot, behind `shared.transport.Transport`.

`shared.mqtt_thread` decides and keeps, `shared.paho_link` speaks; this module puts them together.
"""

from __future__ import annotations

import itertools
import queue
import random

from shared.config import BrokerConfig
from shared.counted_client import Meter
from shared.mqtt_settings import Settings, tls_context
from shared.mqtt_thread import NetworkThread
from shared.outgoing import MOST_IN_FLIGHT, Publication
from shared.paho_link import PahoLink
from shared.reconnecting import MqttVersion, ReconnectPolicy
from shared.transport import Disconnected, Event, Received, TrafficCount


class MqttTransport:
    """A client of an MQTT broker; satisfies `shared.transport.Transport`.

    The session outlives the connection by `session_expiry_s` (MQTT 5). Without `manual_acknowledge` a message is
    acknowledged when `poll` hands it over; what was not handed over comes again after a restart. While the broker is
    away, each failed attempt gives one Disconnected. With `saves_bytes` acknowledgements wait some milliseconds for
    company; a server of many is faster without. Raises UserError where the TLS or password files are unusable.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        *,
        will: tuple[str, bytes] | None = None,
        manual_acknowledge: bool = False,
        session_expiry_s: int = 3600,
        most_in_flight: int = MOST_IN_FLIGHT,
        saves_bytes: bool = True,
        policy: ReconnectPolicy | None = None,
        source: random.Random | None = None,
    ) -> None:
        policy = policy or ReconnectPolicy(longest_s=broker.reconnect_longest_s)
        settings = Settings(
            broker,
            broker.password(),
            tls_context(broker),
            client_id,
            will,
            session_expiry_s,
            policy.answer_timeout_s,
            saves_bytes,
        )
        self._meter = meter = Meter()

        def connect(version: MqttVersion) -> PahoLink:
            return PahoLink(settings, version, meter)

        self._thread = NetworkThread(connect, policy, source or random.Random(), most_in_flight)
        self._is_manual = manual_acknowledge
        self._tokens = itertools.count(1)
        self._is_closed = False

    def start(self) -> None:
        """Begin connecting, in the background."""
        self._thread.start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Queue a QoS 1 publication; returns its token."""
        token = next(self._tokens)
        self._thread.publish(Publication(token, topic, bytes(payload), retain))
        return token

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe now and after every reconnect."""
        self._thread.change_filter(topic_filter, is_wanted=True)

    def unsubscribe(self, topic_filter: str) -> None:
        """End a subscription."""
        self._thread.change_filter(topic_filter, is_wanted=False)

    def poll(self, timeout_s: float) -> Event | None:
        """The next event, waiting up to `timeout_s` seconds."""
        if self._is_closed:
            return None
        try:
            event = self._thread.events.get(timeout=timeout_s) if timeout_s > 0 else self._thread.events.get_nowait()
        except queue.Empty:
            if not self._thread.has_died:
                return None
            self._is_closed = True
            return Disconnected("the network thread has died; this is a bug", is_final=True)
        self._thread.has_read(event)
        if isinstance(event, Received) and not self._is_manual:
            event.acknowledge()
        return event

    def traffic(self) -> TrafficCount:
        """What went over the wire so far."""
        return self._meter.count()

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, then disconnect cleanly."""
        self._thread.close(timeout_s)
        self._is_closed = True
