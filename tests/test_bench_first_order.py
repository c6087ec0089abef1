"""The benchmark of exact gradients measures what it says, on a model small enough for a test."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from shared.errors import UserError
from tests.tiny_models import save_tiny, tiny_model
from tools import bench_first_order, bench_first_order_learning
from tools.bench import Asked
from tools.bench_first_order import Cost, Way, rows_of, work_of
from tools.bench_step import batch_of, in_process


def test_peaks_are_compared_beyond_the_imports_and_times_as_they_are() -> None:
    rows = rows_of({"inference": [Cost(200.0, 300.0, 1.0)], "kseed": [Cost(250.0, 400.0, 5.0)]})
    found = {row.what: row.values[0] for row in rows}
    assert found["a forward pass: peak beyond imports"] == 100.0
    assert found["kseed / a forward pass: peak"] == 1.5
    assert found["kseed / a forward pass: time"] == 5.0


@pytest.mark.parametrize("way", [way for way in get_args(Way) if not way.startswith("lora")])
def test_every_way_works_and_only_full_backprop_writes_the_weights(way: Way) -> None:
    model = tiny_model("llama-tied", torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    weights = dict(model.named_parameters())
    work = work_of(way, model, batch_of(int(model.config.vocab_size)))
    work()
    assert any(not torch.equal(before[name], weight) for name, weight in weights.items()) is (way == "full")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a peak can be set back on Linux only")
def test_the_cost_of_a_process_is_measured(tmp_path: Path) -> None:
    imports_mb, peak_mb, cpu_s = in_process("tools.bench_first_order", str(save_tiny(tmp_path)), "inference")["cost"]
    assert 0 < imports_mb < peak_mb and cpu_s > 0


def test_off_linux_the_benchmark_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(UserError, match="this system has none"):
        bench_first_order.bench_first_order(Asked(quick=True, folder=tmp_path))


def test_learning_reads_loss_and_accuracy_before_between_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((f"{'good' if n % 2 else 'bad'} {n}", f"{n % 2}") for n in range(60))]
        )
    monkeypatch.setattr(bench_first_order_learning, "READ_EVERY", 2)
    facts = bench_first_order_learning.learned(str(save_tiny(tmp_path / "model")), str(data), 256, 8)
    points = facts["points"]
    assert [point[0] for point in points] == [0, 10, 15]  # two and three gradient steps, five forwards each
    assert points[-1][1] < points[0][1] and all(0 <= point[2] <= 1 for point in points)
