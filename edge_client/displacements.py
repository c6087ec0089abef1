"""What the coefficients add to the base weights, kept so that a step can change it cheaply.

`hadamard` keeps y = H a (K numbers) and computes it anew for every step, so that it never drifts from the
coefficients. `rademacher` and `gaussian`, the paper's way, keep one float32 sum per weight: rebuilt from scratch when
coefficients are set, moved by one term per local step. Those local sums may differ in the last bit from a rebuild; they
are private to the device and end with the round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_client.kernels import PADDING, Kernel, Packed, SumKind, Terms
from shared.directions import hadamard_row, offsets
from shared.manifest import Manifest
from shared.messages import DirectionKind

Floats = NDArray[np.float32]
Position = Union[Tensor, Terms]  # of a probe, as its kind of displacement keeps it


@dataclass(frozen=True)
class Placement:
    """Where displacements are computed, and with what."""

    kernel: Kernel
    device: torch.device
    pool_key: int


class Displacement(Protocol):
    """The state of one kind of direction. Coefficients are float32 (K,)."""

    def rebuild(self, coefficients: Floats) -> None:
        """Follow a new model version."""

    def follow(self, coefficients: Floats, k: int, delta: np.float32) -> None:
        """Follow one local step: `coefficients` are those after `delta` was added to the k-th."""

    def along(self, k: int, step: np.float32) -> Position:
        """The position of a probe: what the coefficients give, and step * z_k more."""

    def move(self, to: Position | None) -> None:
        """From here on, `fill` gives the weights at that position; None: at the coefficients' own."""

    def fill(self, base: Tensor | Packed, starts: Tensor, out: Tensor, tensor: int) -> None:
        """out = the weights of segments of tensor number `tensor` (shapes: `edge_client.kernels.Kernel`)."""


class HadamardOffsets:
    """y = H a, and y + step * H[k] while a probe lasts."""

    def __init__(self, placement: Placement, seeds: int) -> None:
        self._placement = placement
        self._y: Floats = np.zeros(seeds, dtype=np.float32)
        self._settled = self._padded(self._y)
        self._used = self._settled
        self._row: tuple[int, Floats] | None = None  # both probes of a step share it

    def rebuild(self, coefficients: Floats) -> None:
        """See Displacement."""
        self._y = offsets(coefficients)
        self._settled = self._padded(self._y)
        self._used = self._settled

    def follow(self, coefficients: Floats, k: int, delta: np.float32) -> None:
        """See Displacement."""
        self.rebuild(coefficients)

    def along(self, k: int, step: np.float32) -> Position:
        """See Displacement."""
        if self._row is None or self._row[0] != k:
            self._row = (k, hadamard_row(k, self._y.size))
        return self._padded(self._y + step * self._row[1])

    def move(self, to: Position | None) -> None:
        """See Displacement."""
        assert not isinstance(to, Terms)
        self._used = self._settled if to is None else to

    def fill(self, base: Tensor | Packed, starts: Tensor, out: Tensor, tensor: int) -> None:
        """See Displacement."""
        where = self._placement
        where.kernel.add_hadamard(base, starts, out, tensor=tensor, padded=self._used, pool_key=where.pool_key)

    def _padded(self, y: Floats) -> Tensor:
        return torch.from_numpy(np.concatenate((y, y[:PADDING]))).to(self._placement.device)


class Sums:
    """One float32 sum per weight for directions that are independent from seed to seed."""

    def __init__(self, placement: Placement, kind: SumKind, manifest: Manifest) -> None:
        self._placement = placement
        self._kind: SumKind = kind
        self._sums = [
            torch.zeros(tensor.elements, dtype=torch.float32, device=placement.device) for tensor in manifest.tensors
        ]
        self._probe: Terms | None = None

    def rebuild(self, coefficients: Floats) -> None:
        """See Displacement. Takes a pass over all weights per coefficient that is not 0."""
        seeds = np.flatnonzero(coefficients).astype(np.int64)
        for total in self._sums:
            total.zero_()
        self._accumulate(Terms(torch.from_numpy(seeds), torch.from_numpy(coefficients[seeds])))

    def follow(self, coefficients: Floats, k: int, delta: np.float32) -> None:
        """See Displacement."""
        self._accumulate(_term(k, delta))

    def along(self, k: int, step: np.float32) -> Position:
        """See Displacement."""
        return _term(k, step)

    def move(self, to: Position | None) -> None:
        """See Displacement."""
        assert not isinstance(to, Tensor)
        self._probe = to

    def fill(self, base: Tensor | Packed, starts: Tensor, out: Tensor, tensor: int) -> None:
        """See Displacement."""
        where = self._placement
        if isinstance(base, Packed):
            where.kernel.unpack(base, starts, out)
            base = out
        where.kernel.add_sums(
            base, starts, out, tensor=tensor, sums=self._sums[tensor], kind=self._kind, pool_key=where.pool_key,
            probe=self._probe,
        )  # fmt: skip

    def _accumulate(self, terms: Terms) -> None:
        where = self._placement
        for tensor, total in enumerate(self._sums):
            where.kernel.accumulate(total, tensor=tensor, kind=self._kind, pool_key=where.pool_key, terms=terms)


def _term(k: int, amount: np.float32) -> Terms:
    return Terms(torch.tensor([k], dtype=torch.int64), torch.from_numpy(np.array([amount], dtype=np.float32)))


def displacement(kind: DirectionKind, placement: Placement, seeds: int, manifest: Manifest) -> Displacement:
    """The state of directions of `kind` with all coefficients 0."""
    if kind == "hadamard":
        return HadamardOffsets(placement, seeds)
    return Sums(placement, kind, manifest)
