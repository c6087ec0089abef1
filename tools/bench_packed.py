"""`kseed bench packed`: a step of a model in nf4, tuned in full, against plain inference of the same nf4 model.

The baseline is transformers and bitsandbytes as they are, on the same folder, which `kseed quantise` writes first. Each
way runs in a process of its own (`tools.bench_memory` says how its peak is measured).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from tools.bench import Asked, BenchResult, Measured, load, machine
from tools.bench_memory import status_mb
from tools.bench_step import batch_of, forwards_of, in_process, model_of, overlay_of, step_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edge_client.data.batches import Batch

Way = Literal["inference", "numba", "torch"]  # by bitsandbytes, or a step on that kernel
_STEPS = 3


@dataclass(frozen=True)
class Cost:
    """Of one process: resident memory with nothing but its imports, the highest of its work, and a work's seconds."""

    imports_mb: float
    peak_mb: float
    cpu_s: float  # processor time of the fastest of `_STEPS`


def bench_packed(asked: Asked) -> BenchResult:
    """See the module. Raises UserError where bitsandbytes cannot be used."""
    folder = asked.folder / "nf4"
    if not folder.exists():
        from tools.quantise import quantise

        quantise(model_of(asked), folder, width="4bit", kind="nf4", dtype="bf16")
    costs: dict[Way, list[Cost]] = {way: [] for way in get_args(Way)}
    for _ in range(1 if asked.quick else 5):
        for way, kept in costs.items():
            kept.append(Cost(*in_process("tools.bench_packed", str(folder), way)["cost"]))
    return BenchResult("packed", tuple(rows_of(costs)), machine(), load())


def rows_of(costs: dict[Way, list[Cost]]) -> list[Measured]:
    """Ratios of memory, whole and beyond the imports, and of processor time."""
    plain = costs["inference"]
    whole = statistics.median(cost.peak_mb for cost in plain)
    beyond = statistics.median(cost.peak_mb - cost.imports_mb for cost in plain)
    seconds = statistics.median(cost.cpu_s for cost in plain)
    rows = [Measured("nf4 inference by bitsandbytes, peak", "MB", tuple(cost.peak_mb for cost in plain))]
    for way in ("numba", "torch"):
        kept = costs[way]
        grown = tuple((cost.peak_mb - cost.imports_mb) / beyond for cost in kept)
        name = f"nf4 step, {way} kernel"
        rows += [
            Measured(f"{name}, peak", "MB", tuple(cost.peak_mb for cost in kept)),
            Measured(f"{name} / nf4 inference, memory", "x", tuple(cost.peak_mb / whole for cost in kept), "<= 1.10",
                     f"inference: {whole:.0f} MB"),
            Measured(f"{name} / nf4 inference, memory beyond imports", "x", grown, "", f"inference: {beyond:.0f} MB"),
            Measured(f"{name} / two nf4 forwards, cpu time", "x", tuple(cost.cpu_s / seconds for cost in kept), "",
                     f"two forwards by bitsandbytes: {seconds:.2f} s"),
        ]  # fmt: skip
    return rows


def measured(folder: str, way: Way) -> Cost:
    """Load `folder` and work, in this process, which should have done nothing else before."""
    from edge_client.kernels import choose
    from edge_client.packed import import_bitsandbytes

    kernel = choose("cpu", "torch" if way == "inference" else way).kernel
    import_bitsandbytes()
    imports_mb = status_mb("VmRSS")
    work = _inference(folder) if way == "inference" else _step(folder, kernel.name)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes what is held now
    seconds = []
    for _ in range(_STEPS):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return Cost(imports_mb, status_mb("VmHWM"), min(seconds))


def _batch(model: PreTrainedModel) -> Batch:
    return batch_of(int(model.config.vocab_size))


def _inference(folder: str) -> Callable[[], None]:
    """Two forward passes of transformers' own model, as bitsandbytes computes them."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.train(False)
    return forwards_of(model, _batch(model), 2)


def _step(folder: str, kernel: str) -> Callable[[], None]:
    from edge_client.model import load_model

    model = load_model(folder, "bf16").model
    return step_of(model, overlay_of(model, kernel), _batch(model))


def _main(folder: str, way: Way) -> None:
    cost = measured(folder, way)
    print(json.dumps({"cost": [cost.imports_mb, cost.peak_mb, cost.cpu_s]}))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])  # type: ignore[arg-type]
