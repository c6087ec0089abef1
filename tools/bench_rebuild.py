"""`kseed bench rebuild`: all weights from all coefficients, against a memory copy of them and the paper's way.

A rebuild is y = H a and then every tensor of the model written to memory of its own, large enough that it does not stay
in a cache. The copy writes the same base tensors to the same memory. The paper's way draws each seed's normals again
with torch's generator, tensor by tensor, and adds them in place (its repository, `random_vector_generator`); it is
measured on few seeds and multiplied, because it takes hours.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tools.bench import Asked, BenchResult, Measured, load, machine
from tools.bench_step import Timing, alternate, in_process, model_of, overlay_of, twin_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from edge_client.overlay import Overlay

POOLS = (4096, 65536)
PAPER_SEEDS = 2  # of each measurement; a rebuild of the paper takes as many as the pool has
PAPER_RUNS = 3
PAPER_STEP = 1e-6


def bench_rebuild(asked: Asked) -> BenchResult:
    """See the module."""
    source = model_of(asked)
    runs = 3 if asked.quick else 11
    rows: list[Measured] = []
    for threads in (1,) if (os.cpu_count() or 1) < 2 else (1, 2):
        facts = in_process("tools.bench_rebuild", source, str(threads), str(runs))
        paper = [Timing(*each) for each in facts["paper"]]
        for seeds in POOLS:
            rebuilds = [Timing(*each) for each in facts[f"rebuild {seeds}"]]
            copies = [Timing(*each) for each in facts[f"copy {seeds}"]]
            rows += rows_of(seeds, threads, rebuilds, copies)
            rows.append(against_paper(seeds, threads, rebuilds, paper))
    return BenchResult("rebuild", tuple(rows), machine(), load())


def rows_of(seeds: int, threads: int, rebuilds: list[Timing], copies: list[Timing]) -> list[Measured]:
    """Ratios of each pair, by the clock and by processor time."""
    rows = []
    for clock, goal in (("wall", "<= 2"), ("cpu", "")):
        ours = [getattr(timing, f"{clock}_s") for timing in rebuilds]
        theirs = [getattr(timing, f"{clock}_s") for timing in copies]
        ratios = tuple(mine / other for mine, other in zip(ours, theirs, strict=True))
        medians = f"{1000 * statistics.median(theirs):.1f} ms; the rebuild: {1000 * statistics.median(ours):.1f} ms"
        what = f"rebuild / memory copy, K {seeds}, {clock} time, {threads} thread" + ("s" if threads > 1 else "")
        rows.append(Measured(what, "x", ratios, goal, f"copy of the same bytes: {medians}"))
    return rows


def against_paper(seeds: int, threads: int, rebuilds: list[Timing], paper: list[Timing]) -> Measured:
    """How many times faster than the paper's rebuild, in processor time: minutes of a shared clock would tell less."""
    whole_s = statistics.median(timing.cpu_s for timing in paper) / PAPER_SEEDS * seeds
    what = f"the paper's rebuild / ours, K {seeds}, cpu time, {threads} thread" + ("s" if threads > 1 else "")
    baseline = f"the paper's: {whole_s:.0f} s, of {PAPER_SEEDS} seeds and multiplied by {seeds // PAPER_SEEDS}"
    return Measured(what, "x", tuple(whole_s / timing.cpu_s for timing in rebuilds), ">= 1000", baseline)


def measured(model: PreTrainedModel, threads: int, runs: int) -> dict[str, list[Timing]]:
    """Rebuilds and copies of each pool, and the paper's way, with `threads` threads."""
    import torch

    torch.set_num_threads(threads)
    found: dict[str, list[Timing]] = {}
    for seeds in POOLS:
        overlay = overlay_of(twin_of(model), seeds=seeds)
        memory = memory_of(overlay)
        rebuilds, copies = alternate(rebuild_of(overlay, memory), copy_of(overlay, memory), runs)
        found |= {f"rebuild {seeds}": rebuilds, f"copy {seeds}": copies}
    weights = [weight.detach().clone() for weight in model.parameters()]
    found["paper"], _ = alternate(lambda: paper_rebuild(weights, PAPER_SEEDS), lambda: None, PAPER_RUNS)
    return found


def rebuild_of(overlay: Overlay, memory: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Follow new coefficients and write every tensor to `memory`, flat tensors by name."""
    import numpy as np
    import torch

    coefficients = 1e-5 * np.random.default_rng(0).standard_normal(overlay.seeds).astype(np.float32)
    start = torch.zeros(1, dtype=torch.int64)

    def rebuild() -> None:
        overlay.set_coefficients(coefficients)
        for name, out in memory.items():
            overlay._weights[name].fill(start, out.view(1, -1))

    return rebuild


def copy_of(overlay: Overlay, memory: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Write every base tensor to `memory`."""

    from edge_client.bases import PlainBase

    kept = {name: overlay._weights[name].base for name in memory}
    bases = {name: base.flat for name, base in kept.items() if isinstance(base, PlainBase)}

    def copy() -> None:
        for name, base in bases.items():
            memory[name].copy_(base)

    return copy


def memory_of(overlay: Overlay) -> dict[str, torch.Tensor]:
    """Memory for every tensor, all at once: flat, by name."""
    import torch

    bases = {name: weights.base for name, weights in overlay._weights.items()}
    return {name: torch.empty(base.elements, dtype=base.dtype) for name, base in bases.items()}


def paper_rebuild(weights: list[torch.Tensor], seeds: int) -> None:
    """weights += a[k] * z_k for so many k, in place, z by torch's normal generator in the weights' dtype."""
    import torch

    for k in range(seeds):
        generator = torch.Generator().manual_seed(k)
        for weight in weights:
            z = torch.normal(0.0, 1.0, size=weight.shape, generator=generator, dtype=weight.dtype)
            weight.sub_(PAPER_STEP * z)


def _main(source: str, threads: int, runs: int) -> None:
    from edge_client.threads import sleep_while_waiting

    sleep_while_waiting()  # as agents do
    from edge_client.model import load_model

    found = measured(load_model(source, "bf16").model, threads, runs)
    print(json.dumps({name: [[each.wall_s, each.cpu_s] for each in kept] for name, kept in found.items()}))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
