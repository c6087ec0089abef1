"""Points that a process passes, each of which may be its last: before and after every write and every message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shared.transport import Received


class Death(BaseException):
    """The process is gone."""


@dataclass
class Fuse:
    """Counts the points that the aggregator passes, and burns at the given ones."""

    fatal: list[int]  # counted from the start, or from the death before
    at_death: Callable[[], None]
    passed: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    since: int = 0

    def point(self, name: str) -> None:
        self.passed.append(name)
        self.since += 1
        if self.fatal and self.since > self.fatal[0]:
            del self.fatal[0]
            self.since = 0
            self.deaths.append(name)
            self.at_death()
            raise Death(name)


class FusedConnection:
    """A connection whose every writing statement is a point before and after."""

    def __init__(self, connection: Any, fuse: Fuse) -> None:
        self._connection = connection
        self._fuse = fuse

    def execute(self, statement: str, *values: Any) -> Any:
        verb = statement.split()[0]
        if verb in ("SELECT", "PRAGMA"):
            return self._connection.execute(statement, *values)
        self._fuse.point(f"before {verb}")
        done = self._connection.execute(statement, *values)
        self._fuse.point(f"after {verb}")
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class FusedTransport:
    """A transport whose every publication and acknowledgement is a point before and after."""

    def __init__(self, transport: Any, fuse: Fuse) -> None:
        self._transport = transport
        self._fuse = fuse

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        kind = topic.split("/")[2]
        self._fuse.point(f"before {kind}")
        token = self._transport.publish(topic, payload, retain=retain)
        self._fuse.point(f"after {kind}")
        return int(token)

    def poll(self, timeout_s: float) -> Any:
        event = self._transport.poll(timeout_s)
        if not isinstance(event, Received):
            return event
        return Received(event.topic, event.payload, event.is_retained, lambda: self._acknowledge(event))

    def _acknowledge(self, event: Received) -> None:
        self._fuse.point("before acknowledgement")
        event.acknowledge()
        self._fuse.point("after acknowledgement")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
