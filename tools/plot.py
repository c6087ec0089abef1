"""The demo's picture: what the fleet learned per round, and what a device had sent and received by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no window, no global state

from aggregator.reports import RoundReport
from edge_client.tally import RoundMetrics
from tools.bandwidth_report import PAPER_BYTES


def plot_run(path: Path, reports: Sequence[RoundReport], devices: Mapping[str, Sequence[RoundMetrics]]) -> None:
    """Write a PNG with loss, accuracy and bytes over the rounds. `devices`: the metrics of each by its name."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, accuracy, traffic = figure.subplots(1, 3)
    for name, lines in devices.items():
        _curve(loss, [(line.version, line.held_out_loss) for line in lines], name)
        _curve(accuracy, [(line.version, line.held_out_accuracy) for line in lines], name)
        sums = accumulate(line.payload_sent_bytes + line.payload_received_bytes for line in lines)
        traffic.plot([0, *(line.round + 1 for line in lines)], [0, *(total / 1000 for total in sums)], label=name)
    _curve(loss, [(report.round, report.held_out_loss) for report in reports], "all", color="black", linewidth=2)
    _curve(
        accuracy, [(report.round, report.held_out_accuracy) for report in reports], "all", color="black", linewidth=2
    )
    rounds = [0, *(report.round + 1 for report in reports)]
    traffic.plot(
        rounds, [PAPER_BYTES * count / 1000 for count in rounds], "--", color="grey", label="paper, 18 KB each"
    )
    for axes, title, unit in (
        (loss, "held-out loss of each device", "nats per token"),
        (accuracy, "held-out accuracy", "part of 1"),
        (traffic, "payload of a device so far, up and down", "KB"),
    ):
        axes.set(title=title, xlabel="rounds", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")
    loss.set_ylim(bottom=0)
    traffic.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def _curve(axes: object, points: Sequence[tuple[int | None, float | None]], name: str, **style: object) -> None:
    """Draw the points that are known; nothing where none is."""
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), label=name, **style)  # type: ignore[attr-defined]
