"""Kernels: fast twins of `shared.directions`, equal to it bit for bit.

A kernel turns base weights and the state of a run into the weights a module is about to use, for whole tensors or
for rows of them, into memory that the caller owns. `numba_cpu` is for CPUs, `triton_gpu` for CUDA, `torch_any` for
every device of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from shared.errors import UserError

Wanted = Literal["auto", "numba", "torch", "triton"]
SumKind = Literal["rademacher", "gaussian"]
PADDING = 128  # of y: as many neighbours read a window of it that must not wrap


@dataclass(frozen=True, eq=False)
class Packed:
    """One tensor's base weights as bitsandbytes packs them (`shared.packed` says what they stand for), on one device.

    4 bit: codes uint8 (N + 1 div 2,), table float32 (16,). 8 bit: codes int8 (N,), no table. scales: float32, one for
    every `block` weights, of which the last block may have fewer.
    """

    codes: Tensor
    scales: Tensor
    block: int
    table: Tensor | None


@dataclass(frozen=True)
class Terms:
    """What is added up: amounts[j] * z of seeds[j], in order. int64 (n,) and float32 (n,), on the CPU."""

    seeds: Tensor
    amounts: Tensor


class Kernel(Protocol):
    """Weights of segments. Shapes: base (N,) in the run's dtype, a whole tensor, flat and row-major, or (S, L), the
    segments alone, contiguous, maybe `out` itself; starts (S,) int64, where each segment begins in the tensor;
    out (S, L) in the run's dtype, contiguous, written. All on one device.

    `tensor` is the number in the manifest, `pool_key` the run's u64.
    """

    name: str

    def add_hadamard(
        self, base: Tensor | Packed, starts: Tensor, out: Tensor, *, tensor: int, padded: Tensor, pool_key: int
    ) -> None:
        """out = base + s * y[b]. padded: float32 (K + 128,), y followed by its first 128 (`PADDING`)."""

    def unpack(self, base: Packed, starts: Tensor, out: Tensor) -> None:
        """out = the base weights of the segments, rounded to out's dtype."""

    def add_sums(
        self, base: Tensor, starts: Tensor, out: Tensor, *, tensor: int, sums: Tensor, kind: SumKind, pool_key: int,
        probe: Terms | None,
    ) -> None:  # fmt: skip
        """out = base + sums, or base + (sums + amount * z) with a probe of one term. sums: float32 (N,)."""

    def accumulate(self, sums: Tensor, *, tensor: int, kind: SumKind, pool_key: int, terms: Terms) -> None:
        """sums += amount * z for every term in order, each product rounded before it is added. sums: float32 (N,)."""


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was chosen, for people."""

    kernel: Kernel
    reason: str


def choose(device: torch.device | str, wanted: Wanted = "auto") -> Choice:
    """The kernel for `device`: the fastest that works there, else the torch kernel, which works everywhere.

    Raises UserError where `wanted` does not exist or cannot run there.
    """
    where = torch.device(device)
    if wanted not in get_args(Wanted):
        raise UserError(f"the kernel is {wanted!r}; it must be auto, numba, torch or triton. Choose one of them.")
    from edge_client.kernels.torch_any import TorchKernel

    if wanted == "torch":
        return Choice(TorchKernel(), "was asked for")
    fast = {"cpu": "numba", "cuda": "triton"}.get(where.type)
    if wanted not in ("auto", fast):
        kind = {"numba": "the cpu", "triton": "a cuda device"}[wanted]
        raise UserError(
            f"the {wanted} kernel runs on {kind}; the model is on {where}. Choose the kernel auto or torch."
        )
    if fast is None:
        return Choice(TorchKernel(), f"runs on {where.type}")
    if wanted == "auto" and where.type == "cuda" and torch.version.hip is not None:
        return Choice(TorchKernel(), "the triton kernel was not checked on rocm")
    try:
        kernel = _numba() if fast == "numba" else _triton(where)
    except Exception as error:  # too new a numpy, no cache folder, no compiler, a driver too old, a bit that differs
        reason = f"{fast} cannot be used: {' '.join(str(error).split()) or type(error).__name__}"
        if wanted == fast:
            raise UserError(f"{reason}. Install {fast}, or choose the kernel auto or torch.") from error
        return Choice(TorchKernel(), reason)
    return Choice(kernel, "was asked for" if wanted == fast else f"the fastest on a {where.type}")


def _numba() -> Kernel:
    from edge_client.kernels.numba_cpu import NumbaKernel

    return NumbaKernel()


def _triton(where: torch.device) -> Kernel:
    from edge_client.kernels.triton_gpu import TritonKernel, prove

    prove(where)
    return TritonKernel()
