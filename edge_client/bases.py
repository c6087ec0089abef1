"""Where the base weights of a tuned tensor are kept, and how weights come from them.

The overlay knows a base by `Base` alone, so it may lie in memory as it is (`PlainBase`), be packed, or be read from a
disk when it is used. A model that was loaded in one of the latter ways has a placeholder over `BareWeights` wherever
such a base stands: it computes with the base weights before an overlay is there, and again after `Overlay.detach`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from edge_client.kernels import Kernel, Packed


class Add(Protocol):
    """The displacement of one tensor (`edge_client.displacements.Displacement.fill` with the tensor's number)."""

    def __call__(self, base: Tensor | Packed, starts: Tensor, out: Tensor) -> None:
        """out (S, L) = base + displacement of the segments that begin at starts (S,) of the tensor.

        base: the whole tensor, flat (N,) or packed, or the base weights of these segments alone, (S, L), which may be
        `out` itself. All of the run's dtype, on one device, out contiguous (`edge_client.kernels.Kernel`).
        """


class Base(Protocol):
    """The base weights of one tuned tensor, flat and row-major. They never change."""

    is_far: bool  # reading takes long, so both probes of a step should share one

    @property
    def elements(self) -> int:
        """How many weights."""

    @property
    def dtype(self) -> torch.dtype:
        """The run's dtype, in which `fill` and `read` write: bf16, fp16 or fp32, however the base is kept."""

    @property
    def device(self) -> torch.device:
        """Where `fill` and `read` write."""

    def fill(self, add: Add, starts: Tensor, out: Tensor) -> None:
        """out (S, L) = base + displacement of the segments that begin at starts, int64 (S,)."""

    def read(self, starts: Tensor, out: Tensor) -> None:
        """out (S, L) = the base weights of these segments, rounded once to the dtype."""


class PlainBase:
    """A base that lies in memory as it is."""

    is_far = False

    def __init__(self, weight: Tensor) -> None:
        self.flat = weight.detach().contiguous().view(-1)

    @property
    def elements(self) -> int:
        """See Base."""
        return self.flat.numel()

    @property
    def dtype(self) -> torch.dtype:
        """See Base."""
        return self.flat.dtype

    @property
    def device(self) -> torch.device:
        """See Base."""
        return self.flat.device

    def fill(self, add: Add, starts: Tensor, out: Tensor) -> None:
        """See Base: one pass over memory."""
        add(self.flat, starts, out)

    def read(self, starts: Tensor, out: Tensor) -> None:
        """See Base."""
        if len(starts) == 1:
            begin = int(starts)
            out.copy_(self.flat[begin : begin + out.shape[1]].view(1, -1))
        else:
            out.copy_(self.flat[starts[:, None] + torch.arange(out.shape[1], device=starts.device)])


class PackedBase:
    """A base that stays packed; a pass that adds to it unpacks as it goes."""

    is_far = False

    def __init__(self, packed: Packed, elements: int, dtype: torch.dtype, kernel: Kernel) -> None:
        """`dtype`: the run's. `kernel`: what unpacks where nothing is added."""
        self.packed = packed
        self.elements = elements
        self.dtype = dtype
        self._kernel = kernel

    @property
    def device(self) -> torch.device:
        """See Base."""
        return self.packed.codes.device

    def fill(self, add: Add, starts: Tensor, out: Tensor) -> None:
        """See Base: one pass over memory."""
        add(self.packed, starts, out)

    def read(self, starts: Tensor, out: Tensor) -> None:
        """See Base."""
        self._kernel.unpack(self.packed, starts, out)


class Scratch:
    """Memory that operations use one after the other: one flat tensor per slot, as large as its largest use."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._slots: dict[int, Tensor] = {}

    def take(self, slot: int, elements: int) -> Tensor:
        """`elements` of the slot's memory, with whatever it holds."""
        memory = self._slots.get(slot)
        if memory is None or memory.numel() < elements:
            self._slots.pop(slot, None)  # freed before the larger one is allocated
            memory = self._slots[slot] = self.fresh(elements)
        return memory[:elements]

    def fresh(self, elements: int) -> Tensor:
        """New memory. Never an inference tensor: those cannot be written outside inference mode."""
        with torch.inference_mode(False):
            return torch.empty(elements, dtype=self._dtype, device=self._device)

    @property
    def allocated_bytes(self) -> int:
        """What the slots hold together."""
        return sum(memory.nbytes for memory in self._slots.values())


class BareWeights:
    """A base without a displacement, as `edge_client.placeholders.Weights`: what an untuned model computes with."""

    def __init__(self, name: str, base: Base, scratch: Scratch) -> None:
        """`scratch`: of the base's dtype and device, shared by the whole model."""
        self.name = name
        self.base = base
        self.sides = 1
        self._scratch = scratch

    def fill(self, starts: Tensor, *outs: Tensor) -> None:
        """See `edge_client.placeholders.Weights`."""
        with torch.no_grad():
            for out in outs:
                self.base.read(starts, out)

    def scratch(self, slot: int, elements: int) -> Tensor:
        """See `edge_client.placeholders.Weights`."""
        return self._scratch.take(slot, elements)

    def fresh(self, elements: int) -> Tensor:
        """See `edge_client.placeholders.Weights`."""
        return self._scratch.fresh(elements)
