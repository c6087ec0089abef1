"""What people and programs are told of a closed round: a line in the log, a line of JSON in the metrics file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from aggregator.reports import RoundReport, Traffic, round_line


class Telling:
    """The log and the metrics file of one run."""

    def __init__(self, run: str, log: Callable[[str], None], metrics: Path | None) -> None:
        self._run = run
        self._log = log
        self._metrics = metrics

    def closed(self, report: RoundReport, rounds: int, traffic: Traffic, refused: Mapping[str, int]) -> None:
        """A round has closed. A metrics file that cannot be written is only a warning."""
        counts = "".join(f", refused {count} {name}" for name, count in refused.items())
        self._log(f"{round_line(report, rounds)}, {traffic_text(traffic)}{counts}")
        if self._metrics is None:
            return
        record = {"run": self._run, **msgspec.to_builtins(report), "traffic": msgspec.to_builtins(traffic)}
        try:
            with self._metrics.open("ab") as stream:
                stream.write(msgspec.json.encode(record) + b"\n")
        except OSError as error:
            self._log(f"WARNING: cannot write {self._metrics}: {error.strerror}")


def traffic_text(traffic: Traffic) -> str:
    """What went over the aggregator's connection, in the layers that are known, for a line."""
    parts = [f"payload {traffic.payload_sent_bytes} B sent, {traffic.payload_received_bytes} B received"]
    if traffic.mqtt_sent_bytes is not None:
        parts.append(f"MQTT {traffic.mqtt_sent_bytes} + {traffic.mqtt_received_bytes}")
    if traffic.ip_sent_bytes is not None:
        parts.append(f"TCP/IP with TLS {traffic.ip_sent_bytes} + {traffic.ip_received_bytes}")
    return ", ".join(parts)
