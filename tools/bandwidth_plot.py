"""The picture of `kseed bandwidth`: layers, kinds of packet, and what other ways send."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no window, no global state

from tools.bandwidth_report import GOAL_BYTES, BandwidthReport

_UP, _DOWN = "#4477aa", "#ee7733"


def plot_bandwidth(path: Path, report: BandwidthReport) -> None:
    """Write a PNG: bytes per client-round by layer, by kind of packet, and beside other ways."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    layers, kinds, others = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.4))
    _layers(layers, report)
    _kinds(kinds, report)
    _others(others, report)
    link = f", {report.link}" if report.link else ""
    figure.suptitle(
        f"bytes of a client-round: K = {report.seeds}, {report.local_steps} local steps, {report.protocol}{link}"
    )
    figure.savefig(path, dpi=120)


def _layers(axes: Axes, report: BandwidthReport) -> None:
    flows = {
        "payload": report.client_round.payload,
        "MQTT": report.client_round.mqtt,
        "TLS": report.client_round.socket,
        "TCP/IP": report.client_round.ip,
    }
    known = {name: flow for name, flow in flows.items() if flow.up is not None and flow.down is not None}
    up = [flow.up or 0.0 for flow in known.values()]
    down = [flow.down or 0.0 for flow in known.values()]
    axes.bar(list(known), up, color=_UP, label="up")
    bars = axes.bar(list(known), down, bottom=up, color=_DOWN, label="down")
    axes.bar_label(bars, [f"{a + b:.0f}" for a, b in zip(up, down, strict=True)])
    axes.axhline(GOAL_BYTES, color="black", linestyle="--", linewidth=1, label=f"goal, {GOAL_BYTES}")
    axes.set(title="layers, each with those before it", ylabel="bytes")
    axes.set_ylim(0, 1.2 * max(GOAL_BYTES, max(a + b for a, b in zip(up, down, strict=True))))
    axes.legend(fontsize="small")


def _kinds(axes: Axes, report: BandwidthReport) -> None:
    shown = list(reversed(report.kinds))
    names = [kind.kind for kind in shown]
    up = [kind.mqtt.up or 0.0 for kind in shown]
    axes.barh(names, up, color=_UP, label="up")
    bars = axes.barh(names, [kind.mqtt.down or 0.0 for kind in shown], left=up, color=_DOWN, label="down")
    axes.bar_label(bars, [f"{kind.mqtt.both or 0.0:.0f}" for kind in shown], padding=3)
    axes.set(title="by kind of packet, MQTT bytes", xlabel="bytes")
    axes.margins(x=0.15)
    axes.legend(fontsize="small")


def _others(axes: Axes, report: BandwidthReport) -> None:
    ours = report.client_round.ip.both or report.client_round.payload.both or 0.0
    rows = [("kseed, all layers", ours), *((other.what, other.both) for other in report.others)]
    rows.reverse()
    bars = axes.barh([what for what, _ in rows], [count for _, count in rows], color="grey")
    bars[-1].set_color(_UP)
    axes.bar_label(bars, [f"{count:,.0f}" for _, count in rows], padding=3)
    axes.set_xscale("log")
    axes.set_xlim(100, 300 * max(count for _, count in rows))
    axes.set(title=f"beside other ways, {report.compared_with}", xlabel="bytes, logarithmic")
