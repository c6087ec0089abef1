"""What an agent tells its owner about itself: a value, as JSON in a file, and as lines for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from edge_client.progress import byte_text

StateName = Literal["starting", "working", "waiting", "paused", "unconnected", "failed", "left"]
SILENT_S = 600.0  # without a word for so long, its step takes long or it hangs

# What `kseed-edge status` ends with.
EXIT_FINE, EXIT_PAUSED, EXIT_TROUBLE, EXIT_NOT_RUNNING, EXIT_SILENT = 0, 1, 4, 5, 6


class Measure(msgspec.Struct, frozen=True):
    """A reading of the machine (`watching.reading`), and what the owner's limits say of it."""

    name: str
    value: float | bool | None
    text: str  # value, unit and source, or why it is unknown
    limit: str = ""


class Layers(msgspec.Struct, frozen=True):
    """Bytes of one local day in three layers that contain each other. None: not known here."""

    day: str  # YYYY-MM-DD
    payload_sent: int = 0
    payload_received: int = 0
    mqtt_sent: int | None = 0
    mqtt_received: int | None = 0
    ip_sent: int | None = 0  # TCP/IP with TLS
    ip_received: int | None = 0

    def plus(self, other: Layers) -> Layers:
        """Both together; the day is the other's."""

        def known(a: int | None, b: int | None) -> int | None:
            return None if a is None or b is None else a + b

        return Layers(
            other.day,
            self.payload_sent + other.payload_sent,
            self.payload_received + other.payload_received,
            known(self.mqtt_sent, other.mqtt_sent),
            known(self.mqtt_received, other.mqtt_received),
            known(self.ip_sent, other.ip_sent),
            known(self.ip_received, other.ip_received),
        )


class ModelStatus(msgspec.Struct, frozen=True):
    """Which model; digests in hex."""

    name: str
    dtype: str
    base_digest: str
    manifest_digest: str
    version: int | None = None  # that the weights were rebuilt to last
    digest: str | None = None  # of that version


class Accepted(msgspec.Struct, frozen=True):
    """The last round whose update counts."""

    round: int
    at_ms: int


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One agent at one time. Times in unix milliseconds."""

    format: Literal[1] = 1
    written_at_ms: int
    started_at_ms: int
    pid: int
    agent: str  # software and version
    run: str
    device: str
    broker: str
    session: str  # hex
    state: StateName
    text: str  # what it does, or why not and what ends that
    round: int | None = None
    loss: float | None = None  # of the last step, nats per token
    last_accepted: Accepted | None = None
    queue: tuple[str, ...] = ()  # what waits for a receipt
    connected_since_ms: int | None = None
    trouble: str = ""  # why there is no connection
    round_trip_s: float | None = None
    round_trip_at_ms: int | None = None
    bytes_today: Layers
    budget_bytes: int = 0  # of a day; 0: no limit
    energy_j: float | None = None  # since it started
    model: ModelStatus | None = None
    readings: tuple[Measure, ...] = ()


@dataclass(frozen=True)
class Seen:
    """A status as it was found: whether its agent lives, and how old it is."""

    status: AgentStatus
    is_alive: bool
    age_s: float
    folder: str

    @property
    def is_silent(self) -> bool:
        return self.is_alive and self.age_s > SILENT_S

    @property
    def exit_code(self) -> int:
        """See the constants above."""
        if not self.is_alive:
            return EXIT_NOT_RUNNING
        if self.is_silent:
            return EXIT_SILENT
        return {"paused": EXIT_PAUSED, "unconnected": EXIT_TROUBLE, "failed": EXIT_TROUBLE}.get(
            self.status.state, EXIT_FINE
        )

    def as_json(self) -> str:
        """For programs: the status, and what was found about it."""
        found = {"is_running": self.is_alive, "is_silent": self.is_silent, "age_s": round(self.age_s, 1)}
        return msgspec.json.encode({**msgspec.to_builtins(self.status), **found, "folder": self.folder}).decode()


def lines(seen: Seen) -> list[str]:
    """For people."""
    status, now_ms = seen.status, seen.status.written_at_ms + seen.age_s * 1000
    rows = [("state", _state_text(seen)), ("round", _round_text(status)), ("accepted", _accepted_text(status, now_ms))]
    rows.append(("queue", "; ".join(status.queue) or "nothing waits for a receipt"))
    rows += [
        ("broker", _broker_text(status, now_ms) if seen.is_alive else status.broker),
        ("today", _traffic_text(status.bytes_today, status.budget_bytes)),
    ]
    if status.energy_j is not None:
        rows.append(("energy", f"{status.energy_j:.0f} J since it started"))
    rows += [(one.name, f"{one.text}; {one.limit}" if one.limit else one.text) for one in status.readings]
    if status.model is not None:
        rows.append(("model", _model_text(status.model)))
    rows.append(("told", f"{duration(seen.age_s)} ago, in {seen.folder}"))
    since = duration((now_ms - status.started_at_ms) / 1000)
    life = f"process {status.pid}, started {since} ago" if seen.is_alive else "not running"
    width = max(len(name) for name, _ in rows) + 2
    head = f"{status.device} in run {status.run} ({status.agent}, {life})"
    return [head, *(f"{name:{width}}{text}" for name, text in rows)]


def _state_text(seen: Seen) -> str:
    status = seen.status
    if not seen.is_alive:
        if status.state in ("left", "failed"):
            return f"not running: {status.text}"
        return f"not running: it ended without a word while it was {status.state} ({status.text})"
    text = {"paused": status.text, "failed": f"failed: {status.text}"}.get(
        status.state, f"{status.state}: {status.text}"
    )
    return f"{text}; SILENT for {duration(seen.age_s)}, a step takes long or it hangs" if seen.is_silent else text


def _round_text(status: AgentStatus) -> str:
    if status.round is None:
        return "no plan yet"
    return f"{status.round}" + ("" if status.loss is None else f", loss {status.loss:.3f} in the last step")


def _accepted_text(status: AgentStatus, now_ms: float) -> str:
    last = status.last_accepted
    return "no round yet" if last is None else f"round {last.round}, {duration((now_ms - last.at_ms) / 1000)} ago"


def _broker_text(status: AgentStatus, now_ms: float) -> str:
    if status.connected_since_ms is None:
        return f"{status.broker}, not connected{f': {status.trouble}' if status.trouble else ''}"
    text = f"{status.broker}, connected for {duration((now_ms - status.connected_since_ms) / 1000)}"
    if status.round_trip_s is None or status.round_trip_at_ms is None:
        return text
    ago = duration((now_ms - status.round_trip_at_ms) / 1000)
    return f"{text}, answers in {status.round_trip_s * 1000:.3g} ms (measured {ago} ago)"


def _traffic_text(layers: Layers, budget_bytes: int) -> str:
    pairs = (
        ("payload", layers.payload_sent, layers.payload_received),
        ("MQTT", layers.mqtt_sent, layers.mqtt_received),
        ("TCP/IP with TLS", layers.ip_sent, layers.ip_received),
    )
    budget = f"; the day's budget is {byte_text(budget_bytes)}" if budget_bytes else ""
    return "; ".join(f"{name} {_bytes(up)} up, {_bytes(down)} down" for name, up, down in pairs) + budget


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else byte_text(count)


def _model_text(model: ModelStatus) -> str:
    text = f"{model.name}, {model.dtype}, base {model.base_digest[:16]}, manifest {model.manifest_digest[:16]}"
    if model.version is None or model.digest is None:
        return text
    return f"{text}, version {model.version} is {model.digest}"


def duration(seconds: float) -> str:
    """For people: the two largest units at most."""
    left = max(0, round(seconds))
    if left < 60:
        return f"{left} s"
    days, left = divmod(left, 86_400)
    hours, left = divmod(left, 3600)
    parts = [(days, "d"), (hours, "h"), (left // 60, "min")]
    first = next(number for number, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)
