"""A first-order round: how many steps, how long, the same after a pause, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from overlays import SEEDS, overlay_of
from tiny_models import tiny_batch, tiny_model

from edge_client.first_order_gradient import OffsetGradient
from edge_client.first_order_steps import Progress, advanced, change_of, gradient_steps, step_rms_of, steps_of
from edge_client.overlay import Overlay
from shared.directions import offsets
from shared.errors import UserError
from shared.messages import Everyone, NormalisedStep, PlainStep, Plan

RULE = NormalisedStep(step_rms=1e-3, clip=3.0, decay=0.99, prior_mean_square=0.0, prior_count=0)


def plan(local_steps: int = 25, step: NormalisedStep | PlainStep = RULE) -> Plan:
    return Plan(
        round=0, phase="open", nonce=bytes(range(16)), local_steps=local_steps, one_sided=0, batch_size=3,
        eps=1e-3, step=step, participation=Everyone(), common_seeds=False, levels=None, evaluate=False,
        published_at_ms=0, deadline_s=60.0, reason="", change=None,
    )  # fmt: skip


def fresh() -> tuple[Overlay, Callable[[int], tuple[float, np.ndarray]]]:
    overlay = overlay_of(tiny_model("llama-tied"))
    gradient = OffsetGradient(overlay)
    return overlay, lambda step: gradient.measure(overlay.model, tiny_batch())


def test_as_many_steps_as_cost_the_plans_forward_passes_and_at_least_one() -> None:
    assert [steps_of(plan(steps)) for steps in (1, 5, 25, 200)] == [1, 2, 10, 80]


def test_a_round_goes_no_farther_than_that_of_random_steps() -> None:
    for steps in (1, 25, 200):
        assert step_rms_of(plan(steps)) * steps_of(plan(steps)) == pytest.approx(1e-3 * math.sqrt(steps))


def test_the_papers_plain_rule_is_refused() -> None:
    with pytest.raises(UserError, match="plain, whose lr means nothing to exact gradients"):
        step_rms_of(plan(step=PlainStep(3e-7)))


@pytest.mark.parametrize("gradient", [np.zeros(SEEDS), np.full(SEEDS, np.nan)])
def test_a_gradient_without_a_direction_is_refused(gradient: np.ndarray) -> None:
    with pytest.raises(UserError, match="must be finite and above 0"):
        advanced(Progress.of(SEEDS), 1.0, gradient, 1e-3)


def test_every_step_moves_the_weights_by_the_same_rms_whatever_the_gradients_size() -> None:
    rng = np.random.default_rng(0)
    progress = Progress.of(SEEDS)
    for size in (1e-6, 1.0, 1e6):
        after = advanced(progress, 1.0, size * rng.standard_normal(SEEDS), 2e-3)
        assert np.sqrt(np.mean((after.moved - progress.moved) ** 2)) == pytest.approx(2e-3)
        progress = after
    assert (progress.steps, progress.seen, progress.loss_sum) == (3, 3, 3.0)
    again = progress.next_round()
    assert not again.moved.any() and (again.steps, again.seen, again.loss_sum) == (0, 3, 0.0)


def test_the_change_of_coefficients_moves_the_offsets_so() -> None:
    moved = 1e-3 * np.random.default_rng(0).standard_normal(SEEDS)
    assert np.allclose(offsets(change_of(moved)), moved, rtol=1e-4, atol=1e-9)


def test_steps_lower_the_loss_and_the_overlay_is_at_their_beginning() -> None:
    overlay, measure = fresh()
    before = overlay.coefficients
    steps = list(gradient_steps(overlay, plan(), Progress.of(SEEDS), measure))
    losses = [loss for loss, _ in steps]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.05
    overlay.set_coefficients(before + change_of(steps[-1][1].moved))
    assert measure(0)[0] < losses[-1]


def test_steps_that_go_on_after_a_pause_give_the_same_bits() -> None:
    def run(stop_at: int) -> np.ndarray:
        progress = Progress.of(SEEDS)
        for end in (stop_at, 10):  # a new overlay and a new optimiser each time, as after a kill
            overlay, measure = fresh()
            steps = gradient_steps(overlay, plan(), progress, measure)
            for _ in range(end - progress.steps):
                _, progress = next(steps)
        return progress.moved

    assert np.array_equal(run(3), run(10))
