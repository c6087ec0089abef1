"""`kseed bench memory`: the peak resident memory of a zeroth-order step against plain inference on the same batch.

Each way runs in a process of its own, which loads the model, sets the kernel's record of its peak back (loading needs
more than either) and then works. What a process holds before it loads the model is printed too: of a small model's
step, the interpreter, torch and numba are the larger part.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from shared.errors import UserError
from tools.bench import Asked, BenchResult, Measured, load, machine
from tools.bench_step import batch_of, forwards_of, in_process, model_of, overlay_of, step_of

Way = Literal["inference", "numba", "torch", "streamed"]  # or a step: on that kernel, or with weights left on disk
_STEPS = 3


@dataclass(frozen=True)
class Peak:
    """Resident memory of one process in MB: with nothing but its imports, and the highest of its work."""

    imports_mb: float
    peak_mb: float


def bench_memory(asked: Asked) -> BenchResult:
    """See the module. Raises UserError off Linux, where a peak cannot be set back."""
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("the memory benchmark reads /proc/self; this system has none. Run it on Linux.")
    source = model_of(asked)
    runs = 1 if asked.quick else 5
    ways: tuple[Way, ...] = ("inference", "numba") if asked.quick else get_args(Way)
    peaks: dict[Way, list[Peak]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, kept in peaks.items():
            facts = in_process("tools.bench_memory", source, way)
            kept.append(Peak(*facts["peak"][0]))
    return BenchResult("memory", tuple(rows_of(peaks)), machine(), load())


def rows_of(peaks: dict[Way, list[Peak]]) -> list[Measured]:
    """Ratios of the whole process, and of what it holds beyond its imports."""
    plain = peaks["inference"]
    whole = statistics.median(peak.peak_mb for peak in plain)
    beyond = statistics.median(peak.peak_mb - peak.imports_mb for peak in plain)
    rows = [
        Measured("plain inference, peak", "MB", tuple(peak.peak_mb for peak in plain)),
        Measured("plain inference, imports alone", "MB", tuple(peak.imports_mb for peak in plain)),
    ]
    names: dict[Way, str] = {
        "numba": "step, numba kernel",
        "torch": "step, torch kernel",
        "streamed": "step, weights streamed from disk",
    }
    for way, kept in peaks.items():
        if way == "inference":
            continue
        name = names[way]
        ratios = tuple(peak.peak_mb / whole for peak in kept)
        grown = tuple((peak.peak_mb - peak.imports_mb) / beyond for peak in kept)
        rows += [
            Measured(f"{name}, peak", "MB", tuple(peak.peak_mb for peak in kept)),
            Measured(f"{name}, imports alone", "MB", tuple(peak.imports_mb for peak in kept)),
            Measured(f"{name} / plain inference", "x", ratios, "<= 1.05", f"inference: {whole:.0f} MB"),
            Measured(f"{name} / plain inference, beyond imports", "x", grown, "", f"inference: {beyond:.0f} MB"),
        ]
    return rows


def measured(source: str, way: Way) -> Peak:
    """Load `source` and work, in this process, which should have done nothing else before."""
    from edge_client.kernels import choose
    from edge_client.model import load_model
    from edge_client.streamed import load_streamed

    kernel = choose("cpu", "torch" if way == "inference" else "numba" if way == "streamed" else way).kernel
    imports_mb = status_mb("VmRSS")
    model = (load_streamed if way == "streamed" else load_model)(source, "bf16").model
    batch = batch_of(int(model.config.vocab_size))
    work = forwards_of(model, batch, 2)
    if way != "inference":
        work = step_of(model, overlay_of(model, kernel.name), batch)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes what is held now
    for _ in range(_STEPS):
        work()
    return Peak(imports_mb, status_mb("VmHWM"))


def status_mb(field: str) -> float:
    """A field of /proc/self/status, such as VmRSS, in MB. Raises UserError where there is none."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise UserError(f"/proc/self/status has no {field}. Run the memory benchmark on Linux.")


def _main(source: str, way: Way) -> None:
    peak = measured(source, way)
    print(json.dumps({"peak": [[peak.imports_mb, peak.peak_mb]]}))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])  # type: ignore[arg-type]
