"""The benchmark does what it says, on numbers small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from tools import bench, bench_aggregator
from tools.bench import Asked, BenchResult, Measured
from tools.bench_feed import Sizes


def test_a_round_of_the_benchmark_is_received_stored_receipted_and_closed(tmp_path: Path) -> None:
    facts = bench_aggregator.one_round(30, tmp_path)
    assert 0 < facts["closing_s"] < facts["round_s"]
    assert not list(tmp_path.glob("*.sqlite3*"))


def test_throughput_and_replay_are_measured_beside_their_baselines(tmp_path: Path) -> None:
    sizes = Sizes(updates=40, singles=5, devices=10, replays=5, runs=3)
    throughput, processor = bench_aggregator._throughput(sizes, tmp_path)
    assert processor.median > 0
    assert len(throughput.values) == 3
    assert throughput.median > 0
    assert "a commit per update: " in throughput.baseline
    assert "one device after the other: " in bench_aggregator._replay(sizes).baseline


def test_a_table_says_median_spread_goal_and_machine() -> None:
    row = Measured("speed", "updates/s", (3.0, 1.0, 2.0), ">= 1", "by hand: 0.5 updates/s")
    text = BenchResult("it", (row,), "a machine", "load average 0.1").table()
    assert text.splitlines()[0] == "it: a machine; load average 0.1"
    assert text.splitlines()[2].split() == f"speed 2 updates/s 1 to 3 3 >= 1 {row.baseline}".split()


def test_an_unknown_benchmark_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no benchmark 'speed'; allowed are .*aggregator"):
        bench.bench("speed", Asked(True, tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_all_stands_for_a_full_set_and_a_name_for_itself() -> None:
    assert bench.chosen("all") == ("step", "rebuild", "memory", "wire", "learning")
    assert bench.chosen("step") == ("step",)


def test_a_set_goes_on_past_a_benchmark_that_cannot_run_and_keeps_what_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(asked: Asked) -> BenchResult:
        raise UserError("there is no model")

    def works(asked: Asked) -> BenchResult:
        return BenchResult("it", (Measured("speed", "x", (2.0,)),), "a machine", "idle")

    monkeypatch.setattr(bench, "BENCHES", dict.fromkeys(bench.SET, works) | {"memory": fails})
    found = []
    with pytest.raises(UserError, match=r"a part of the set could not run\. memory: there is no model"):
        found.extend(bench.results("all", Asked(True, tmp_path)))
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept == [json.loads(json.dumps(result.facts())) for result in found] and len(kept) == 4
    with pytest.raises(UserError, match=r"^there is no model"):
        list(bench.results("memory", Asked(True, tmp_path)))
