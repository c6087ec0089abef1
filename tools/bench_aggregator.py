"""`kseed bench aggregator`: the real service on the real store with full sync; only the network is a list in memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from aggregator import service as serving
from aggregator.events import Begin
from aggregator.operations import unix_ms
from aggregator.replay import Work, replayed
from aggregator.rounds import step as next_step
from aggregator.state import new_state, plan_of
from shared.seeds import draw
from shared.steprule import deltas
from shared.wire import decode, scalars_from_bytes
from tools.bench import Asked, BenchResult, Measured, load, machine, repeated
from tools.bench_feed import FORM, FULL, QUICK, STEPS, Feed, Sizes, served, spec, updates_of
from tools.bench_serving import idle_memory, through_mosquitto


def bench_aggregator(asked: Asked) -> BenchResult:
    """See the module. `asked.folder` must be on a real disk: that is what is measured."""
    sizes, folder = QUICK if asked.quick else FULL, asked.folder
    rows = [*_throughput(sizes, folder), _replay(sizes), *_large_round(sizes, folder), idle_memory(sizes, folder)]
    rows += through_mosquitto(sizes, folder)
    return BenchResult("aggregator", tuple(rows), machine(), load())


def _seconds(folder: Path, updates: list[tuple[str, bytes]], batch: int) -> tuple[float, float]:
    """Seconds, and those of the processor, until all are decided, on the disk, receipted and acknowledged."""
    usual, serving.MAX_BATCH = serving.MAX_BATCH, batch
    feed = Feed()
    try:
        with served(folder, len(updates) + 1, feed) as service:
            feed.waiting.extend(updates)
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            while feed.acknowledged < len(updates):
                service.turn(0)
            return time.perf_counter() - began_s, time.process_time() - began_cpu_s
    finally:
        serving.MAX_BATCH = usual


def _throughput(sizes: Sizes, folder: Path) -> list[Measured]:
    updates = updates_of(sizes.updates)
    seconds = [_seconds(folder, updates, serving.MAX_BATCH) for _ in range(sizes.runs)]
    alone = [_seconds(folder, updates[: sizes.singles], 1) for _ in range(sizes.runs)]
    single = sizes.singles / statistics.median(wall_s for wall_s, _ in alone)
    what = f"durable updates of {STEPS} scalars, {serving.MAX_BATCH} per commit"
    wall = tuple(sizes.updates / wall_s for wall_s, _ in seconds)
    processor = tuple(sizes.updates / cpu_s for _, cpu_s in seconds)
    return [
        Measured(what, "updates/s", wall, ">= 10000", f"a commit per update: {single:.0f} updates/s"),
        Measured(what + ", by processor time alone", "updates/s", processor),
    ]


def _replay(sizes: Sizes) -> Measured:
    """Seconds of replay per 100,000 devices, against one device after the other."""
    state = next_step(new_state(spec(2)), Begin(unix_ms())).state
    plan, facts = plan_of(state), state.spec.facts
    updates = [(device, decode("update", payload)) for device, payload in updates_of(sizes.replays)]

    def fast() -> float:
        began_s = time.perf_counter()
        for _ in replayed((Work(device, update, plan) for device, update in updates), facts):  # type: ignore[arg-type]
            pass
        return (time.perf_counter() - began_s) / sizes.replays * 1e5

    def slow() -> float:
        began_s = time.perf_counter()
        for device, update in updates:
            scalars = scalars_from_bytes(update.scalars, FORM)  # type: ignore[union-attr]
            draw(plan.nonce, device, scalars.size, facts.seeds, None)
            deltas(plan.step, scalars)
        return (time.perf_counter() - began_s) / sizes.replays * 1e5

    values = repeated(fast, sizes.runs)
    one_by_one = statistics.median(repeated(slow, sizes.runs))
    return Measured("replay of 100,000 updates", "s", values, "", f"one device after the other: {one_by_one:.1f} s")


def _large_round(sizes: Sizes, folder: Path) -> list[Measured]:
    """A process of its own, so that its memory can be told."""
    totals, closings, peaks = [], [], []
    for _ in range(1 if sizes is QUICK else 3):
        command = [sys.executable, "-m", "tools.bench_aggregator", str(sizes.devices), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        facts = json.loads(done.stdout)
        totals.append(facts["round_s"])
        closings.append(facts["closing_s"])
        peaks.append(facts["peak_mb"])
    what = f"one round of {sizes.devices:,} devices, {STEPS} scalars each"
    return [
        Measured(what + ": first update to next plan", "s", tuple(totals), "< 60"),
        Measured(what + ": of that, closing", "s", tuple(closings)),
        Measured(what + ": peak memory of the process, made updates included", "MB", tuple(peaks)),
    ]


def one_round(devices: int, folder: Path) -> dict[str, float]:
    """A whole round: every update received, committed, receipted; closed; the next plan published."""
    updates = updates_of(devices)
    feed = Feed()
    with served(folder, devices, feed) as service:
        feed.waiting.extend(updates)
        began_s = before_s = time.perf_counter()
        while 1 not in feed.plans:
            before_s = time.perf_counter()
            service.turn(0)
        ended_s = time.perf_counter()
        assert feed.acknowledged == devices == feed.receipts
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"round_s": ended_s - began_s, "closing_s": ended_s - before_s, "peak_mb": peak / 1000}


if __name__ == "__main__":
    print(json.dumps(one_round(int(sys.argv[1]), Path(sys.argv[2]))))
