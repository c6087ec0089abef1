"""Scalars at eps and 2 eps: they agree on a slope, and a probe that is too long or drowns in rounding is told."""

from __future__ import annotations

import pytest
import torch
from overlays import overlay_of
from tiny_models import tiny_batch, tiny_model

from edge_client.eps_check import EpsCheck, eps_check
from edge_client.loss import labelled_loss


def check(eps: float, dtype: torch.dtype = torch.float32) -> EpsCheck:
    overlay = overlay_of(tiny_model("llama", dtype))
    found = eps_check(lambda: labelled_loss(overlay.model, tiny_batch()), overlay, (3, 77), eps)
    assert not overlay._is_probing
    return found


def test_a_good_eps_agrees_and_says_so() -> None:
    found = check(1e-3)
    assert found.agrees and found.slope == pytest.approx(1.0, abs=0.05)
    assert str(found).startswith("eps 0.001: scalars at 2 eps are 1.0")


@pytest.mark.parametrize(("eps", "dtype"), [(1e-7, torch.bfloat16), (0.3, torch.float32)])
def test_a_probe_that_drowns_in_rounding_or_leaves_the_slope_is_told(eps: float, dtype: torch.dtype) -> None:
    found = check(eps, dtype)
    assert not found.agrees
    assert str(found).startswith(f"warning: eps {eps:g}: scalars at 2 eps are 0.") and "another eps" in str(found)


def test_the_slope_weighs_directions_by_their_scalars() -> None:
    assert EpsCheck(1e-3, (2.0, 0.0), (1.0, 9.0)).slope == 0.5
    assert EpsCheck(1e-3, (0.0, 0.0), (1.0, 9.0)).slope == 0.0
