"""The network thread of an MQTT client: connect, serve, reconnect, for ever. It knows no MQTT library.

It alone owns the queue of publications, the subscriptions and the connection. Other threads hand it commands
(`post`) and read what it says (`events`). Whatever goes wrong on it ends in a final Disconnected, never in silence.
"""

from __future__ import annotations

import contextlib
import queue
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from shared.mqtt_link import Accepted, Answered, Arrived, Cause, Ended, Link, LinkEvent, Subscribed
from shared.outgoing import MOST_IN_FLIGHT, Outgoing, Publication
from shared.reconnecting import MqttVersion, Reconnecting, ReconnectPolicy
from shared.transport import Connected, Delivered, Disconnected, Event, Received, Undelivered

_GOODBYE_S = 0.5
# What other threads have not read yet. The receive maximum should bound it, but mosquitto 2.0.11 sends ten times as
# much ahead of our acknowledgements once they flow. Above this the rest stays in the socket, and so in the broker.
MOST_UNREAD = 2000  # events
MOST_UNREAD_BYTES = 64 * 2**20  # of payloads


class NetworkThread:
    """Runs `_run` on a thread of its own; the public methods are for other threads."""

    def __init__(
        self,
        connect: Callable[[MqttVersion], Link],
        policy: ReconnectPolicy,
        source: random.Random,
        most_in_flight: int = MOST_IN_FLIGHT,
    ) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self._arrived_bytes = 0  # written by the network thread alone
        self._read_bytes = 0  # written by the reading thread alone
        self._is_choked = False
        self._connect = connect
        self._refusals_allowed = policy.refusals_allowed
        self._reconnecting = Reconnecting(policy)
        self._random = source
        self._commands: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._outgoing = Outgoing(most_in_flight)
        self._sent_s: dict[int, float] = {}  # by token, of what is in flight
        self._filters: dict[str, None] = {}
        self._unsent: dict[str, None] = {}  # filters whose last change the broker has not confirmed
        self._link: Link | None = None
        self._is_accepted = False
        self._is_leaving = False
        self._close_at_s: float | None = None  # not None: close when the queue is empty, at this time at the latest
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="kseed-mqtt", daemon=True)

    def start(self) -> None:
        """Begin; a second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def has_died(self) -> bool:
        """True when the thread is gone although nobody ended it."""
        return self._thread.ident is not None and not self._thread.is_alive() and not self._is_over

    def has_read(self, event: Event) -> None:
        """The reader took `event` from `events`."""
        if isinstance(event, Received):
            self._read_bytes += len(event.payload)
        if self._is_choked and not self._is_behind(2):
            self.post(lambda: None)  # wake

    def _is_behind(self, part: int = 1) -> bool:
        """Whether more than 1 / `part` of the limits lies unread."""
        unread_bytes = self._arrived_bytes - self._read_bytes
        return self.events.qsize() * part >= MOST_UNREAD or unread_bytes * part >= MOST_UNREAD_BYTES

    def post(self, command: Callable[[], None]) -> None:
        """Have the thread call `command` soon."""
        self._commands.append(command)
        with contextlib.suppress(OSError):  # full: the thread wakes anyway; closed: the thread is over
            self._wake_write.send(b"!")

    def publish(self, publication: Publication) -> None:
        """Queue a publication."""
        self.post(partial(self._outgoing.add, publication))

    def change_filter(self, topic_filter: str, *, is_wanted: bool) -> None:
        """Subscribe to `topic_filter`, or end the subscription."""

        def change() -> None:
            self._filters.pop(topic_filter, None)
            if is_wanted:
                self._filters[topic_filter] = None
            self._unsent[topic_filter] = None
            if self._link and self._is_accepted:
                self._send_filter(self._link, topic_filter)

        self.post(change)

    def close(self, timeout_s: float) -> None:
        """Send what is queued, say goodbye, and wait for the thread to end, `timeout_s` seconds and a little more."""
        if self._thread.ident is None:
            self._wake_write.close()
            self._wake_read.close()
            return

        def close() -> None:
            self._close_at_s = time.monotonic() + timeout_s

        self.post(close)
        self._thread.join(timeout_s + 1.0)  # a thread in the middle of connecting ends by itself, later

    # Everything below runs on the thread.

    def _run(self) -> None:
        try:
            while not self._is_over:
                self._serve()
        except BaseException as error:
            self._finish(f"the network thread failed: {error!r}; this is a bug")
        finally:
            if self._link:
                self._link.abort()
            self._wake_write.close()
            self._wake_read.close()

    def _serve(self) -> None:
        """One connection, from the attempt to its end."""
        self._is_accepted = self._is_leaving = False
        self._link = link = self._connect(self._reconnecting.version)
        link.open()
        while self._link is link:
            self._is_choked = self._is_behind()
            link.is_reading = not self._is_choked
            for event in link.step(self._wake_read, self._time_left_s(1.0)):
                self._handle(link, event)
            self._run_commands()
            if self._is_accepted and self._link is link:
                self._send(link)
            self._leave(link)

    def _leave(self, link: Link) -> None:
        """Say goodbye when it is time to; a broker that does not even read that is left without."""
        if self._may_close() and not self._is_leaving:
            self._is_leaving = True
            link.disconnect()
        elif self._is_leaving and self._close_at_s is not None and time.monotonic() > self._close_at_s + _GOODBYE_S:
            self._is_over, self._link = True, None
            link.abort()

    def _handle(self, link: Link, event: LinkEvent) -> None:
        if isinstance(event, Accepted):
            self._is_accepted = True
            self._reconnecting.connected(time.monotonic())
            self._outgoing.connected(event.receive_maximum, event.largest_packet_bytes)
            version, largest = self._reconnecting.version, event.largest_packet_bytes
            self.events.put(Connected(version, event.session_present, largest))
            for topic_filter in list(self._unsent if event.session_present else {**self._unsent, **self._filters}):
                self._send_filter(link, topic_filter)
        elif isinstance(event, Answered):
            if self._outgoing.settle(event.token):
                failure, took_s = event.failure, time.monotonic() - self._sent_s.pop(event.token)
                self.events.put(Undelivered(event.token, failure) if failure else Delivered(event.token, took_s))
        elif isinstance(event, Arrived):
            self._arrived_bytes += len(event.payload)
            acknowledge = partial(self.post, partial(link.acknowledge, event.packet_id))
            self.events.put(Received(event.topic, event.payload, event.is_retained, acknowledge))
        elif isinstance(event, Subscribed):
            self._unsent.pop(event.topic_filter, None)
            if event.failure and event.topic_filter in self._filters:
                reason = f"the broker refuses the subscription to {event.topic_filter}: {event.failure}"
                self._finish(f"{reason}; check its access rules")
                link.disconnect()
        else:
            self._link = None
            self._ended(event)

    def _ended(self, ended: Ended) -> None:
        given_up = self._outgoing.lost()
        self._sent_s.clear()
        if given_up is not None:
            self.events.put(given_up)
        reason, now_s = ended.reason, time.monotonic()
        if ended.cause is Cause.GOODBYE or self._is_leaving:
            self._is_over = True
        elif ended.cause in (Cause.UNANSWERED, Cause.WRONG_VERSION) and self._reconnecting.unanswered():
            return  # another version, at once
        elif ended.cause is Cause.TAKEN_OVER or ended.cause is Cause.UNFIT:
            self._finish(reason)
        elif ended.cause is Cause.CREDENTIALS and self._reconnecting.refused():
            self._finish(f"{reason} (given up after {self._refusals_allowed} tries)")
        else:
            self._reconnecting.failed(now_s)
            self.events.put(Disconnected(reason))
            self._pause(now_s + self._reconnecting.delay_s(self._random))

    def _finish(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self.events.put(Disconnected(reason, is_final=True))

    def _pause(self, until_s: float) -> None:
        """Wait for the next attempt; commands are obeyed meanwhile."""
        while (left_s := until_s - time.monotonic()) > 0:
            self._run_commands()
            if self._may_close():
                self._is_over = True
                return
            select.select([self._wake_read], [], [], self._time_left_s(left_s))

    def _run_commands(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(self._wake_read.recv(4096)) == 4096:
                pass
        while self._commands:
            self._commands.popleft()()

    def _send(self, link: Link) -> None:
        while (item := self._outgoing.take()) is not None:
            if isinstance(item, Undelivered):
                self.events.put(item)
            else:
                self._sent_s[item.token] = time.monotonic()
                link.publish(item)

    def _send_filter(self, link: Link, topic_filter: str) -> None:
        if topic_filter in self._filters:
            link.subscribe(topic_filter)
        else:
            link.unsubscribe(topic_filter)

    def _may_close(self) -> bool:
        return self._close_at_s is not None and (self._outgoing.is_empty or time.monotonic() >= self._close_at_s)

    def _time_left_s(self, wanted_s: float) -> float:
        """`wanted_s`, or less where the time to close comes before."""
        if self._close_at_s is None:
            return wanted_s
        return min(wanted_s, max(self._close_at_s - time.monotonic(), 0.05))
