"""The benchmark of packed bases measures what it says, on a model small enough for a test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tiny_models import save_tiny
from tools.bench_packed import Cost, rows_of
from tools.bench_step import in_process
from tools.quantise import quantise


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_a_step_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The baseline is left out: bitsandbytes' own forward refuses layers this small on processors with AVX512-BF16."""
    quantise(str(save_tiny(tmp_path / "plain")), tmp_path / "nf4", width="4bit", kind="nf4", dtype="bf16")
    imports_mb, peak_mb, cpu_s = in_process("tools.bench_packed", str(tmp_path / "nf4"), "torch")["cost"]
    assert 50 < imports_mb < peak_mb < 2000
    assert cpu_s > 0


def test_memory_and_time_are_compared_with_inference_of_the_same_packed_model() -> None:
    costs = {"inference": [Cost(100, 200, 2)], "numba": [Cost(120, 220, 3)], "torch": [Cost(100, 250, 4)]}
    rows = {row.what: row for row in rows_of(costs)}  # type: ignore[arg-type]
    assert rows["nf4 step, numba kernel / nf4 inference, memory"].median == 1.1
    assert rows["nf4 step, numba kernel / nf4 inference, memory beyond imports"].median == 1.0
    assert rows["nf4 step, torch kernel / two nf4 forwards, cpu time"].median == 2.0
