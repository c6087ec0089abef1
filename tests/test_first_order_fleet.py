"""A first-order agent and a forward-only one, real both, in rounds of the real aggregator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aggregator.config import RunConfig
from edge_client.first_order import GradientSettings
from edge_client.first_order_kept import KeptGradient
from edge_client.state_files import Owner
from tests.small_fleet import SmallFleet
from tests.test_fleet import Device, base_of, check_alike


def test_devices_of_both_kinds_are_counted_and_end_with_the_same_weights(tmp_path: Path) -> None:
    config = RunConfig(
        rounds=3, local_steps=5, batch_size=2, quorum=2, step_rms=3e-3, seeds=256, first_order="accept",
        scalar_format="f16", change_format="f16",
    )  # fmt: skip
    fleet = SmallFleet(tmp_path, config, base=base_of("llama-tied", "bf16"))
    devices = [Device(fleet, tmp_path, name, "numba") for name in ("ann", "bob")]
    said: list[str] = []
    kept = KeptGradient(tmp_path, Owner("loopback", "demo", "bob"), "kseed test", said.append, lambda: 0.0)
    devices[1].trainer._gradient = GradientSettings("gradient", kept)
    fleet.run_to_the_end()
    assert [report.counted for report, _ in fleet.store.reports("demo")] == [2, 2, 2]
    check_alike(devices)
    (file,) = tmp_path.glob("*/gradient")
    assert file.stat().st_size > 5 * 8 * 256 and not said
    assert np.any(devices[0].trainer.overlay.coefficients)


def test_an_agent_hears_that_its_update_was_refused(tmp_path: Path) -> None:
    shape: dict[str, object] = {"rounds": 3, "local_steps": 4, "quorum": 1, "seeds": 256, "deadline_s": 1e6}
    fleet = SmallFleet(tmp_path, RunConfig(**shape, max_samples=5))  # type: ignore[arg-type]
    refused: list[int] = []
    fleet.join("ann", refused=refused.append)  # of 8 samples
    fleet.run_until(lambda: bool(refused))
    assert refused == [0]
