"""`kseed bench wire`: bytes of a client-round on the wire, against the goal, the paper and the payload alone."""

from __future__ import annotations

from tools.bandwidth import BandwidthSettings, measure_bandwidth
from tools.bandwidth_report import GOAL_BYTES, PAPER_BYTES, BandwidthReport, Flow
from tools.bench import Asked, BenchResult, Measured, load, machine

ROUNDS, QUICK_ROUNDS = 10, 3
LOCAL_STEPS, QUICK_STEPS = 200, 20


def bench_wire(asked: Asked) -> BenchResult:
    """K = 4096, 200 local steps, common seeds, TLS on loopback, connection kept; quick: 20 steps and fewer rounds.

    The model is a tiny one whatever was asked for: the bytes do not depend on it (`kseed bandwidth` takes any).

    Raises UserError, UnavailableError as `measure_bandwidth` does.
    """
    settings = BandwidthSettings(
        asked.folder / "wire",
        rounds=QUICK_ROUNDS if asked.quick else ROUNDS,
        local_steps=QUICK_STEPS if asked.quick else LOCAL_STEPS,
    )
    report = measure_bandwidth(settings, lambda line: None)
    return BenchResult("wire", tuple(wire_rows(report)), f"{machine()}, {report.broker}, {report.protocol}", load())


def wire_rows(report: BandwidthReport) -> list[Measured]:
    """The rows of the table: layers of a client-round, then of the join. What is unknown here is left out."""
    found = report.client_round
    payload = found.payload.both or 0.0
    rows: list[Measured] = []

    def add(what: str, flow: Flow, baseline: str, goal: str = "") -> None:
        if flow.both is not None:
            rows.append(Measured(what, "B", (flow.both,), goal, baseline))

    add("payload of a client-round, both ways", found.payload, f"paper: {PAPER_BYTES} of payload alone")
    baseline = f"payload alone: {payload:.0f}"
    add("MQTT of a client-round", found.mqtt, baseline)
    add("with TLS", found.socket, baseline)
    goal = f"< {GOAL_BYTES}" if report.local_steps == LOCAL_STEPS else ""  # it says nothing of fewer
    add("TCP/IP with TLS: all layers", found.ip, baseline, goal)
    add("joining, all layers", report.joining.ip, f"payload alone: {report.joining.payload.both:.0f}")
    return rows
