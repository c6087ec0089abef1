"""One MQTT connection through one paho client. With `counted_client`, the only module that knows paho.

paho's own thread is not used: an exception in a callback kills it while `is_connected()` stays true (paho 2.2.0).
`shared.mqtt_thread` runs this link through paho's interface for external loops, and every connection gets a new paho
client, so that none of paho's queues, packet ids and states outlives a connection. Quirks are noted where they bite.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from shared.counted_client import CountedClient, Meter
from shared.mqtt_link import Accepted, Answered, Arrived, Cause, Ended, LinkEvent, Subscribed
from shared.mqtt_settings import REFUSED_CREDENTIALS, Settings, explain_error, explain_refusal, explain_silence
from shared.outgoing import Publication
from shared.reconnecting import MqttVersion
from shared.transport import TAKEN_OVER

# Longer than anything the protocol allows; the broker drops what is longer instead of sending it (MQTT 5).
LARGEST_PACKET_BYTES = 16 * 2**20
# How many messages the broker sends ahead of our acknowledgements, which may wait for a disk.
MOST_UNACKNOWLEDGED = 100
# How long an acknowledgement waits for others, where bytes are to be saved: a segment and its TLS record cost 74 bytes,
# it has 4. Less than the 40 ms after which Linux acknowledges the segment itself. At most so many: the broker waits.
_HOLD_ACKNOWLEDGEMENTS_S = 0.02
_MOST_HELD = 16
_QOS = 1
_TAKEN_OVER = 0x8E


class PahoLink:
    """One connection through one paho client; satisfies `shared.mqtt_link.Link`."""

    def __init__(self, settings: Settings, version: MqttVersion, meter: Meter) -> None:
        self._settings = settings
        self._meter = meter
        self._is_v5 = version == "MQTT 5"
        self._events: list[LinkEvent] = []
        self._tokens: dict[int, int] = {}  # of publications, by packet id
        self._filters: dict[int, str] = {}  # of subscriptions under way, by packet id
        self._held: list[int] = []  # packet ids to acknowledge
        self._held_until_s = 0.0
        self._is_accepted = False
        self._is_over = False
        self.is_reading = True
        self._verdict: Ended | None = None  # why the socket will close, where we know before paho does
        self._answer_by_s = 0.0
        self._client = self._new_client()

    def _new_client(self) -> CountedClient:
        settings = self._settings
        client = CountedClient(
            self._meter.packets,
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if self._is_v5 else MQTTProtocolVersion.MQTTv311,
            clean_session=None if self._is_v5 else False,
            manual_ack=True,
            reconnect_on_failure=False,  # else paho 2.2.0 answers a refused 3.1.1 by trying 3.1
        )
        client.connect_timeout = settings.answer_timeout_s
        if settings.will is not None:
            client.will_set(*settings.will, qos=_QOS, retain=True)
        if settings.broker.username is not None:
            client.username_pw_set(settings.broker.username, settings.password)
        if settings.tls is not None:
            client.tls_set_context(settings.tls)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_subscribe
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        # Being set, it keeps paho 2.2.0 from writing to the socket in the middle of publish() and ack().
        client.on_socket_register_write = lambda _client, _data, _sock: None
        return client

    # For the network thread.

    def open(self) -> None:
        """Connect and send CONNECT."""
        broker = self._settings.broker
        self._answer_by_s = time.monotonic() + 3 * self._settings.answer_timeout_s
        try:
            if self._is_v5:
                properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
                properties.SessionExpiryInterval = self._settings.session_expiry_s
                properties.MaximumPacketSize = LARGEST_PACKET_BYTES
                properties.ReceiveMaximum = MOST_UNACKNOWLEDGED
                self._client.connect(
                    broker.host, broker.port, broker.keepalive_s, clean_start=False, properties=properties
                )
            else:
                self._client.connect(broker.host, broker.port, broker.keepalive_s)
        # ValueError: a host name that IDNA cannot encode. The socket of a failed TLS handshake is closed by the garbage
        # collector, which warns: paho 2.2.0 lets go of it and gives it to nobody.
        except (OSError, ValueError) as error:
            self._end(*explain_error(error, self._settings))
        self._answer_by_s = time.monotonic() + self._settings.answer_timeout_s

    def step(self, wake: socket.socket, timeout_s: float) -> list[LinkEvent]:
        """Read, write and keep alive."""
        sock: Any = self._client.socket()
        if sock is not None:
            if self._events:  # from a call between two steps
                timeout_s = 0.0
            elif not self._is_accepted:
                timeout_s = min(timeout_s, max(self._answer_by_s - time.monotonic(), 0.0))
            timeout_s = self._send_held(timeout_s)
            has_pending = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0  # select does not see what TLS holds
            writers = [sock] if self._client.want_write() else []
            readers = [sock, wake] if self.is_reading or not self._is_accepted else [wake]
            has_pending = has_pending and sock in readers
            readable, writable, _ = select.select(readers, writers, [], 0 if has_pending else timeout_s)
            if has_pending or sock in readable:
                self._client.loop_read()
                self._delay_tcp_acknowledgements()
            if writable:
                self._client.loop_write()
            self._client.loop_misc()
            if not self._is_accepted and time.monotonic() >= self._answer_by_s:
                self._end(Cause.UNANSWERED, f"{self._settings.address} does not answer; is it an MQTT broker?")
                self.abort()
        if self._client.socket() is None:
            # paho 2.2.0 closes the socket without on_disconnect where it meets bytes that are not MQTT.
            self._end(Cause.LOST if self._is_accepted else Cause.UNANSWERED, "the connection broke")
        events, self._events = self._events, []
        return events

    def publish(self, publication: Publication) -> None:
        """Send PUBLISH."""
        try:
            sent = self._client.publish(publication.topic, publication.payload, _QOS, publication.retain)
        except ValueError as error:  # a topic or a length that no broker takes
            self._events.append(Answered(publication.token, f"{publication.topic}: {error}"))
            return
        if sent.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:  # else the connection is gone, and Ended follows
            self._tokens[sent.mid] = publication.token

    def subscribe(self, topic_filter: str) -> None:
        """Send SUBSCRIBE."""
        if self._is_v5:
            options = SubscribeOptions(qos=_QOS, retainHandling=SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE)
            _, packet_id = self._client.subscribe(topic_filter, options=options)
        else:
            _, packet_id = self._client.subscribe(topic_filter, _QOS)
        if packet_id is not None:
            self._filters[packet_id] = topic_filter

    def unsubscribe(self, topic_filter: str) -> None:
        """Send UNSUBSCRIBE."""
        _, packet_id = self._client.unsubscribe(topic_filter)
        if packet_id is not None:
            self._filters[packet_id] = topic_filter

    def acknowledge(self, packet_id: int) -> None:
        """Send PUBACK."""
        if packet_id and not self._is_over:
            if not self._settings.saves_bytes:
                self._client.ack(packet_id, _QOS)
                return
            if not self._held:
                self._held_until_s = time.monotonic() + _HOLD_ACKNOWLEDGEMENTS_S
            self._held.append(packet_id)

    def _send_held(self, timeout_s: float) -> float:
        """Send the acknowledgements if it is time or something else goes out; `timeout_s`, or when it will be time."""
        if not self._held:
            return timeout_s
        left_s = self._held_until_s - time.monotonic()
        if left_s > 0 and len(self._held) < _MOST_HELD and not self._client.want_write():
            return min(timeout_s, left_s)
        for packet_id in self._held:
            self._client.ack(packet_id, _QOS)
        self._held.clear()
        return timeout_s

    def _delay_tcp_acknowledgements(self) -> None:
        """Let TCP's acknowledgement wait for something to go with; Linux forgets that after some milliseconds."""
        sock: Any = self._client.socket()
        if self._settings.saves_bytes and sock is not None and hasattr(socket, "TCP_QUICKACK"):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)

    def disconnect(self) -> None:
        """Send DISCONNECT behind what waits to be written; paho closes the socket after it."""
        self._held_until_s = 0.0
        self._send_held(0.0)
        self._verdict = self._verdict or Ended(Cause.GOODBYE, "closed")
        self._client.disconnect()

    def abort(self) -> None:
        """Close the socket without a word."""
        sock: Any = self._client.socket()
        if sock is not None:
            self._meter.closing(sock)
            with contextlib.suppress(OSError):
                sock.close()
        self._is_over = True

    # Called by paho, inside the calls above.

    def _on_connect(
        self, client: Client, _data: Any, flags: ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        if code.is_failure:
            self._verdict = explain_refusal(code.value, code.getName(), self._settings)  # paho closes the socket next
            return
        limits = {name: getattr(properties, name, None) for name in ("MaximumQoS", "RetainAvailable")}
        if 0 in limits.values():
            self._verdict = Ended(
                Cause.UNFIT, f"the broker {self._settings.address} has no QoS 1 or no retained messages; use another"
            )
            client.disconnect()
            return
        self._is_accepted = True
        self._events.append(
            Accepted(
                flags.session_present,
                getattr(properties, "ReceiveMaximum", None),  # paho 2.2.0 itself never looks at these two
                getattr(properties, "MaximumPacketSize", None),
                getattr(properties, "ServerKeepAlive", None),
            )
        )

    def _on_socket_open(self, _client: Client, _data: Any, sock: Any) -> None:
        # paho writes every packet by itself; with Nagle's algorithm 20 publications wait 40 ms for a delayed ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._meter.sockets.opened(sock)
        self._meter.packets.opened(is_v5=self._is_v5)

    def _on_socket_close(self, _client: Client, _data: Any, sock: Any) -> None:
        with contextlib.suppress(OSError):  # of a connection that is broken already
            self._client.flush(sock)
        self._meter.closing(sock)

    def _on_disconnect(
        self, _client: Client, _data: Any, flags: DisconnectFlags, code: ReasonCode, _properties: Properties | None
    ) -> None:
        if self._verdict is not None:
            self._end(self._verdict.cause, self._verdict.reason)
        elif not flags.is_disconnect_packet_from_server:
            # paho says "Unspecified error" for everything but a missed keepalive.
            silent = code.getName() == "Keep alive timeout"
            reason = "the broker has not answered within the keepalive time" if silent else "the connection broke"
            self._end(*((Cause.LOST, reason) if self._is_accepted else explain_silence(self._settings)))
        elif code.value == _TAKEN_OVER:
            self._end(Cause.TAKEN_OVER, TAKEN_OVER)
        else:
            cause = Cause.CREDENTIALS if code.value in REFUSED_CREDENTIALS else Cause.LOST
            self._end(cause, f"the broker ended the connection: {code.getName()}")

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        packet_id = message.mid if message.qos else 0
        try:
            topic = message.topic
        except UnicodeDecodeError:  # paho 2.2.0 checks the topic here; it is nobody's message
            self.acknowledge(packet_id)
            return
        self._events.append(Arrived(topic, bytes(message.payload), bool(message.retain), packet_id))

    def _on_publish(
        self, _client: Client, _data: Any, packet_id: int, code: ReasonCode, _properties: Properties
    ) -> None:
        # paho 2.2.0 counts a refused publication as published: is_published() is true and rc is 0.
        failure = f"the broker refused it: {code.getName()}" if code.is_failure else None
        token = self._tokens.pop(packet_id, None)
        if token is not None:
            self._events.append(Answered(token, failure))

    def _on_subscribe(
        self, _client: Client, _data: Any, packet_id: int, codes: list[ReasonCode], _properties: Properties | None
    ) -> None:
        failure = next((code.getName() for code in codes if code.is_failure), None)
        topic_filter = self._filters.pop(packet_id, None)
        if topic_filter is not None and topic_filter not in self._filters.values():  # else a later change is coming
            self._events.append(Subscribed(topic_filter, failure))

    def _end(self, cause: Cause, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._events.append(Ended(cause, reason))
