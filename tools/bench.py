"""`kseed bench`: benchmarks that state their baseline in the same run. Each is a function of what was asked for."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError


@dataclass(frozen=True)
class Asked:
    """What a person wants of a benchmark."""

    quick: bool
    folder: Path  # for its files
    model: str | None = None  # hub id, folder or GGUF file; the demo's model if None
    data: Path | None = None  # a file to learn from; None: the demo's remarks, and for first-order none


@dataclass(frozen=True)
class Measured:
    """One quantity: the median of some runs, with the goal it has and the baseline measured beside it."""

    what: str
    unit: str
    values: tuple[float, ...]  # one per run
    goal: str = ""
    baseline: str = ""  # what it is compared with, and what that gave in this run

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        """Lowest to highest."""
        return f"{min(self.values):.6g} to {max(self.values):.6g}"


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark found, and on what machine."""

    name: str
    rows: tuple[Measured, ...]
    machine: str
    load: str  # others on the machine, while it ran

    def table(self) -> str:
        """For people."""
        head = ("WHAT", "MEDIAN", "SPREAD", "RUNS", "GOAL", "BASELINE")
        cells = [head]
        for row in self.rows:
            spread = row.spread if len(row.values) > 1 else "-"
            cells.append(
                (row.what, f"{row.median:.6g} {row.unit}", spread, str(len(row.values)), row.goal, row.baseline)
            )
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([f"{self.name}: {self.machine}; {self.load}", *(line.rstrip() for line in lines)])

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "rows": [{**asdict(row), "median": row.median} for row in self.rows]}


def aggregator(asked: Asked) -> BenchResult:
    """Durable updates per second, idle memory, a round of 100,000 devices."""
    from tools.bench_aggregator import bench_aggregator

    return bench_aggregator(asked)


def first_order(asked: Asked) -> BenchResult:
    """A step with exact gradients against LoRA and full backprop: memory and time; with data, what K buys."""
    from tools.bench_first_order import bench_first_order

    return bench_first_order(asked)


def learning(asked: Asked) -> BenchResult:
    """Loss after the same number of forward passes, against plain ZO-SGD at the best of a grid of rates."""
    from tools.bench_learning import bench_learning

    return bench_learning(asked)


def memory(asked: Asked) -> BenchResult:
    """Peak memory of a zeroth-order step against plain inference."""
    from tools.bench_memory import bench_memory

    return bench_memory(asked)


def packed(asked: Asked) -> BenchResult:
    """Memory and time of a step in nf4 against inference of the same model by bitsandbytes."""
    from tools.bench_packed import bench_packed

    return bench_packed(asked)


def rebuild(asked: Asked) -> BenchResult:
    """All weights from all coefficients, against a memory copy and against the paper's way."""
    from tools.bench_rebuild import bench_rebuild

    return bench_rebuild(asked)


def step(asked: Asked) -> BenchResult:
    """A zeroth-order step against two bare forward passes."""
    from tools.bench_step import bench_step

    return bench_step(asked)


def wire(asked: Asked) -> BenchResult:
    """Bytes of a client-round on the wire, in layers, against goal and paper."""
    from tools.bench_wire import bench_wire

    return bench_wire(asked)


ALL = "all"
# A full set: half an hour on two cores. The others are asked for by name.
SET = ("step", "rebuild", "memory", "wire", "learning")
BENCHES: dict[str, Callable[[Asked], BenchResult]] = {
    "aggregator": aggregator,
    "first-order": first_order,
    "learning": learning,
    "memory": memory,
    "packed": packed,
    "rebuild": rebuild,
    "step": step,
    "wire": wire,
}


def chosen(name: str) -> tuple[str, ...]:
    """The benchmarks that `name` stands for: itself, or a full set for `all`. Raises UserError for an unknown name."""
    if name != ALL and name not in BENCHES:
        raise UserError(f"there is no benchmark {name!r}; allowed are {ALL}, {', '.join(sorted(BENCHES))}.")
    return SET if name == ALL else (name,)


def results(name: str, asked: Asked) -> Iterator[BenchResult]:
    """Run what `name` stands for, one after the other; what was found so far is in bench.json of the folder.

    Raises UserError for an unknown name, and where a benchmark cannot run; of a set, once the others have.
    """
    facts, missing = [], []
    for one in chosen(name):
        try:
            result = bench(one, asked)
        except UserError as error:
            if name != ALL:
                raise
            missing.append(f"{one}: {error}")
            continue
        facts.append(result.facts())
        (asked.folder / "bench.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        yield result
    if missing:
        raise UserError(f"a part of the set could not run. {' '.join(missing)}")


def bench(name: str, asked: Asked) -> BenchResult:
    """Run one benchmark. Raises UserError for an unknown name."""
    (only,) = chosen(name)
    asked.folder.mkdir(parents=True, exist_ok=True)
    return BENCHES[only](asked)


def machine() -> str:
    """The processor, its cores, and the software that matters."""
    import numpy as np

    return f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}"


def load() -> str:
    """How busy others kept the machine in the last minute."""
    if not hasattr(os, "getloadavg"):
        return "load unknown"
    return f"load average {os.getloadavg()[0]:.1f}"


def repeated(measure: Callable[[], float], runs: int) -> tuple[float, ...]:
    """What `measure` gives, so many times."""
    return tuple(measure() for _ in range(runs))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
