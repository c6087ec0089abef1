"""The benchmarks of step, rebuild and memory measure what they say, on a model small enough for a test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from tests.tiny_models import save_tiny, tiny_model
from tools import bench_memory, bench_rebuild, bench_step
from tools.bench import Asked
from tools.bench_memory import Peak
from tools.bench_step import Pairs, Timing


def test_runs_alternate_and_neither_is_always_first() -> None:
    seen: list[str] = []
    ours, theirs = bench_step.alternate(lambda: seen.append("ours"), lambda: seen.append("theirs"), 3)
    assert seen[2:] == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]  # after a run of each to warm up
    assert len(ours) == len(theirs) == 3
    assert all(timing.wall_s >= 0 and timing.cpu_s >= 0 for timing in (*ours, *theirs))


def test_a_ratio_is_taken_of_each_pair_and_says_its_baseline() -> None:
    pairs = Pairs([Timing(3.0, 6.0), Timing(5.0, 5.0)], [Timing(2.0, 4.0), Timing(5.0, 4.0)], threads=2)
    wall, cpu = bench_step.rows_of(pairs)
    assert wall.values == (1.5, 1.0) and cpu.values == (1.5, 1.25)
    assert wall.what == "step / two bare forwards, wall time, 2 threads" and wall.goal == "<= 1.10"
    assert wall.baseline == "two bare forwards: 3.500 s; the step: 4.000 s"


def test_the_step_of_the_benchmark_moves_the_overlay_and_leaves_the_baseline_alone() -> None:
    model = tiny_model("llama-tied", torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    twin = bench_step.twin_of(model)
    assert [w.data_ptr() for w in twin.parameters()] == [w.data_ptr() for w in model.parameters()]
    overlay = bench_step.overlay_of(twin)
    batch = bench_step.batch_of(int(model.config.vocab_size))
    assert batch.input_ids.numel() == 1000 and batch.labelled_tokens == 256
    step = bench_step.step_of(twin, overlay, batch)
    step(), step()
    assert overlay.coefficients.nonzero()[0].tolist() == [7, 8]
    bench_step.forwards_of(model, batch, 1)()
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


def test_step_and_baseline_are_measured_as_often_as_asked() -> None:
    pairs = bench_step.measured(tiny_model("llama", torch.bfloat16), threads=1, runs=2)
    assert len(pairs.steps) == len(pairs.forwards) == 2 and pairs.threads == 1
    assert all(timing.wall_s > 0 for timing in (*pairs.steps, *pairs.forwards))


def test_the_rebuild_of_the_benchmark_writes_every_tensor_and_the_copy_every_base() -> None:
    overlay = bench_step.overlay_of(tiny_model("llama", torch.bfloat16), seeds=256)
    memory = bench_rebuild.memory_of(overlay)
    assert sorted(memory) == sorted(tensor.name for tensor in overlay.manifest.tensors)
    bench_rebuild.copy_of(overlay, memory)()
    base = {name: out.clone() for name, out in memory.items()}
    assert all(torch.equal(out.view(-1), overlay.materialise(name).view(-1)) for name, out in memory.items())
    bench_rebuild.rebuild_of(overlay, memory)()
    assert overlay.coefficients.all()
    assert all(torch.equal(out.view(-1), overlay.materialise(name).view(-1)) for name, out in memory.items())
    assert any(not torch.equal(base[name], out) for name, out in memory.items())


def test_the_papers_rebuild_draws_each_seed_anew_and_is_scaled_by_the_pool() -> None:
    once, again = [torch.zeros(50)], [torch.zeros(50)]
    bench_rebuild.paper_rebuild(once, 2)
    bench_rebuild.paper_rebuild(again, 2)
    z = [torch.normal(0.0, 1.0, (50,), generator=torch.Generator().manual_seed(k)) for k in range(2)]
    assert torch.equal(once[0], again[0])
    assert torch.allclose(once[0], -1e-6 * (z[0] + z[1]))
    row = bench_rebuild.against_paper(4096, 1, [Timing(9.0, 0.5)], [Timing(9.0, 2.0)] * 3)
    assert row.values == (8192.0,)
    assert row.baseline == "the paper's: 4096 s, of 2 seeds and multiplied by 2048"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    ((imports_mb, peak_mb),) = bench_step.in_process("tools.bench_memory", str(folder), "torch")["peak"]
    assert 50 < imports_mb < peak_mb < 5000


def test_memory_is_compared_with_inference_whole_and_beyond_the_imports() -> None:
    peaks = {
        "inference": [Peak(100.0, 300.0)], "numba": [Peak(150.0, 450.0)], "torch": [Peak(100.0, 310.0)],
        "streamed": [Peak(150.0, 250.0)],
    }  # fmt: skip
    rows = {row.what: row for row in bench_memory.rows_of(peaks)}  # type: ignore[arg-type]
    assert rows["step, numba kernel / plain inference"].values == (1.5,)
    assert rows["step, numba kernel / plain inference, beyond imports"].values == (1.5,)
    assert rows["step, torch kernel / plain inference, beyond imports"].values == (1.05,)
    assert rows["step, torch kernel / plain inference"].goal == "<= 1.05"
    assert rows["step, weights streamed from disk / plain inference, beyond imports"].values == (0.5,)


def test_the_memory_benchmark_is_refused_where_peaks_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(UserError, match=r"reads /proc/self; this system has none\. Run it on Linux"):
        bench_memory.bench_memory(Asked(True, tmp_path, "nowhere"))
