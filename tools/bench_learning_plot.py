"""The learning curves of `kseed bench learning` as a picture: loss and accuracy over forward passes and over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure  # not pyplot: no window, no global state

if TYPE_CHECKING:
    from tools.bench_learning import Curve


def plot_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Write a PNG: each arm in a colour of its own, each seed a line, fleets in a panel of their own over rounds."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, fleets = figure.subplots(1, 3)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(curve.arm for curve in curves))}
    named: set[str] = set()
    for curve in curves:
        label = None if curve.arm in named else curve.arm
        named.add(curve.arm)
        style: dict[str, Any] = {"color": colours[curve.arm], "label": label, "marker": ".", "linewidth": 1.2}
        forwards, losses, accuracies = zip(*curve.points, strict=True)
        if "devices" in curve.arm:
            fleets.plot(range(len(losses)), losses, **style)
        else:
            loss.plot(forwards, losses, **style)
            accuracy.plot(forwards, accuracies, **style)
    for axes, title, across, up in (
        (loss, "loss on examples that no device has", "forward passes", "nats per token"),
        (accuracy, "accuracy on them", "forward passes", "part of 1"),
        (fleets, "fleets: the same, by rounds", "rounds", "nats per token"),
    ):
        axes.set(title=title, xlabel=across, ylabel=up)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="x-small")
    loss.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
