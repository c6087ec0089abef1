"""The policy over time: reads the owner's wish, the machine and the clock before each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from edge_client.policy import Limits, Moment, Standing, Wish, decide, owners_pause
from edge_client.watching.machine import Readings


def moment_now() -> Moment:
    """The clocks of this machine."""
    return Moment(time.monotonic(), datetime.now())


class Gate:
    """Call it before each step for what to say, or None where the step may start."""

    def __init__(
        self,
        limits: Limits,
        read: Callable[[float], Readings],
        clock: Callable[[], Moment] = moment_now,
        wish: Callable[[], Wish | None] = lambda: None,
    ) -> None:
        """read: the machine at a time, monotonic seconds. wish: the owner's."""
        self._limits = limits
        self._read = read
        self._clock = clock
        self._wish = wish
        self._standing = Standing()

    def __call__(self) -> str | None:
        """Read the machine and decide."""
        moment = self._clock()
        self._standing = decide(self._read(moment.now_s), self._limits, moment, self._standing)
        pause = owners_pause(self._wish(), moment) or self._standing.pause
        return str(pause) if pause else None
