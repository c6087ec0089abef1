"""The benchmark of one device's kernel."""

from __future__ import annotations

import pytest
import torch

from shared.errors import UserError
from tools.bench_kernel import bench_kernel


def test_every_kind_of_base_is_compared_with_a_copy() -> None:
    result = bench_kernel("cpu", weights=1 << 16, runs=3)
    assert [row.what for row in result.rows] == [
        f"rebuild from {kind} / copy of bf16, K {seeds}" for kind in ("bf16", "nf4", "int8") for seeds in (4096, 65536)
    ]
    assert all(len(row.values) == 3 and min(row.values) > 0 for row in result.rows)
    assert "kernel numba (the fastest on a cpu)" in result.machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="the device 'cuda' cannot be used"):
        bench_kernel("cuda")
