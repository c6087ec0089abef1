"""The learning benchmark: fleets of simulated devices by the real round logic, and what is made of their curves."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_models import save_tiny

from aggregator.config import RunConfig
from edge_client.data.batches import Tokens
from tools import bench_learning
from tools.bench_learning import FULL, QUICK, RECIPE, STEPS, Curve, arms, recipe_in, rows_of
from tools.bench_learning_data import LearningBench
from tools.bench_learning_fleet import dealt, learn
from tools.bench_learning_plot import plot_curves

ONE = RunConfig(local_steps=2, batch_size=2, quorum=1, eps=1e-2, step_rms=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_a_run_spends_the_forwards_that_it_counts(folder: Path) -> None:
    on = LearningBench(str(folder), None, "all", seed=1, judged=4)
    points = list(learn(on.bench, ONE, dealt(on.rows, 4, 1, None), key=1, forwards=20, every=6))
    # a round: 2 steps of 2 passes, and a held-out evaluation of 4 examples by batches of 2
    assert [point.forwards for point in points] == [0.0, 6.0, 12.0, 18.0, 24.0]
    assert [point.version for point in points] == [0, 1, 2, 3, 4]
    assert points[0].loss != points[-1].loss and all(math.isfinite(point.loss) for point in points)


def test_the_same_seed_learns_the_same(folder: Path) -> None:
    curves = []
    for _ in range(2):
        on = LearningBench(str(folder), None, "upper", seed=3, judged=4)
        curves.append(on.curve(ONE, 2, held_out=4, rounds=2, forwards=0, every=0))
    assert curves[0] == curves[1] and len(curves[0]) == 3


def test_a_sum_goes_as_many_times_as_far_as_a_mean_as_there_are_devices(folder: Path) -> None:
    moved = []
    for scale in ("mean", "sum"):
        on = LearningBench(str(folder), None, "all", seed=1, judged=4)
        config = msgspec.structs.replace(ONE, quorum=2, min_updates=2, server_scale=scale, weighting="equal")
        list(learn(on.bench, config, dealt(on.rows, 4, 2, None), key=1, forwards=1, every=99))
        moved.append(on.bench.overlay.coefficients)
    assert np.count_nonzero(moved[0]) == 4  # two steps of two devices
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-6)


def test_skewed_devices_have_one_class_each_and_hold_out_of_it() -> None:
    rows = [Tokens((1,), (2,), number % 2, bytes([number]), f"row {number}") for number in range(20)]
    for number, device in enumerate(dealt(rows, 4, 2, lambda row: row.label or 0)):
        assert {row.label for row in (*device.train, *device.held_out)} == {number}
        assert len(device.held_out) == 4 and not set(device.train) & set(device.held_out)
    even, odd = dealt(rows, 4, 2, None)
    assert not set(even.train) & set(odd.train)


def test_forwards_to_a_loss_are_read_between_the_points() -> None:
    curve = Curve("x", 1, ((0.0, 8.0, None), (100.0, 4.0, None), (200.0, 5.0, None)))
    assert curve.forwards_to(6.0) == 50.0
    assert curve.forwards_to(4.0) == 100.0
    assert math.isinf(curve.forwards_to(3.0))


def test_the_recipe_is_compared_with_the_best_rate_seed_by_seed() -> None:
    def two(arm: str, *ends: float) -> list[Curve]:
        return [Curve(arm, seed, ((0.0, 8.0, 0.5), (100.0, end, 0.5))) for seed, end in enumerate(ends)]

    curves = [*two("plain, lr 1", 6.0, 4.0), *two("plain, lr 2", 7.0, 7.0), *two(RECIPE, 4.0, 0.0)]
    *rest, last = rows_of(curves)
    assert last.baseline == "plain, lr 1" and last.values == (0.5, 0.5)
    assert rest[0].what == "plain, lr 1: loss at 100 forwards" and rest[0].baseline == "untuned: 8.000"
    *_, shorter = rows_of([*curves, *two(recipe_in("f8"), 4.5, 0.25)])
    assert shorter.what == "recipe in f8: loss at the end above that in f16" and shorter.values == (0.5, 0.25)


def test_a_picture_of_curves_and_fleets_is_written(tmp_path: Path) -> None:
    points = ((0.0, 8.0, None), (10.0, 6.0, None))
    plot_curves(tmp_path / "curves.png", [Curve(RECIPE, 1, points), Curve("4 devices, sum", 1, points)])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot_curves(tmp_path / "no-fleets.png", [Curve(RECIPE, 1, points)])
    assert (tmp_path / "no-fleets.png").exists()


def test_the_quick_set_has_one_plain_rate_and_the_recipe() -> None:
    assert [arm.name for arm in arms(QUICK)] == ["plain, lr 3e-05", RECIPE]
    assert bench_learning.fleets(QUICK) == []


def test_text_without_labels_has_a_recipe_of_its_own_and_no_fleets() -> None:
    *plain, recipe = arms(FULL, has_labels=False)
    assert [arm.name for arm in plain] == ["plain, lr 1e-05", "plain, lr 3e-05", "plain, lr 0.0001"]
    assert (recipe.name, recipe.scope, recipe.config) == (RECIPE, "all", RunConfig(local_steps=STEPS))


def test_the_full_set_has_the_recipe_with_all_numbers_in_each_format() -> None:
    recipes = {arm.name: arm.config for arm in arms(FULL) if arm.name.startswith(RECIPE)}
    assert {name: (config.scalar_format, config.change_format) for name, config in recipes.items()} == {
        "recipe": ("f16", "f16"),
        "recipe in f32": ("f32", "f32"),
        "recipe in f8": ("f8", "f8"),
    }
