"""The two-point estimate and the local steps are what FedKSeed's equations give by hand."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from overlays import POOL_KEY, SEEDS, overlay_of
from tiny_models import tiny_batch, tiny_model

from edge_client.data.batches import Batch
from edge_client.estimator import local_steps, one_sided, two_point
from edge_client.loss import labelled_loss
from edge_client.overlay import Overlay
from shared import directions
from shared.errors import UserError
from shared.messages import DirectionKind, Everyone, NormalisedStep, PlainStep, Plan, StepRule
from shared.seeds import draw
from shared.steprule import deltas

EPS = 1e-3


def plan(step: StepRule, *, common_seeds: bool = False, levels: bytes | None = None, one_sided: int = 0) -> Plan:
    return Plan(
        round=0, phase="open", nonce=bytes(range(16)), local_steps=6, one_sided=one_sided, batch_size=3, eps=EPS,
        step=step, participation=Everyone(), common_seeds=common_seeds, levels=levels, evaluate=False,
        published_at_ms=0, deadline_s=60.0, reason="", change=None,
    )  # fmt: skip


PLAIN = PlainStep(lr=1e-3)
NORMALISED = NormalisedStep(step_rms=1e-3, clip=3.0, decay=0.9, prior_mean_square=0.0, prior_count=0)


def loss_of(overlay: Overlay) -> float:
    return float(labelled_loss(overlay.model, tiny_batch()))


def steps_of(overlay: Overlay, of: Plan, device: str = "device-1", scalar_format: str = "f32") -> list:
    return list(
        local_steps(overlay, of, device, lambda step: tiny_batch(), lambda batch: loss_of(overlay), scalar_format)
    )


@torch.no_grad()
def loss_by_definition(kind: DirectionKind, a: np.ndarray, probe: tuple[int, np.float32]) -> float:
    """The loss of a plain model whose weights the numpy definition made."""
    model = tiny_model("llama")
    for number, (_, weight) in enumerate(sorted(model.named_parameters())):
        flat = weight.view(-1).numpy()
        displaced = directions.displacement(kind, POOL_KEY, number, 0, flat.size, a, probe)
        flat[:] = directions.add_displacement(flat, "fp32", displaced)
    return float(labelled_loss(model, tiny_batch()))


@pytest.mark.parametrize("kind", get_args(DirectionKind))
def test_the_scalar_is_the_difference_of_two_losses_over_two_eps(kind: DirectionKind) -> None:
    overlay = overlay_of(tiny_model("llama"), kind)
    plus = loss_by_definition(kind, overlay.coefficients, (77, np.float32(EPS)))
    minus = loss_by_definition(kind, overlay.coefficients, (77, np.float32(-EPS)))
    probe = two_point(lambda: loss_of(overlay), overlay, 77, EPS, "f32")
    assert (probe.loss_plus, probe.loss_minus) == (plus, minus)
    assert probe.scalar == np.float32((plus - minus) / (2 * EPS)) and probe.scalar.dtype == np.float32
    assert probe.loss == (plus + minus) / 2


def test_the_scalar_is_the_gradient_along_the_direction() -> None:
    model = tiny_model("llama")
    overlay = overlay_of(model, size=0.0)
    gradient_free = two_point(lambda: loss_of(overlay), overlay, 5, EPS, "f32").scalar
    overlay.detach()
    model.requires_grad_(True)
    labelled_loss(model, tiny_batch()).backward()
    exact = 0.0
    for number, (_, weight) in enumerate(sorted(model.named_parameters())):
        z = directions.direction("hadamard", POOL_KEY, number, 0, weight.numel(), 5, SEEDS)
        exact += float(weight.grad.view(-1).double() @ torch.from_numpy(z).double())
    assert gradient_free == pytest.approx(exact, rel=5e-3)


def test_a_scalar_is_what_the_wire_makes_of_it() -> None:
    overlay = overlay_of(tiny_model("llama"))
    fine = two_point(lambda: loss_of(overlay), overlay, 5, EPS, "f32").scalar
    coarse = two_point(lambda: loss_of(overlay), overlay, 5, EPS, "f16").scalar
    assert coarse == np.float32(np.float16(fine)) != fine


@pytest.mark.parametrize("kind", get_args(DirectionKind))
def test_a_one_sided_scalar_compares_its_loss_with_the_mean_of_the_others(kind: DirectionKind) -> None:
    overlay, ks = overlay_of(tiny_model("llama"), kind), (77, 3, 200)
    losses = [loss_by_definition(kind, overlay.coefficients, (k, np.float32(EPS))) for k in ks]
    found = one_sided(lambda: loss_of(overlay), overlay, ks, EPS, "f32", (2**31,) * 3)
    assert [one.loss for one in found] == losses
    for number, one in enumerate(found):
        others = losses[:number] + losses[number + 1 :]
        assert one.scalar == pytest.approx((losses[number] - sum(others) / 2) / EPS, rel=1e-5)


def test_one_sided_scalars_are_gradients_and_a_share_of_the_curvature() -> None:
    """Around the two-sided ones, as far off as their curvatures differ; nearer with a smaller eps."""
    overlay, ks = overlay_of(tiny_model("llama"), size=0.0), tuple(range(40, 104))

    def scalars(eps: float) -> np.ndarray:
        found = one_sided(lambda: loss_of(overlay), overlay, ks, eps, "f32", (2**31,) * len(ks))
        return np.array([one.scalar for one in found])

    exact = np.array([two_point(lambda: loss_of(overlay), overlay, k, EPS, "f32").scalar for k in ks])
    exact -= exact.mean()  # what all directions have in common cannot be told from the loss
    near, far = (np.sqrt(np.mean((scalars(eps) - exact) ** 2)) for eps in (EPS / 2, 4 * EPS))
    assert near < 0.2 * exact.std() and near < 0.3 * far


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing(broken: float) -> None:
    overlay = overlay_of(tiny_model("llama"))
    before = overlay.model_digest()
    losses = iter([1.0, broken])
    with pytest.raises(UserError, match=rf"the loss is {broken} at -0.001 along direction 5"):
        two_point(lambda: next(losses), overlay, 5, EPS, "f32")
    assert overlay.model_digest() == before


@pytest.mark.parametrize("rule", [PLAIN, NORMALISED], ids=["plain", "normalised"])
@pytest.mark.parametrize("scalar_format", ["f32", "f16", "f8"])
def test_coefficients_after_local_steps_are_a_replay_of_the_scalars(rule: StepRule, scalar_format: str) -> None:
    overlay = overlay_of(tiny_model("llama"))
    a = overlay.coefficients
    done = steps_of(overlay, plan(rule), scalar_format=scalar_format)
    seeds = draw(plan(rule).nonce, "device-1", 6, SEEDS, None)
    assert [(step.step, step.k) for step in done] == list(enumerate(seeds.tolist()))
    for k, delta in zip(seeds, deltas(rule, np.array([step.scalar for step in done])), strict=True):
        a[k] = a[k] + delta
    assert np.array_equal(a, overlay.coefficients)


def test_common_seeds_are_the_same_on_every_device_and_others_are_not() -> None:
    ks = {
        (common, device): tuple(
            step.k for step in steps_of(overlay_of(tiny_model("llama")), plan(PLAIN, common_seeds=common), device)
        )
        for common in (True, False)
        for device in ("device-1", "device-2")
    }
    assert ks[True, "device-1"] == ks[True, "device-2"]
    assert ks[False, "device-1"] != ks[False, "device-2"]


def test_seeds_are_drawn_by_significance_where_the_plan_says_so() -> None:
    levels = bytes([255] * 4 + [0] * (SEEDS - 4))
    done = steps_of(overlay_of(tiny_model("llama")), plan(PLAIN, levels=levels))
    assert [step.k for step in done] == draw(plan(PLAIN).nonce, "device-1", 6, SEEDS, levels).tolist()


def test_local_steps_can_be_left_between_any_two() -> None:
    whole, left = overlay_of(tiny_model("llama")), overlay_of(tiny_model("llama"))
    wanted = steps_of(whole, plan(NORMALISED))
    steps = local_steps(
        left, plan(NORMALISED), "device-1", lambda step: tiny_batch(), lambda batch: loss_of(left), "f32"
    )
    assert [next(steps) for _ in range(2)] == wanted[:2]
    steps.close()
    a = overlay_of(tiny_model("llama")).coefficients
    for step, delta in zip(wanted[:2], deltas(NORMALISED, np.array([step.scalar for step in wanted[:2]])), strict=True):
        a[step.k] += delta
    assert np.array_equal(left.coefficients, a)
    left.set_coefficients(overlay_of(tiny_model("llama")).coefficients)
    assert steps_of(left, plan(NORMALISED)) == wanted


def test_each_step_has_its_own_batch() -> None:
    overlay, asked = overlay_of(tiny_model("llama")), []

    def batch(step: int) -> Batch:
        asked.append(step)
        return tiny_batch()

    for _ in local_steps(overlay, plan(PLAIN), "device-1", batch, lambda of: loss_of(overlay), "f32"):
        pass
    assert asked == [0, 1, 2, 3, 4, 5]


def test_a_group_of_one_sided_steps_shares_a_batch_and_a_place() -> None:
    overlay, asked = overlay_of(tiny_model("llama")), []
    where = plan(NORMALISED, one_sided=3)

    def batch(number: int) -> Batch:
        asked.append((number, overlay.coefficients))
        return tiny_batch()

    done = list(local_steps(overlay, where, "device-1", batch, lambda of: loss_of(overlay), "f32"))
    a, seeds = asked[0][1].copy(), [step.k for step in done]
    assert [number for number, _ in asked] == [0, 1] and [step.step for step in done] == list(range(6))
    for k, delta in zip(seeds, deltas(NORMALISED, np.array([step.scalar for step in done])), strict=True):
        if k == seeds[3]:
            assert np.array_equal(asked[1][1], a)
        a[k] += delta
    assert np.array_equal(overlay.coefficients, a)
    overlay.set_coefficients(asked[0][1])
    losses = [one.loss for one in one_sided(lambda: loss_of(overlay), overlay, seeds[:3], EPS, "f32", (2**31,) * 3)]
    assert [step.loss for step in done[:3]] == losses


@pytest.mark.parametrize("left_after", [1, 3, 4])
def test_a_group_that_was_left_halfway_goes_on_with_the_same_bits(left_after: int) -> None:
    whole, resumed = overlay_of(tiny_model("llama")), overlay_of(tiny_model("llama"))
    where = plan(NORMALISED, one_sided=3)
    wanted = steps_of(whole, where, scalar_format="f16")
    done = [float(step.scalar) for step in wanted[:left_after]]
    rest = local_steps(
        resumed, where, "device-1", lambda step: tiny_batch(), lambda batch: loss_of(resumed), "f16", done=done
    )
    assert list(rest) == wanted[left_after:]
    assert np.array_equal(resumed.coefficients, whole.coefficients)


@pytest.mark.parametrize("one_sided", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_local_steps_lower_the_loss(dtype: torch.dtype, one_sided: int) -> None:
    overlay = overlay_of(tiny_model("llama", dtype), size=0.0)
    before = loss_of(overlay)
    rule = NormalisedStep(step_rms=5e-3, clip=3.0, decay=0.9, prior_mean_square=0.0, prior_count=0)
    for number in range(10):
        step = plan(rule, one_sided=one_sided)
        steps_of(overlay, Plan(**{field: getattr(step, field) for field in step.__struct_fields__} | {
            "nonce": bytes([number] * 16)}))  # fmt: skip
    assert loss_of(overlay) < before - 0.4
