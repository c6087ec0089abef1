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
    has_fleets = any("devices" in curve.arm for curve in curves)
    figure = Figure(figsize=(13 if has_fleets else 9, 4), layout="constrained")
    loss, accuracy, *rest = figure.subplots(1, 3 if has_fleets else 2)
    fleets = rest[0] if rest else loss
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
    loss.set(title="loss on examples that no device has", xlabel="forward passes", ylabel="nats per token")
    accuracy.set(title="accuracy on them", xlabel="forward passes", ylabel="part of 1")
    if rest:
        fleets.set(title="fleets: loss by rounds", xlabel="rounds", ylabel="nats per token")
    for axes in (loss, accuracy, *rest):
        axes.legend(fontsize="x-small")
    loss.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
