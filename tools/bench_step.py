"""`kseed bench step`: a zeroth-order step against two bare forward passes of the same batch, threads 1 and 2.

The baseline is the strictest one: the same loss of the same batch by the same model with plain parameters, and it
also runs the output head only on labelled positions. Both models share the memory of the base weights. Runs alternate,
so that what disturbs one disturbs the other. Each number of threads has a process of its own, as agents have.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench import Asked, BenchResult, Measured, load, machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edge_client.data.batches import Batch
    from edge_client.overlay import Overlay

POOL_KEY = 1
SEEDS = 4096
EPS = 1e-3
DELTA = 1e-6
ROWS, LENGTH = 8, 125  # about 1,000 tokens
LABELLED = 32  # of each row: the end of it, as an answer


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: on the clock, and of all this process's threads together."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Pairs:
    """Runs of the step and of two bare forward passes, in the order in which they alternated."""

    steps: list[Timing]
    forwards: list[Timing]
    threads: int


def bench_step(asked: Asked) -> BenchResult:
    """See the module."""
    source = model_of(asked)
    runs = 3 if asked.quick else 11
    rows = []
    for threads in (1,) if (os.cpu_count() or 1) < 2 else (1, 2):
        facts = in_process("tools.bench_step", source, str(threads), str(runs))
        steps = [Timing(*each) for each in facts["steps"]]
        forwards = [Timing(*each) for each in facts["forwards"]]
        rows += rows_of(Pairs(steps, forwards, threads))
    return BenchResult("step", tuple(rows), machine(), load())


def rows_of(pairs: Pairs) -> list[Measured]:
    """Ratios of each pair; the load of others shows in the clock's more than in the processors'."""
    threads = f"{pairs.threads} thread" + ("s" if pairs.threads > 1 else "")
    rows = []
    for clock, goal in (("wall", "<= 1.10"), ("cpu", "")):
        step = [getattr(timing, f"{clock}_s") for timing in pairs.steps]
        bare = [getattr(timing, f"{clock}_s") for timing in pairs.forwards]
        ratios = tuple(ours / theirs for ours, theirs in zip(step, bare, strict=True))
        medians = f"{statistics.median(bare):.3f} s; the step: {statistics.median(step):.3f} s"
        what = f"step / two bare forwards, {clock} time, {threads}"
        rows.append(Measured(what, "x", ratios, goal, f"two bare forwards: {medians}"))
    return rows


def alternate(ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> tuple[list[Timing], list[Timing]]:
    """Both once to warm up, then so many runs of each, in turns, the one that begins changing."""
    ours(), theirs()
    timings: tuple[list[Timing], list[Timing]] = ([], [])
    for number in range(runs):
        order = ((ours, timings[0]), (theirs, timings[1]))
        for run, kept in order if number % 2 else reversed(order):
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            run()
            kept.append(Timing(time.perf_counter() - wall_s, time.process_time() - cpu_s))
    return timings


def batch_of(vocabulary: int) -> Batch:
    """Random tokens, int64 (`ROWS`, `LENGTH`); the last `LABELLED` of each row are learned."""
    import torch

    from edge_client.data.batches import NOT_LABELLED, Batch

    ids = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, NOT_LABELLED)
    labels[:, -LABELLED:] = ids[:, -LABELLED:]
    return Batch(ids, torch.ones_like(ids), labels)


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """Another model on the same memory: what an overlay takes out of one of them stays in the other."""
    shared = {id(weight): weight for weight in model.parameters()}
    return copy.deepcopy(model, shared)


def overlay_of(model: PreTrainedModel, kernel: str = "auto", seeds: int = SEEDS) -> Overlay:
    """An overlay over `model` on the kernel that an agent would choose."""
    from edge_client.kernels import choose
    from edge_client.overlay import Overlay

    chosen = choose("cpu", kernel).kernel  # type: ignore[arg-type]
    return Overlay(model, pool_key=POOL_KEY, seeds=seeds, directions="hadamard", kernel=chosen)


def step_of(model: PreTrainedModel, overlay: Overlay, batch: Batch) -> Callable[[], None]:
    """A whole local step, as the agent takes it: two probes, one nudge; the next seed each time."""
    from edge_client.estimator import two_point
    from edge_client.loss import labelled_loss

    seeds = iter(range(7, overlay.seeds))

    def step() -> None:
        k = next(seeds)
        two_point(lambda: labelled_loss(model, batch), overlay, k, EPS, "f32")
        overlay.nudge(k, DELTA)

    return step


def forwards_of(model: PreTrainedModel, batch: Batch, count: int) -> Callable[[], None]:
    """So many losses of `batch`, and nothing else."""
    import torch

    from edge_client.loss import labelled_loss

    def forwards() -> None:
        with torch.inference_mode():
            for _ in range(count):
                float(labelled_loss(model, batch))

    return forwards


def measured(model: PreTrainedModel, threads: int, runs: int) -> Pairs:
    """Step and baseline of `model` with `threads` threads, for which this process should have been started."""
    import torch

    torch.set_num_threads(threads)
    batch = batch_of(int(model.config.vocab_size))
    tuned = twin_of(model)
    step = step_of(tuned, overlay_of(tuned), batch)
    steps, forwards = alternate(step, forwards_of(model, batch, 2), runs)
    return Pairs(steps, forwards, threads)


def model_of(asked: Asked) -> str:
    """The model to measure: what was asked for, or the demo's."""
    from tools.fetch_model import fetch_model

    return asked.model or str(fetch_model(lambda line: print(line, file=sys.stderr)))


def in_process(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON that `python -m module arguments` prints, run where this checkout or install can be imported."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _main(source: str, threads: int, runs: int) -> None:
    from edge_client.threads import sleep_while_waiting

    sleep_while_waiting()  # as agents do
    from edge_client.model import load_model

    pairs = measured(load_model(source, "bf16").model, threads, runs)
    listed = {
        name: [[timing.wall_s, timing.cpu_s] for timing in kept]
        for name, kept in (("steps", pairs.steps), ("forwards", pairs.forwards))
    }
    print(json.dumps(listed))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
