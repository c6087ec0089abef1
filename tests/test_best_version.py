"""The version with the lowest held-out loss: named by `show`, written by `coefficients --best`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aggregator import cli
from aggregator.events import Begin
from aggregator.state import coefficients_of
from aggregator.store import Store
from shared.delta import read_delta
from shared.wire import scalars_to_bytes
from tests.runs import BASE, START_MS, arrival, played, update_of

SCALARS = scalars_to_bytes([1, 2, 3], "f16")


def run_with(tmp_path: Path, call: Any, losses: Sequence[float | None]) -> Path:
    """A store with a run of which each version but the last had such a held-out loss."""
    base, path = tmp_path / "base.json", tmp_path / "kseed.sqlite3"
    BASE.write(base)
    code, _, err = call(
        cli, "create", "night", "--base", base, "--seeds", 256, "--local-steps", 3, "--quorum", 1, "--store", path
    )
    assert (code, err) == (0, "")
    with Store.open(path) as store:
        events = [
            arrival("a", update_of(number, scalars=SCALARS, held_out_loss=loss)) for number, loss in enumerate(losses)
        ]
        played(store, store.state("night"), Begin(START_MS), *events)
    return path


@pytest.mark.parametrize(("losses", "wanted"), [((3.0, 1.5, 2.5), 1), ((None, 2.0, 2.0), 1), ((0.5, None, None), 0)])
def test_the_best_version_is_shown_and_written(
    losses: Sequence[float | None], wanted: int, tmp_path: Path, call: Any
) -> None:
    path = run_with(tmp_path, call, losses)
    shown = call(cli, "show", "night", "--store", path)[1]
    assert f"lowest {losses[wanted]:.4f} (version {wanted})" in shown
    facts = json.loads(call(cli, "show", "night", "--json", "--store", path)[1])
    assert (facts["best_version"], facts["best_held_out_loss"]) == (wanted, losses[wanted])
    code, out, _ = call(cli, "coefficients", "night", "--best", "-o", tmp_path / "delta", "--store", path)
    assert (code, f"run night, version {wanted}" in out) == (0, True)
    with Store.open(path) as store:
        versions = [coefficients_of(store.coefficients("night", number)).tolist() for number in range(4)]
    assert len({tuple(version) for version in versions}) == 4
    delta = read_delta(tmp_path / "delta")
    assert (delta.version, delta.coefficients.tolist()) == (wanted, versions[wanted])


def test_without_a_held_out_loss_no_version_is_the_best(tmp_path: Path, call: Any) -> None:
    path = run_with(tmp_path, call, (None, None))
    assert "lowest" not in call(cli, "show", "night", "--store", path)[1]
    code, out, err = call(cli, "coefficients", "night", "--best", "-o", tmp_path / "delta", "--store", path)
    assert (code, out) == (2, "")
    assert "run 'night' has no held-out loss" in err
    assert "evaluate_every" in err
    assert not (tmp_path / "delta").exists()


def test_two_versions_are_not_asked_for_at_once(tmp_path: Path, call: Any) -> None:
    path = run_with(tmp_path, call, (2.0,))
    code, _, err = call(
        cli, "coefficients", "night", "--best", "--version", 0, "-o", tmp_path / "delta", "--store", path
    )
    assert code == 2
    assert err == "error: --version 0 and --best name two versions; give one of them.\n"
