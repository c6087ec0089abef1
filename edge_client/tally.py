"""What a round adds up to on this device, and the metrics file (JSON Lines) that keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shared.errors import UserError
from shared.refusals import Refusal
from shared.transport import KindBytes, TrafficCount


class RoundMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the metrics file: a round as this device saw it, from the round before's end to this one's.

    Bytes are what went over this device's connection in that time, whatever it was for. None: not known, or it did
    not happen.
    """

    run: str
    device: str
    round: int
    version: int | None  # of the model that was rebuilt
    model_digest: str | None  # of that version, 16 bytes in hex
    receipt: str | None  # the last receipt's code
    steps: int
    steps_before: int = 0  # of this round, in an earlier life of the agent: nothing of them is in the other numbers
    train_loss: float | None  # mean over the steps, nats per token
    held_out_loss: float | None  # of `version`, nats per token
    held_out_accuracy: float | None  # in [0, 1]
    rebuild_s: float
    evaluate_s: float
    steps_s: float
    paused_s: float
    energy_j: float | None = None  # of the power source that `edge_client.watching.power` names
    payload_sent_bytes: int
    payload_received_bytes: int
    socket_sent_bytes: int | None  # TCP payload: MQTT with TLS around it, each byte once
    socket_received_bytes: int | None
    mqtt_sent_bytes: int | None = None
    mqtt_received_bytes: int | None = None
    ip_sent_bytes: int | None = None  # TCP/IP with TLS; None where the platform does not count it
    ip_received_bytes: int | None = None
    kinds: Mapping[str, KindBytes] = msgspec.field(default_factory=dict)  # payload and MQTT bytes by kind of packet
    ended_at_ms: int  # unix milliseconds


class MetricsFile:
    """Appends a line of JSON per round. Without a path it does nothing."""

    def __init__(self, path: Path | None) -> None:
        """Raises UserError where the file cannot be written."""
        self._path = path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError as error:
            raise UserError(
                f"metrics file {path} cannot be written: {error.strerror}. Choose another place."
            ) from error

    def add(self, metrics: RoundMetrics) -> None:
        """Append one line. Raises UserError where the disk refuses."""
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(metrics) + b"\n")
        except OSError as error:
            raise UserError(
                f"metrics file {self._path} cannot be written: {error.strerror}. Free some space."
            ) from error


def round_line(metrics: RoundMetrics) -> str:
    """What a log shows of a round that is over."""
    parts = [f"round {metrics.round} over: {metrics.receipt or 'no receipt'}, {metrics.steps} steps"]
    if metrics.steps_before:
        parts[0] += f" after {metrics.steps_before} before the restart"
    if metrics.train_loss is not None:
        parts.append(f"train loss {metrics.train_loss:.4f}")
    if metrics.held_out_loss is not None:
        parts.append(f"held-out loss {metrics.held_out_loss:.4f} of version {metrics.version}")
    if metrics.held_out_accuracy is not None:
        parts.append(f"accuracy {metrics.held_out_accuracy:.3f}")
    parts.append(f"payload {metrics.payload_sent_bytes} B up, {metrics.payload_received_bytes} B down")
    if metrics.mqtt_sent_bytes is not None and metrics.mqtt_received_bytes is not None:
        parts.append(f"MQTT {metrics.mqtt_sent_bytes} + {metrics.mqtt_received_bytes}")
    if metrics.ip_sent_bytes is not None and metrics.ip_received_bytes is not None:
        parts.append(f"TCP/IP with TLS {metrics.ip_sent_bytes} + {metrics.ip_received_bytes}")
    return ", ".join(parts)


@dataclass
class Tally:
    """What a round has added up to so far. `before`: the bytes when it began."""

    before: TrafficCount
    energy_before_j: float | None = None
    version: int | None = None
    digest: bytes | None = None
    losses: list[float] = field(default_factory=list)  # of the steps, nats per token
    steps_before: int = 0
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None
    rebuild_s: float = 0.0
    evaluate_s: float = 0.0
    steps_s: float = 0.0
    paused_s: float = 0.0

    def rebuilt(self, version: int, digest: bytes, seconds: float) -> None:
        """The overlay took on `version`; work on an older one does not count in this round."""
        self.version, self.digest = version, digest
        self.losses, self.steps_before = [], 0
        self.rebuild_s += seconds

    def stepped(self, step: int, loss: float, seconds: float) -> None:
        """Local step `step` (from 1) is done; where it is the first one here, those before it were another life's."""
        if not self.losses:
            self.steps_before = step - 1
        self.losses.append(loss)
        self.steps_s += seconds

    def evaluated(self, loss: float | None, accuracy: float | None, seconds: float) -> None:
        """A stretch of the held-out split is done; loss and accuracy come with the last one."""
        self.evaluate_s += seconds
        if loss is not None:
            self.held_out_loss, self.held_out_accuracy = loss, accuracy

    def close(
        self,
        *,
        run: str,
        device: str,
        round_number: int,
        receipt: Refusal | None,
        traffic: TrafficCount,
        unix_ms: int,
        energy_j: float | None = None,
    ) -> tuple[RoundMetrics, Tally]:
        """The line for the metrics file, and the next round's tally. energy_j: since the agent began, if known."""
        spent = traffic.since(self.before)
        metrics = RoundMetrics(
            run=run,
            device=device,
            round=round_number,
            version=self.version,
            model_digest=None if self.digest is None else self.digest.hex(),
            receipt=None if receipt is None else receipt.name.lower(),
            steps=len(self.losses),
            steps_before=self.steps_before,
            train_loss=math.fsum(self.losses) / len(self.losses) if self.losses else None,
            held_out_loss=self.held_out_loss,
            held_out_accuracy=self.held_out_accuracy,
            rebuild_s=self.rebuild_s,
            evaluate_s=self.evaluate_s,
            steps_s=self.steps_s,
            paused_s=self.paused_s,
            energy_j=None if energy_j is None else energy_j - (self.energy_before_j or 0.0),
            payload_sent_bytes=spent.payload_sent_bytes,
            payload_received_bytes=spent.payload_received_bytes,
            socket_sent_bytes=spent.socket_sent_bytes,
            socket_received_bytes=spent.socket_received_bytes,
            mqtt_sent_bytes=spent.mqtt_sent_bytes,
            mqtt_received_bytes=spent.mqtt_received_bytes,
            ip_sent_bytes=spent.ip_sent_bytes,
            ip_received_bytes=spent.ip_received_bytes,
            kinds=spent.kinds,
            ended_at_ms=unix_ms,
        )
        return metrics, Tally(traffic, energy_j)
