"""From what the network delivered to what the session is told. No I/O."""

from __future__ import annotations

from edge_client.events import Garbled, Heard, NotTaken, Taken
from shared.errors import PeerError
from shared.refusals import Refusal
from shared.topics import Kind, parse_topic
from shared.transport import Delivered, Received, Undelivered
from shared.wire import decode


def read(event: Received) -> Heard | Garbled:
    """The message in a delivery, or what is wrong with it."""
    topic = parse_topic(event.topic)
    try:
        if topic is None:
            raise PeerError(Refusal.WRONG_KIND, "this is no topic of the protocol")
        return Heard(topic, decode(topic.kind, event.payload), event.is_retained)
    except PeerError as error:
        return Garbled(event.topic[:200], error, event.payload[0] if event.payload else None)


class Sent:
    """The latest publication of each kind: what became of an older one changes nothing any more."""

    def __init__(self) -> None:
        self._tokens: dict[Kind, int] = {}

    def add(self, kind: Kind, token: int) -> None:
        """The transport knows it as `token`."""
        self._tokens[kind] = token

    def outcome(self, event: Delivered | Undelivered) -> Taken | NotTaken | None:
        """What the session is told of it."""
        kind = next((kind for kind, token in self._tokens.items() if token == event.token), None)
        if isinstance(event, Undelivered):
            return NotTaken(kind, event.reason)
        return None if kind is None else Taken(kind)
