"""A soak's summary for people."""

from __future__ import annotations

from typing import Any

from tools.soak_report import SoakReport, soak_text


def a_report(**changes: Any) -> SoakReport:
    network = dict.fromkeys(
        ("connections", "old_connections", "refused", "cuts", "torn", "doubled", "up_bytes", "down_bytes"), 7
    )
    return SoakReport(
        **{
            "seed": 5, "minutes": 1.0, "seconds": 80.0, "kills": {"aggregator": 2, "broker": 1, "agent": 3},
            "network": network, "messages": {"update": 4}, "rounds": 2, "accepted": 4, "counted": 4, "late": 0,
            "receipts": {"ACCEPTED": 4, "STALE_ROUND": 1}, "version": 2, "coefficients_sha256": "ab" * 32,
            "model_digest": "cd" * 16, "violations": [], **changes,
        }
    )  # fmt: skip


def test_the_summary_names_kills_receipts_and_digests() -> None:
    text = soak_text(a_report())
    assert "kills     6: aggregator 2, broker 1, agent 3\n" in text
    assert "receipts  accepted 4, stale_round 1\n" in text
    assert text.endswith(f"digest    equal on all agents: {'cd' * 16}\nPASSED")


def test_a_failure_names_the_seed_and_the_first_violation() -> None:
    report = a_report(violations=["the first\nand its log", "the second"])
    assert not report.is_well
    assert soak_text(report).endswith("FAILED with seed 5: the first")
