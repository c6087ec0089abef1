"""The kernels give the bits of the numpy definition, whatever the segments, dtype, directions and threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge_client.kernels import PADDING, Kernel, SumKind, Terms, choose, numba_bits, numba_cpu
from edge_client.kernels.numba_bits import cache_folder
from edge_client.kernels.numba_cpu import NumbaKernel
from edge_client.kernels.torch_any import TorchKernel
from shared import directions
from shared.errors import UserError
from shared.messages import DirectionKind, WeightDtype

POOL_KEY = 0xFEDC_BA98_7654_3210
TENSOR = 7
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {"numba": NumbaKernel(), "torch": TorchKernel()}
# Starts and length of segments of a tensor of 70,001 weights. Rows that are no multiple of 128, rows across the end of
# a block of K, single weights, the tail, a whole tensor in several chunks, a segment that ends one weight before its
# group.
SEGMENTS = {
    "whole": ([0], 70_001),
    "rows": ([576 * row for row in (0, 3, 3, 120, 17)], 576),
    "odd rows": ([5, 700, 4095, 65_000], 701),
    "one weight": ([0, 127, 128, 70_000], 1),
    "group": ([128, 384], 128),
    "chunk edges": ([4095, 61], 8193),
    "short of a group": ([100], 27),
    "tail": ([69_901], 100),
}


def base_weights(dtype: WeightDtype, elements: int) -> NDArray[np.generic]:
    """Random bit patterns of 16-bit types: infinities, NaN and subnormal numbers among them."""
    rng = np.random.default_rng(elements)
    if dtype == "fp32":
        return (rng.standard_normal(elements) * 10.0 ** rng.uniform(-45, 2, elements)).astype(np.float32)
    patterns = rng.integers(0, 1 << 16, elements).astype(np.uint16)
    return patterns.view(np.float16) if dtype == "fp16" else patterns


def as_tensor(stored: NDArray[np.generic], dtype: WeightDtype) -> torch.Tensor:
    if dtype == "bf16":
        return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(stored.copy())


def bits(weights: torch.Tensor) -> NDArray[np.generic]:
    return weights.view(torch.int32 if weights.element_size() == 4 else torch.int16).numpy()


def coefficients(seeds: int, count: int = 6) -> NDArray[np.float32]:
    rng = np.random.default_rng(seeds)
    values = np.zeros(seeds, dtype=np.float32)
    values[rng.choice(seeds, count, replace=False)] = 1e-2 * rng.standard_normal(count)
    return values


def expected(
    base: NDArray[np.generic], dtype: WeightDtype, kind: DirectionKind, starts: Sequence[int], length: int,
    a: NDArray[np.float32], probe: tuple[int, np.float32] | None,
) -> NDArray[np.generic]:  # fmt: skip
    rows = []
    for start in starts:
        displaced = directions.displacement(kind, POOL_KEY, TENSOR, start, start + length, a, probe)
        rows.append(directions.add_displacement(base[start : start + length], dtype, displaced))
    stacked = np.stack(rows)
    return stacked.view(np.int32 if stacked.itemsize == 4 else np.int16)


def computed(
    kernel: Kernel, base: torch.Tensor, kind: DirectionKind, starts: Sequence[int], length: int,
    a: NDArray[np.float32], probe: tuple[int, np.float32] | None, *, elements: int = 0, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """elements: of the whole tensor, where base holds the segments alone."""
    out = torch.empty(len(starts), length, dtype=base.dtype) if out is None else out
    at = torch.tensor(starts)
    if kind == "hadamard":
        y = directions.offsets(a)
        if probe is not None:
            y = y + probe[1] * directions.hadamard_row(probe[0], a.size)
        padded = torch.from_numpy(np.concatenate((y, y[:PADDING])))
        kernel.add_hadamard(base, at, out, tensor=TENSOR, padded=padded, pool_key=POOL_KEY)
        return out
    sums = torch.zeros(elements or base.numel())
    seeds = np.flatnonzero(a)
    terms = Terms(torch.from_numpy(seeds), torch.from_numpy(a[seeds]))
    kernel.accumulate(sums, tensor=TENSOR, kind=kind, pool_key=POOL_KEY, terms=terms)
    term = None if probe is None else Terms(torch.tensor([probe[0]]), torch.tensor([float(probe[1])]))
    kernel.add_sums(base, at, out, tensor=TENSOR, sums=sums, kind=kind, pool_key=POOL_KEY, probe=term)
    return out


@pytest.mark.parametrize("probe", [None, (3, np.float32(1e-3))], ids=["at rest", "probing"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", get_args(DirectionKind))
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_the_definition_bit_for_bit(
    name: str, kind: DirectionKind, dtype: WeightDtype, probe: tuple[int, np.float32] | None
) -> None:
    a = coefficients(4096)
    base = base_weights(dtype, 70_001)
    for what, (starts, length) in SEGMENTS.items():
        found = computed(KERNELS[name], as_tensor(base, dtype), kind, starts, length, a, probe)
        assert np.array_equal(bits(found), expected(base, dtype, kind, starts, length, a, probe)), what


@pytest.mark.parametrize("kind", get_args(DirectionKind))
@pytest.mark.parametrize("name", KERNELS)
def test_base_weights_of_the_segments_alone_give_the_same_bits_also_in_place(name: str, kind: DirectionKind) -> None:
    a = coefficients(4096)
    whole = base_weights("bf16", 70_001)
    for what, (starts, length) in SEGMENTS.items():
        parts = np.concatenate([whole[start : start + length] for start in starts])
        apart = as_tensor(parts, "bf16").view(-1, length)
        wanted = expected(whole, "bf16", kind, starts, length, a, None)
        found = computed(KERNELS[name], apart, kind, starts, length, a, None, elements=whole.size)
        assert np.array_equal(bits(found), wanted), what
        found = computed(KERNELS[name], apart, kind, starts, length, a, None, elements=whole.size, out=apart)
        assert np.array_equal(bits(found), wanted), what


@pytest.mark.parametrize("seeds", [256, 65536])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_the_definition_at_the_smallest_and_largest_pool(name: str, seeds: int) -> None:
    base = base_weights("bf16", 140_000)
    a = coefficients(seeds)
    for starts, length in (([0], 140_000), ([65_530, 255, 131_000], 300)):
        found = computed(KERNELS[name], as_tensor(base, "bf16"), "hadamard", starts, length, a, None)
        assert np.array_equal(bits(found), expected(base, "bf16", "hadamard", starts, length, a, None))


@pytest.mark.parametrize("size", [1e-8, 1e-5, 0.3, 70_000.0])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_16_bit_pattern_is_added_to_and_rounded_as_defined(dtype: WeightDtype, size: float) -> None:
    patterns = np.arange(1 << 16).astype(np.uint16)
    base = patterns.view(np.float16) if dtype == "fp16" else patterns
    a = np.zeros(256, dtype=np.float32)
    a[[1, 200]] = size, size / 3
    wanted = expected(base, dtype, "hadamard", [0], 1 << 16, a, None)
    for name, kernel in KERNELS.items():
        found = computed(kernel, as_tensor(base, dtype), "hadamard", [0], 1 << 16, a, None)
        assert np.array_equal(bits(found), wanted), name


def base_of_ties(dtype: WeightDtype) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Weights from 1 to 2, and NaN of every kind; coefficients whose every offset is half a unit in the last place."""
    a = np.zeros(4096, dtype=np.float32)
    a[0] = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}[dtype]  # row 0 of H is all ones
    if dtype == "fp32":
        ones = np.uint32(0x3F800000) + np.arange(4000, dtype=np.uint32)
        return np.concatenate((ones, np.uint32([0x7F800001, 0xFF812345, 0xFFC00000, 0x7F800000]))).view(np.float32), a
    first, infinity = {"bf16": (0x3F80, 0x7F80), "fp16": (0x3C00, 0x7C00)}[dtype]
    bits = np.concatenate((first + np.arange(128), infinity + np.arange(4), 0x8000 + infinity + np.arange(4)))
    patterns = bits.astype(np.uint16)
    return patterns.view(np.float16) if dtype == "fp16" else patterns, a


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_ties_go_to_even_and_every_nan_becomes_the_canonical_one(name: str, dtype: WeightDtype) -> None:
    base, a = base_of_ties(dtype)
    found = computed(KERNELS[name], as_tensor(base, dtype), "hadamard", [0], base.size, a, None)
    assert np.array_equal(bits(found), expected(base, dtype, "hadamard", [0], base.size, a, None))


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> object:
    """And no tensor is too small for both."""
    monkeypatch.setattr(numba_cpu, "_SERIAL", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", get_args(DirectionKind))
def test_threads_do_not_change_the_bits(kind: DirectionKind) -> None:
    base = base_weights("bf16", 200_003)
    a = coefficients(1024)
    found = computed(KERNELS["numba"], as_tensor(base, "bf16"), kind, [1], 200_002, a, None)
    assert np.array_equal(bits(found), expected(base, "bf16", kind, [1], 200_002, a, None))


_START_NUMBA = """
import torch
from edge_client.kernels import numba_cpu
from edge_client.kernels.numba_cpu import NumbaKernel
numba_cpu._SERIAL = 1
threads = torch.get_num_threads()
for _ in range(2):
    weights = torch.zeros(100_000)
    padded = torch.zeros(256 + 128)
    at = torch.zeros(1, dtype=torch.int64)
    NumbaKernel().add_hadamard(weights, at, weights.clone().view(1, -1), tensor=0, padded=padded, pool_key=1)
    assert torch.get_num_threads() == threads == 1, torch.get_num_threads()
"""


def test_the_numba_kernel_leaves_torch_its_number_of_threads() -> None:
    """In a process of its own: numba starts its threads once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _START_NUMBA], check=True, env=environment)


def test_terms_are_added_one_rounding_at_a_time() -> None:
    """A fused multiply-add, or sums in another order, would give other bits: 0.1 * z is not exact."""
    kind: SumKind = "gaussian"
    amounts = np.float32([0.1, -0.3, 1e-3])
    seeds = np.array([0, 5, 255])
    wanted = np.zeros(1000, dtype=np.float32)
    for k, amount in zip(seeds, amounts, strict=True):
        product = amount * directions.direction(kind, POOL_KEY, TENSOR, 0, 1000, int(k), 256)
        wanted = wanted + product
    for name, kernel in KERNELS.items():
        sums = torch.zeros(1000)
        terms = Terms(torch.from_numpy(seeds), torch.from_numpy(amounts))
        kernel.accumulate(sums, tensor=TENSOR, kind=kind, pool_key=POOL_KEY, terms=terms)
        assert np.array_equal(bits(sums), wanted.view(np.int32)), name


def test_machine_code_is_kept_apart_for_each_state_of_the_sources(tmp_path: Path) -> None:
    kernels = Path(numba_bits.__file__).parent
    assert cache_folder(kernels) == numba.config.CACHE_DIR or "NUMBA_CACHE_DIR" in os.environ
    for source in kernels.glob("*.py"):
        shutil.copy(source, tmp_path)
    folders = {cache_folder(tmp_path)}
    for changed in ("numba_bits.py", "numba_base.py", "numba_cpu.py"):
        with (tmp_path / changed).open("a") as file:
            file.write("# changed\n")
        folders.add(cache_folder(tmp_path))
    assert len(folders) == 4


def test_the_cpu_gets_numba_and_every_choice_has_a_reason() -> None:
    assert choose("cpu").kernel.name == "numba"
    assert choose("cpu").reason == "the fastest on a cpu"
    assert (choose("cpu", "torch").kernel.name, choose("cpu", "torch").reason) == ("torch", "was asked for")
    assert (choose("meta").kernel.name, choose("meta").reason) == ("torch", "runs on meta")


def test_a_kernel_that_cannot_run_is_refused() -> None:
    with pytest.raises(UserError, match="the numba kernel runs on the cpu; the model is on meta"):
        choose("meta", "numba")
    with pytest.raises(UserError, match="the kernel is 'cuda'; it must be auto, numba, torch or triton"):
        choose("cpu", "cuda")  # type: ignore[arg-type]


def test_where_numba_cannot_be_imported_the_cpu_gets_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edge_client.kernels.numba_cpu", None)  # what import makes of a broken module
    choice = choose("cpu")
    assert choice.kernel.name == "torch" and choice.reason.startswith("numba cannot be used: import of ")
    with pytest.raises(UserError, match=r"numba cannot be used: .* Install numba, or choose the kernel auto or torch"):
        choose("cpu", "numba")
