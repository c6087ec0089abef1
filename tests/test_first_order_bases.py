"""Exact gradients over bases that do not lie in memory as they are: those of the twin whose base does, to the bit."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from overlays import POOL_KEY, SEEDS, random_coefficients
from tiny_models import tiny_batch, tiny_model

from edge_client import first_order_gradient
from edge_client.bases import PackedBase, PlainBase
from edge_client.first_order_gradient import OffsetGradient
from edge_client.model import LoadedModel, load_model
from edge_client.overlay import Overlay
from edge_client.scopes import Scope, names_in
from edge_client.streamed import StreamedBase, load_streamed
from edge_client.tuned import select
from tests.test_packed import PACKINGS, quantised
from tests.test_streamed import saved


@pytest.fixture(autouse=True)
def slices_of_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_order_gradient, "SLICE", 100)


def measured(loaded: LoadedModel, base: type, scope: Scope = "all") -> tuple[float, np.ndarray]:
    """Loss and gradient; at least one tuned tensor must be kept as `base`."""
    only: Collection[str] = names_in(scope, [tensor.name for tensor in select(loaded.model).manifest.tensors])
    overlay = Overlay(loaded.model, pool_key=POOL_KEY, seeds=SEEDS, directions="hadamard", only=only)
    overlay.set_coefficients(random_coefficients())
    assert any(type(tuned.base) is base for tuned in overlay._tensors)
    return OffsetGradient(overlay).measure(loaded.model, tiny_batch())


def assert_equal(one: tuple[float, np.ndarray], other: tuple[float, np.ndarray]) -> None:
    assert one[0] == other[0]
    assert np.linalg.norm(one[1]) > 0
    assert np.array_equal(one[1], other[1])


@pytest.mark.parametrize("packing", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_over_a_packed_base_the_gradient_is_that_over_the_unpacked(tmp_path: Path, packing: str, dtype: Any) -> None:
    folder = str(quantised(tmp_path, **PACKINGS[packing]))
    unpacked = measured(load_model(folder, dtype, load_in="unpacked"), PlainBase)
    assert_equal(measured(load_model(folder, dtype), PackedBase), unpacked)


@pytest.mark.parametrize("scope", ["all", "upper", "mlp", "norms"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_over_a_streamed_base_the_gradient_is_that_over_the_loaded(tmp_path: Path, name: str, scope: Scope) -> None:
    source = saved(tmp_path, tiny_model(name, torch.bfloat16))
    loaded = measured(load_model(source, "bf16"), PlainBase, scope)
    assert_equal(measured(load_streamed(source, "bf16"), StreamedBase, scope), loaded)
