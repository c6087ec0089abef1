"""Packed bases: every kernel gives the bits of the numpy definition, whatever the packing, segments and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge_client.kernels import PADDING, Kernel, Packed
from shared import directions, packed
from shared.messages import WeightDtype
from shared.packed import PackedArray
from tests.test_kernels import DTYPES, KERNELS, POOL_KEY, SEGMENTS, TENSOR, bits, coefficients

ELEMENTS = 70_001  # odd: the last byte of a 4-bit tensor holds one weight
PACKINGS = {
    "4 bit, 64": (4, 64),
    "4 bit, 4096": (4, 4096),
    "8 bit, rows of 576": (8, 576),
    "8 bit, rows of 701": (8, 701),
}


def random_packed(width: int, block: int, elements: int = ELEMENTS) -> PackedArray:
    """Codes and scales of all kinds: scales that are 0, negative, tiny, huge, infinite and NaN among them."""
    rng = np.random.default_rng(width + block)
    scales = (rng.standard_normal(-(-elements // block)) * 10.0 ** rng.uniform(-8, 2, -(-elements // block))).astype(
        np.float32
    )
    scales[:6] = 0, 1e-42, 3e38, np.inf, np.nan, -1
    if width == 8:
        return PackedArray(rng.integers(-128, 128, elements).astype(np.int8), scales, block, None)
    table = np.sort(rng.standard_normal(16)).astype(np.float32)
    table[7:9] = -0.0, 0.0
    return PackedArray(rng.integers(0, 256, (elements + 1) // 2).astype(np.uint8), scales, block, table)


def as_tensors(array: PackedArray) -> Packed:
    table = None if array.table is None else torch.from_numpy(array.table)
    return Packed(torch.from_numpy(array.codes), torch.from_numpy(array.scales), array.block, table)


def expected(
    base: PackedArray, dtype: WeightDtype, starts: Sequence[int], length: int, a: NDArray[np.float32] | None
) -> NDArray[np.generic]:
    rows = []
    for start in starts:
        row = packed.unpack(base, dtype, start, start + length)
        if a is not None:
            displaced = directions.displacement("hadamard", POOL_KEY, TENSOR, start, start + length, a)
            row = directions.add_displacement(row, dtype, displaced)
        rows.append(row)
    stacked = np.stack(rows)
    return stacked.view(np.int32 if stacked.itemsize == 4 else np.int16)


def added(
    kernel: Kernel, base: Packed, dtype: torch.dtype, starts: Sequence[int], length: int, a: NDArray[np.float32]
) -> torch.Tensor:
    out = torch.empty(len(starts), length, dtype=dtype)
    y = directions.offsets(a)
    padded = torch.from_numpy(np.concatenate((y, y[:PADDING])))
    kernel.add_hadamard(base, torch.tensor(starts), out, tensor=TENSOR, padded=padded, pool_key=POOL_KEY)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_packed_base_is_added_to_as_defined_bit_for_bit(name: str, packing: str, dtype: WeightDtype) -> None:
    a = coefficients(4096)
    base = random_packed(*PACKINGS[packing])
    for what, (starts, length) in SEGMENTS.items():
        found = added(KERNELS[name], as_tensors(base), DTYPES[dtype], starts, length, a)
        assert np.array_equal(bits(found), expected(base, dtype, starts, length, a)), what


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_packed_base_is_unpacked_as_defined_signs_of_zero_included(
    name: str, packing: str, dtype: WeightDtype
) -> None:
    base = random_packed(*PACKINGS[packing])
    for what, (starts, length) in SEGMENTS.items():
        found = torch.empty(len(starts), length, dtype=DTYPES[dtype])
        KERNELS[name].unpack(as_tensors(base), torch.tensor(starts), found)
        assert np.array_equal(bits(found), expected(base, dtype, starts, length, None)), what


def test_a_packed_base_becomes_the_weights_of_its_unpacked_twin() -> None:
    """What lets a device without packed weights take part in the same run."""
    a = coefficients(4096)
    base = random_packed(4, 64)
    whole = torch.from_numpy(packed.unpack(base, "bf16", 0, ELEMENTS).view(np.int16)).view(torch.bfloat16)
    y = directions.offsets(a)
    padded = torch.from_numpy(np.concatenate((y, y[:PADDING])))
    for name, kernel in KERNELS.items():
        plain = torch.empty(1, ELEMENTS, dtype=torch.bfloat16)
        kernel.add_hadamard(whole, torch.zeros(1, dtype=torch.int64), plain, tensor=TENSOR, padded=padded,
                            pool_key=POOL_KEY)  # fmt: skip
        assert np.array_equal(bits(plain), bits(added(kernel, as_tensors(base), torch.bfloat16, [0], ELEMENTS, a))), (
            name
        )
