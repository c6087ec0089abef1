"""The bytes of today in three layers, kept over restarts, and the byte budget that is held against them.

The count is written down at the end of a round and whenever `UNSAVED_BYTES` have come together, so a killed agent
forgets no more than that. A local day begins at the local date's change. The day counted before it is kept as well: a
clock that is wrong for a while, as after a boot without a battery for it, then costs today nothing of its count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, time, timedelta
from pathlib import Path

import msgspec

from edge_client.byte_budget import (
    PAST_ROUNDS,
    ByteLimits,
    PastRound,
    Stage,
    Standing,
    Wanted,
    decide,
    round_estimate,
    snapshot_estimate,
)
from edge_client.state import Sending, Settled, State, waiting
from edge_client.state_files import Disk, Owner, read_whole, sealed, set_aside, unsealed, write_whole
from edge_client.status import Layers
from edge_client.tally import RoundMetrics
from shared.topics import Topic
from shared.transport import TrafficCount, Transport

KIND = "kseed bytes 2"
UNSAVED_BYTES = 4096
NO_LIMITS = ByteLimits()


class Ledger:
    """One agent's bytes of today. Without a folder nothing outlives the process."""

    def __init__(
        self,
        transport: Transport,
        now: Callable[[], datetime],
        *,
        limits: ByteLimits = NO_LIMITS,
        keepalive_s: int = 300,
        folder: Path | None = None,
        owner: Owner | None = None,
        say: Callable[[str], None] = lambda text: None,
        disk: Disk | None = None,
    ) -> None:
        """now: local time. folder, owner: where and whose the file is."""
        self._transport, self._now = transport, now
        self._limits, self._keepalive_s = limits, keepalive_s
        self._path = folder / owner.folder_name / "bytes" if folder and owner else None
        self._owner, self._say, self._disk = owner, say, disk or Disk()
        self._counted = transport.traffic()
        self._day, self._day_before = Layers(""), Layers("")
        self._past: tuple[PastRound, ...] = ()
        self._standing = Standing()
        self._saved_bytes = 0
        self._has_joined = False
        self._read()

    @property
    def day_bytes(self) -> int:
        """What the owner allows per day; 0: no limit."""
        return self._limits.day_bytes

    def today(self) -> Layers:
        """All layers so far; what crosses midnight counts for the new day."""
        traffic, day = self._transport.traffic(), f"{self._now():%Y-%m-%d}"
        fresh = _layers(day, traffic.since(self._counted))
        self._counted = traffic
        if self._day.day != day:
            self._day, self._day_before = self._day_before, self._day
        self._day = self._day.plus(fresh) if self._day.day == day else fresh
        if abs(wire_bytes(self._day) - self._saved_bytes) >= UNSAVED_BYTES:
            self.save()
        return self._day

    @property
    def is_quiet(self) -> bool:
        """Whether the day's bytes are spent: plans are left unheard, and no update is sent twice."""
        return self._standing.is_quiet

    def pause(self, state: State, *, is_held: bool = False) -> str | None:
        """Why no local step may begin, or None. is_held: something else keeps a round from beginning for now."""
        if self._limits == NO_LIMITS:
            return None
        now = self._now()
        midnight = datetime.combine(now.date() + timedelta(days=1), time())
        was_quiet, today = self._standing.is_quiet, self.today()
        decided = decide(
            self._limits,
            today.day,
            wire_bytes(today),
            (midnight - now).total_seconds(),
            self._wanted(state),
            self._standing,
            self._keepalive_s,
        )
        self._standing = replace(decided, begun=self._standing.begun) if is_held else decided
        if self._standing.is_quiet != was_quiet:
            listen = self._transport.subscribe if was_quiet else self._transport.unsubscribe
            listen(str(Topic(state.identity.run, "plan")))  # plans come whether one takes part or not
        return self._standing.pause

    def subscribe(self, topic: Topic) -> None:
        """Subscribe, unless what would come is beyond today's budget."""
        if not (self._standing.is_quiet and topic.kind == "plan"):
            self._transport.subscribe(str(topic))

    def round_over(self, metrics: RoundMetrics) -> None:
        """Learn what a round costs; not from one without steps, nor from one with a join or a snapshot."""
        is_usual = self._has_joined and not {"connect", "snapshot"} & metrics.kinds.keys()
        self._has_joined = True
        if metrics.steps and is_usual:
            self._past = (*self._past, PastRound(metrics.steps, wire_bytes(_layers("", metrics))))[-PAST_ROUNDS:]
        self.today()
        self.save()

    def _wanted(self, state: State) -> Wanted | None:
        if (kept := waiting(state)) is not None:
            stage: Stage = (
                "kept" if not isinstance(state.work, Sending) else "sent" if state.work.is_taken else "sending"
            )
            return Wanted((kept.update.round, kept.nonce), 0, 0, stage)
        plan, run = state.plan, state.run
        if plan is None or run is None or plan.phase != "open" or isinstance(state.work, Settled):
            return None
        has_state = state.held is not None and state.held.version >= plan.round - 1
        catch_up = 0 if has_state or plan.round == 0 else snapshot_estimate(run.seeds)
        return Wanted((plan.round, plan.nonce), round_estimate(self._past, plan.local_steps), catch_up)

    def save(self) -> None:
        """Write it down. A disk that refuses is said once in a while: with the next round."""
        if self._path is None or self._owner is None:
            return
        self._saved_bytes = wire_bytes(self._day)
        named = {"today": self._day, "day_before": self._day_before, "rounds": self._past}
        fields = {name: msgspec.to_builtins(value) for name, value in named.items()}
        try:
            write_whole(self._disk, self._path, sealed(self._owner, KIND, **fields))
        except OSError as error:
            self._say(f"warning: the bytes of today cannot be written to {self._path}: {error.strerror}")

    def _read(self) -> None:
        """What an earlier life counted. A file that cannot be used is set aside: the day begins at 0."""
        if self._path is None or self._owner is None:
            return
        try:
            data = read_whole(self._path)
            if data is None:
                return
            fields, _, _ = unsealed(self._owner, KIND, data)
            self._day = msgspec.convert(fields.get("today"), Layers)
            self._day_before = msgspec.convert(fields.get("day_before"), Layers)
            self._past = msgspec.convert(fields.get("rounds"), tuple[PastRound, ...])
        except OSError as error:
            self._say(f"warning: the bytes of today cannot be read from {self._path}: {error.strerror}")
        except ValueError as error:  # msgspec's errors are ValueErrors
            self._say(f"warning: ignored the bytes of today in {self._path}: {error}; {set_aside(self._path)}")
        self._saved_bytes = wire_bytes(self._day)


def _layers(day: str, count: TrafficCount | RoundMetrics) -> Layers:
    return Layers(
        day,
        count.payload_sent_bytes,
        count.payload_received_bytes,
        count.mqtt_sent_bytes,
        count.mqtt_received_bytes,
        count.ip_sent_bytes,
        count.ip_received_bytes,
    )


def wire_bytes(layers: Layers) -> int:
    """Both ways, in the outermost layer that is known: TCP/IP with TLS, else MQTT, else payloads."""
    pairs = (
        (layers.ip_sent, layers.ip_received),
        (layers.mqtt_sent, layers.mqtt_received),
        (layers.payload_sent, layers.payload_received),
    )
    return next(up + down for up, down in pairs if up is not None and down is not None)
