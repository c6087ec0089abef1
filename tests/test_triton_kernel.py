"""The Triton kernel gives the bits of the numpy definition under Triton's interpreter; for a GPU it is only compiled.

PyPI's torch for Linux brings triton; the CPU build of torch does not.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge_client.kernels as kernels
from edge_client.kernels import choose
from edge_client.kernels.torch_any import TorchKernel
from shared import philox
from shared.errors import UserError
from shared.messages import WeightDtype
from tests.test_kernels import (
    DTYPES,
    POOL_KEY,
    SEGMENTS,
    as_tensor,
    base_of_ties,
    base_weights,
    bits,
    coefficients,
    computed,
    expected,
)
from tests.test_packed_kernels import PACKINGS, added, as_tensors, random_packed
from tests.test_packed_kernels import expected as expected_of_packed

with contextlib.suppress(ImportError):
    import triton.language as tl  # the interpreter looks for it among the globals of a kernel

MODULE = "edge_client.kernels.triton_gpu"
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
_philox: Any = None  # what `_store_words` calls
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (this build of torch came without it)"
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """The kernel's module, imported as Triton's interpreter runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, MODULE, raising=False)
        patch.delattr(kernels, "triton_gpu", raising=False)
        yield importlib.import_module(MODULE)
        sys.modules.pop(MODULE, None)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_the_definition_bit_for_bit(interpreted: Any, dtype: WeightDtype) -> None:
    a = coefficients(4096)
    base = base_weights(dtype, 70_001)
    for what, (starts, length) in SEGMENTS.items():
        found = computed(interpreted.TritonKernel(), as_tensor(base, dtype), "hadamard", starts, length, a, None)
        assert np.array_equal(bits(found), expected(base, dtype, "hadamard", starts, length, a, None)), what


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", ["4 bit, 64", "8 bit, rows of 701"])
def test_a_packed_base_is_added_to_as_defined_bit_for_bit(interpreted: Any, packing: str, dtype: WeightDtype) -> None:
    a = coefficients(4096)
    base = random_packed(*PACKINGS[packing])
    for what in ("odd rows", "one weight", "tail"):
        starts, length = SEGMENTS[what]
        found = added(interpreted.TritonKernel(), as_tensors(base), DTYPES[dtype], starts, length, a)
        assert np.array_equal(bits(found), expected_of_packed(base, dtype, starts, length, a)), what


@needs_triton
@pytest.mark.parametrize(("seeds", "starts", "length"), [(256, [0, 255, 700], 1301), (65536, [65_530, 131_000], 300)])
def test_kernel_equals_the_definition_at_the_smallest_and_largest_pool(
    interpreted: Any, seeds: int, starts: list[int], length: int
) -> None:
    base = base_weights("bf16", 140_000)
    a = coefficients(seeds)
    probe = (seeds - 1, np.float32(-1e-3))
    found = computed(interpreted.TritonKernel(), as_tensor(base, "bf16"), "hadamard", starts, length, a, probe)
    assert np.array_equal(bits(found), expected(base, "bf16", "hadamard", starts, length, a, probe))


@needs_triton
@pytest.mark.parametrize("size", [1e-8, 0.3, 70_000.0])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_16_bit_pattern_is_added_to_and_rounded_as_defined(
    interpreted: Any, dtype: WeightDtype, size: float
) -> None:
    patterns = np.arange(1 << 16).astype(np.uint16)
    base = patterns.view(np.float16) if dtype == "fp16" else patterns
    a = np.zeros(4096, dtype=np.float32)
    a[[1, 200]] = size, size / 3
    found = computed(interpreted.TritonKernel(), as_tensor(base, dtype), "hadamard", [0], 1 << 16, a, None)
    assert np.array_equal(bits(found), expected(base, dtype, "hadamard", [0], 1 << 16, a, None))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_even_and_every_nan_becomes_the_canonical_one(interpreted: Any, dtype: WeightDtype) -> None:
    base, a = base_of_ties(dtype)
    found = computed(interpreted.TritonKernel(), as_tensor(base, dtype), "hadamard", [0], base.size, a, None)
    assert np.array_equal(bits(found), expected(base, dtype, "hadamard", [0], base.size, a, None))


def _store_words(out, counters, tensor, key_low, key_high):  # type: ignore[no-untyped-def]
    words = _philox(tl.load(counters + tl.arange(0, 4)), tensor, 5, key_low, key_high)
    for word in tl.static_range(4):
        tl.store(out + 4 * tl.arange(0, 4) + word, words[word].to(tl.int64))


@needs_triton
def test_counters_beyond_32_bits_give_the_words_of_the_definition(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of more than 2^39 weights reach them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(globals(), "_philox", interpreted._philox)
    counters = torch.tensor([0, 127, (1 << 32) + 3, (1 << 40) - 1])
    out = torch.zeros(4, 4, dtype=torch.int64)
    interpreted.triton.jit(_store_words)[(1,)](
        out, counters, 7, interpreted._signed(POOL_KEY), interpreted._signed(POOL_KEY >> 32)
    )
    assert np.array_equal(out.numpy(), philox.words(POOL_KEY, 7, 5, counters.numpy()))


_COMPILE = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from edge_client.kernels.triton_gpu import _hadamard
for number, packing in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2)):
    kind = "*i16" if number else "*i32"
    constants = {"seeds": 4096, "shift": 12, "groups": 4, "dtype": number, "is_apart": False, "block": 64}
    constants["packing"] = packing
    codes = {0: kind, 1: "*u8", 2: "*i8"}[packing]
    types = {"base": codes, "scales": "*fp32", "table": "*fp32", "starts": "*i64", "out": kind, "y": "*i32"}
    types |= dict.fromkeys(("length", "tiles", "tensor", "key_low", "key_high"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    made = compile(ASTSource(_hadamard, types, constants), target=GPUTarget("cuda", int(sys.argv[1]), 32))
    assert len(made.asm["cubin"]) > 1000
    text = made.asm["ptx"]
    assert "add.f32" in text
    assert not re.findall(r"\\.ftz|\\bfma\\.", text)  # subnormal numbers are kept, every operation rounds
"""


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="compiles with the ptxas of Triton's wheels for Linux")
@pytest.mark.parametrize("capability", [80, 87, 90])
def test_the_kernel_compiles_for_cuda_devices_and_rounds_each_operation(capability: int, tmp_path: Path) -> None:
    """No device is needed. 8.0: A100; 8.7: Jetson Orin; 9.0: H100."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(capability)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs_triton
def test_the_proof_passes_where_bits_are_equal_and_fails_where_one_differs(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted, "_PROOF_WEIGHTS", 900)  # the interpreter is slow
    monkeypatch.setattr(interpreted, "_PROOF_LENGTH", 300)
    interpreted.prove(CPU)
    right = interpreted.TritonKernel.add_hadamard

    def wrong(self: Any, base: torch.Tensor, starts: torch.Tensor, out: torch.Tensor, **state: Any) -> None:
        right(self, base, starts, out, **state)
        out[-1, -1] = -out[-1, -1]

    monkeypatch.setattr(interpreted.TritonKernel, "add_hadamard", wrong)
    with pytest.raises(RuntimeError, match=r"its weights in torch\.float32 differ from those of the torch kernel"):
        interpreted.prove(CPU)


@needs_triton
def test_independent_directions_are_the_torch_kernels(interpreted: Any) -> None:
    assert interpreted.TritonKernel.add_sums is TorchKernel.add_sums
    assert interpreted.TritonKernel.accumulate is TorchKernel.accumulate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_where_triton_cannot_run_a_cuda_device_gets_the_torch_kernel_with_the_reason() -> None:
    choice = choose("cuda")
    assert choice.kernel.name == "torch"
    assert choice.reason.startswith("triton cannot be used: ")
    with pytest.raises(
        UserError, match=r"triton cannot be used: .* Install triton, or choose the kernel auto or torch"
    ):
        choose("cuda", "triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gets_the_triton_kernel_after_its_proof() -> None:
    assert choose("cuda").kernel.name == "triton"


def test_the_triton_kernel_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match="the triton kernel runs on a cuda device; the model is on cpu"):
        choose("cpu", "triton")


def test_rocm_gets_the_torch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose("cuda").kernel.name == "torch"
    assert choose("cuda").reason == "the triton kernel was not checked on rocm"
