"""Signed bucket sums: every kernel gives those of the numpy definition, which are what the directions' rows give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_client.kernels import bucket_sums
from edge_client.kernels.bucket_sums import reference, torch_sums
from edge_client.kernels.bucket_sums_numba import numba_sums
from shared.directions import direction, hadamard_row

KEY = 0x0123_4567_89AB_CDEF
TENSOR = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole blocks, rows that begin anywhere, and segments shorter than a group of 128.
SEGMENTS = [(1, 5000, [0]), (1, 777, [4321]), (7, 60, [0, 60, 6000, 60, 129, 3, 999]), (3, 700, [1, 4999, 130])]


def gradient(rows: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(0)).to(dtype)


def summed(kernel: bucket_sums.BucketSums, grads: torch.Tensor, starts: list[int], seeds: int) -> np.ndarray:
    total = torch.zeros(seeds, dtype=torch.float64)
    kernel(grads, torch.tensor(starts), total, tensor=TENSOR, pool_key=KEY)
    return total.numpy()


@pytest.mark.parametrize("seeds", [256, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "length", "starts"), SEGMENTS)
def test_numba_gives_the_definitions_bits(
    rows: int, length: int, starts: list[int], dtype: torch.dtype, seeds: int
) -> None:
    grads = gradient(rows, length, dtype)
    wanted = reference(grads.float().numpy(), np.array(starts), seeds, tensor=TENSOR, pool_key=KEY)
    assert np.array_equal(summed(numba_sums, grads, starts, seeds), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "length", "starts"), SEGMENTS)
def test_torch_gives_the_definitions_numbers(rows: int, length: int, starts: list[int], dtype: torch.dtype) -> None:
    grads = gradient(rows, length, dtype)
    wanted = reference(grads.float().numpy(), np.array(starts), 256, tensor=TENSOR, pool_key=KEY)
    assert np.allclose(summed(torch_sums, grads, starts, 256), wanted, rtol=1e-5, atol=1e-5)


def test_sums_are_the_products_with_the_directions() -> None:
    seeds, elements = 256, 1000
    grads = gradient(1, elements)
    sums = summed(numba_sums, grads, [0], seeds)
    for k in (0, 1, 77, 255):
        z = direction("hadamard", KEY, TENSOR, 0, elements, k, seeds)
        assert sums @ hadamard_row(k, seeds) == pytest.approx(float(grads.double().numpy()[0] @ z), abs=1e-4)


def test_parts_are_cut_in_the_same_places_on_any_number_of_threads() -> None:
    grads = gradient(2, bucket_sums.PART)  # two parts
    starts = [5, 100]
    wanted = reference(grads.numpy(), np.array(starts), 256, tensor=TENSOR, pool_key=KEY)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert np.array_equal(summed(numba_sums, grads, starts, 256), wanted)
    finally:
        torch.set_num_threads(before)
