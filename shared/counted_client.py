"""paho's client with its bytes counted, and with packets that wait together sent together."""

from __future__ import annotations

import ssl
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from shared.packets import PacketMeter
from shared.socket_bytes import SocketMeter
from shared.transport import TrafficCount


class Meter:
    """Bytes over all connections; written by the network thread, read by others."""

    def __init__(self) -> None:
        self.packets = PacketMeter()
        self.sockets = SocketMeter()

    def closing(self, sock: Any) -> None:
        """`sock` is about to be closed."""
        self.sockets.closing(sock)
        self.packets.closed()

    def count(self) -> TrafficCount:
        """All so far."""
        kinds, sockets = self.packets.kinds(), self.sockets.total()
        return TrafficCount(
            sum(kind.sent_payload_bytes for kind in kinds.values()),
            sum(kind.received_payload_bytes for kind in kinds.values()),
            sockets.sent_bytes if sockets else None,
            sockets.received_bytes if sockets else None,
            sum(kind.sent_mqtt_bytes for kind in kinds.values()),
            sum(kind.received_mqtt_bytes for kind in kinds.values()),
            sockets.ip_sent_bytes if sockets else None,
            sockets.ip_received_bytes if sockets else None,
            kinds,
        )


class CountedClient(Client):
    """paho's client, whose reads and writes are counted, and whose packets that wait together leave together.

    paho 2.2.0 writes each packet by itself: a TLS record (22 bytes) and a TCP segment (52) of its own. It has no public
    place where the bytes of a connection pass; these two methods and the loop above them are there since 1.6.
    """

    def __init__(self, packets: PacketMeter, version: CallbackAPIVersion, **settings: Any) -> None:
        self._packets = packets
        self._unsent = bytearray()  # what paho takes for sent
        super().__init__(version, **settings)

    def want_write(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._unsent) or super().want_write()

    def flush(self, sock: Any) -> None:
        """Write what waits. Raises OSError, BlockingIOError where the rest has to wait."""
        while self._unsent:
            try:
                sent = sock.send(self._unsent)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError) as error:
                raise BlockingIOError from error
            self._packets.sent(bytes(self._unsent[:sent]))
            del self._unsent[:sent]

    def _packet_write(self) -> MQTTErrorCode:
        code = super()._packet_write()
        sock = self.socket()
        if code or sock is None:  # None: it was a DISCONNECT, and closing has flushed it
            return code
        try:
            self.flush(sock)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except OSError:
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        return code

    def _sock_send(self, data: bytes | bytearray) -> int:
        self._unsent += data
        return len(data)

    def _sock_recv(self, most: int) -> bytes:
        data = super()._sock_recv(most)
        self._packets.received(data)
        return data
