"""What waits to be decided, and how much the broker has still to take: the two queues that peers could fill.

An update is acknowledged after it is decided, and nothing is decided while the broker is behind with taking our
answers. A broker should send only so many messages ahead of our acknowledgements (MQTT 5: receive maximum), so a flood
should wait there. mosquitto 2.0.11 sends ten times as many once acknowledgements flow. So beyond MAX_WAITING devices
are told BUSY, and the transport stops reading from its socket while much lies unread.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Literal

from aggregator.answers import Answers
from aggregator.state import State
from shared.errors import PeerError
from shared.messages import Update
from shared.transport import Received
from shared.wire import decode

MAX_WAITING = 16384  # messages that are not decided, each about 1 KB
MAX_WAITING_BYTES = 64 * 2**20  # of their payloads: a first-order device's may have 100 KB
MAX_UNSETTLED = 2048  # publications that the broker has not taken
ROOM_FOR_BUSY = 1024  # publications more, to tell devices so


class Intake:
    """The queue in, which looks at the queue out."""

    def __init__(self, answers: Answers) -> None:
        self._waiting: deque[Received] = deque()
        self._bytes = 0
        self._answers = answers

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """True where there is much to decide and room for the answers: time to do so before anything else is read."""
        return self._has_enough and self._answers.unsettled < MAX_UNSETTLED - MAX_UNSETTLED // 8

    def offer(self, message: Received) -> Literal["waits", "busy"]:
        """Queue a message, unless it must be sent away.

        Without room for an answer it is kept, unacknowledged: the broker's window bounds those.
        """
        if self._has_enough and self._answers.unsettled < MAX_UNSETTLED + ROOM_FOR_BUSY:
            return "busy"
        self._waiting.append(message)
        self._bytes += len(message.payload)
        return "waits"

    def take(self, planned: int) -> Received | None:
        """The next message to decide, if its answer has a place behind `planned` others."""
        if not self._waiting or self._answers.unsettled + planned >= MAX_UNSETTLED:
            return None
        message = self._waiting.popleft()
        self._bytes -= len(message.payload)
        return message

    def clear(self) -> None:
        """The connection is lost: what was not acknowledged comes again."""
        self._waiting.clear()
        self._bytes = 0

    @property
    def _has_enough(self) -> bool:
        return len(self._waiting) >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES


def acknowledge(received: Sequence[Received]) -> None:
    """The broker need not send them again."""
    for message in received:
        with contextlib.suppress(Exception):  # too late: the broker sends it again, and it is a DUPLICATE
            message.acknowledge()


def round_of(message: Received, state: State) -> int:
    """The round that a device takes an answer to its message for: the current one where it does not read."""
    try:
        update = decode("update", message.payload, limit_bytes=state.spec.update_limit_bytes)
    except PeerError:
        return state.progress.round
    assert isinstance(update, Update)
    return update.round
