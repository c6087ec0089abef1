"""What an agent counts: a line in the log and a record in the metrics file for each round."""

from __future__ import annotations

import json

import pytest

from edge_client.tally import MetricsFile, Tally, round_line
from shared.errors import UserError
from shared.transport import TrafficCount
from shared.wire import encode
from tests.agents import presence_of, said, small, steps_of


def test_log_has_a_line_per_round_with_losses_and_bytes(tmp_path):
    fleet = small(tmp_path, evaluate_every=1)
    fleet.join("ann")
    fleet.run_to_the_end()
    lines = [line for line in said(fleet).splitlines() if line.startswith("round 2 over")]
    assert len(lines) == 1
    assert "accepted, 6 steps, train loss " in lines[0]
    assert "held-out loss " in lines[0]
    assert " B up, " in lines[0]


def test_metrics_count_each_byte_once(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann", metrics=tmp_path / "deep" / "metrics.jsonl")
    fleet.run_to_the_end()
    lines = [json.loads(line) for line in (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()]
    offline = len(encode(presence_of(fleet, "ann")))
    assert sum(line["payload_sent_bytes"] for line in lines) + offline == agent._transport.traffic().payload_sent_bytes
    assert lines[0]["socket_sent_bytes"] is None
    assert [line["receipt"] for line in lines] == ["accepted"] * 4 + [None]
    assert all(line["steps_s"] == 0 for line in lines)  # the test's clock stands still while the agent works


def test_full_disk_under_the_metrics_does_not_stop_the_training(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann", metrics=tmp_path / "metrics.jsonl")
    fleet.run_until(lambda: steps_of(agent) == 2)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    fleet.run_to_the_end()
    assert f"warning: metrics file {tmp_path / 'metrics.jsonl'} cannot be written: Is a directory" in said(fleet)


def test_metrics_file_in_an_impossible_place_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"metrics file .*file/metrics.jsonl cannot be written: .* Choose another place"
    ):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


def test_work_on_an_older_version_does_not_count_in_a_round():
    tally = Tally(TrafficCount(0, 0, None, None))
    tally.losses = [1.0, 2.0]
    tally.rebuilt(4, b"d" * 16, 0.5)
    metrics, _ = tally.close(
        run="demo", device="ann", round_number=4, receipt=None, traffic=TrafficCount(5, 6, 7, 8), unix_ms=0
    )
    assert (metrics.steps, metrics.train_loss, metrics.version) == (0, None, 4)
    assert metrics.socket_sent_bytes is None
    assert round_line(metrics) == "round 4 over: no receipt, 0 steps, payload 5 B up, 6 B down"
