"""The overlay: a model whose weights exist only while an operation uses them (docs/architecture.md).

The base weights are taken out of the modules and never written. In their place stand `placeholders`, which compute
`w = round(w0 + displacement)` on use. To probe, only the displacement changes; nothing is undone, nothing drifts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_client.bases import Scratch
from edge_client.displacements import Displacement, Placement, Position, displacement
from edge_client.kernels import Kernel, choose
from edge_client.placeholders import Placeholder
from edge_client.tuned import DTYPE_NAMES, DTYPES, Tuned, select, stored_buffers
from shared.directions import check_seed_count
from shared.errors import UserError
from shared.manifest import Manifest
from shared.messages import DirectionKind, WeightDtype

Floats = NDArray[np.float32]
_DIGEST_CHUNK = 1 << 22  # weights at a time


@dataclass
class _Probes:
    """The positions at which weights are wanted together; none: at the displacement's own."""

    together: tuple[Position, ...] = ()


class BaseWeights:
    """One tuned tensor: its base, its number in the manifest, and how its weights come about."""

    def __init__(self, tuned: Tuned, number: int, scratch: Scratch, added: Displacement, probes: _Probes) -> None:
        self.name = tuned.name
        self.shape = tuned.weight.shape
        self.base = tuned.base
        self._scratch = scratch
        self._added = added
        self._add = partial(added.fill, tensor=number)
        self._probes = probes

    @property
    def sides(self) -> int:
        """See `edge_client.placeholders.Weights`."""
        return len(self._probes.together) or 1

    def fill(self, starts: Tensor, *outs: Tensor) -> None:
        """See `edge_client.placeholders.Weights`. Of several sides the base is read once."""
        with torch.no_grad():
            if len(outs) == 1:
                self.base.fill(self._add, starts, outs[0])
                return
            base = outs[-1]  # the last side is added in place
            self.base.read(starts, base)
            for position, out in zip(self._probes.together, outs, strict=True):
                self._added.move(position)
                self._add(base, starts, out)
            self._added.move(None)

    def scratch(self, slot: int, elements: int) -> Tensor:
        """See `edge_client.placeholders.Weights`."""
        return self._scratch.take(slot, elements)

    def fresh(self, elements: int) -> Tensor:
        """See `edge_client.placeholders.Weights`."""
        return self._scratch.fresh(elements)


class Overlay:
    """A model's tuned weights as a function of K coefficients.

    Attaching changes `model`: its parameters become placeholders until `write_out` or `detach`. Not thread-safe.
    Raises UserError, before the model is touched, where a parameter cannot be tuned (`edge_client.tuned`).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pool_key: int,
        seeds: int,
        directions: DirectionKind,
        kernel: Kernel | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        """`only`: the names of the tensors to tune, as a manifest has them; all of them if None."""
        check_seed_count(seeds)
        selection = select(model, only)
        self.model = model
        self.seeds = seeds
        self.directions: DirectionKind = directions
        self.pool_key = pool_key
        self.manifest: Manifest = selection.manifest
        self.dtype: WeightDtype = DTYPE_NAMES[selection.dtype]
        self.kernel: Kernel = kernel or choose(selection.device).kernel
        placement = Placement(self.kernel, selection.device, pool_key)
        self._coefficients: Floats = np.zeros(seeds, dtype=np.float32)
        self._added = displacement(directions, placement, seeds, self.manifest)
        self._scratch = Scratch(selection.dtype, selection.device)
        self._probes = _Probes()
        self._tensors = selection.tensors
        self._fixed = selection.fixed
        self._weights = {
            tuned.name: BaseWeights(tuned, number, self._scratch, self._added, self._probes)
            for number, tuned in enumerate(selection.tensors)
        }
        # Both probes of a step share a pass; the estimator takes it back where the model's code cannot.
        self.is_paired = any(weights.base.is_far for weights in self._weights.values())
        self._is_probing = False
        self._is_attached = True
        self._attach()

    @property
    def coefficients(self) -> Floats:
        """a, float32 (K,), a copy."""
        return self._coefficients.copy()

    def set_coefficients(self, coefficients: Floats) -> None:
        """Become the model of these coefficients, float32 (K,). Raises UserError where they are no such thing."""
        self._check_idle()
        if coefficients.shape != (self.seeds,) or coefficients.dtype != np.float32:
            raise UserError(
                f"there are {coefficients.size} coefficients of {coefficients.dtype}; "
                f"this run has {self.seeds} of float32. Fetch the run's snapshot again."
            )
        if not np.isfinite(coefficients).all():
            raise UserError("a coefficient is NaN or infinite; all must be finite. Fetch the run's snapshot again.")
        self._coefficients = coefficients.copy()
        self._added.rebuild(self._coefficients)

    def nudge(self, k: int, delta: float | np.float32) -> None:
        """One local step: a[k] += delta, in float32. Raises UserError if the sum is not finite."""
        self._check_idle()
        self._check_seed(k)
        with np.errstate(over="ignore"):
            moved = np.float32(self._coefficients[k] + np.float32(delta))
        if not np.isfinite(moved):
            raise UserError(f"coefficient {k} became {moved}; it must stay finite. Lower the step.")
        self._coefficients[k] = moved
        self._added.follow(self._coefficients, k, np.float32(delta))

    @contextmanager
    def probe(self, k: int, step: float | np.float32) -> Iterator[None]:
        """While the context lasts the model's weights lie `step` further along direction k."""
        self._check_idle()
        self._check_seed(k)
        self._added.move(self._added.along(k, np.float32(step)))
        self._is_probing = True
        try:
            yield
        finally:
            self._is_probing = False
            self._added.move(None)

    @contextmanager
    def both_probes(self, first: tuple[int, np.float32], second: tuple[int, np.float32]) -> Iterator[None]:
        """While the context lasts the model computes with the weights of two probes, as `edge_client.pairs.Pair`.

        first, second: the arguments of `probe`. Each weight's base is read once for both. The model's code may raise
        `edge_client.pairs.Diverged`.
        """
        self._check_idle()
        self._check_seed(first[0])
        self._check_seed(second[0])
        self._probes.together = (self._added.along(*first), self._added.along(*second))
        self._is_probing = True
        try:
            yield
        finally:
            self._is_probing = False
            self._probes.together = ()
            self._added.move(None)

    def materialise(self, name: str) -> Tensor:
        """The weights of one tensor of the manifest, in memory of their own and in its shape."""
        weights = self._find(name)
        out = self._scratch.fresh(weights.base.elements)
        weights.fill(torch.zeros(1, dtype=torch.int64, device=out.device), out.view(1, -1))
        return out.view(weights.shape)

    def model_digest(self) -> bytes:
        """SHA-256 of the weights as they are now, raw little-endian bytes in manifest order.

        Equal on all devices after `set_coefficients`. After local steps, `rademacher` and `gaussian` weights may differ
        in the last bit from those of a rebuild (`edge_client.displacements`).
        """
        return self._digest(rebuilt=True)

    def base_digest(self) -> bytes:
        """SHA-256 of the base weights, raw little-endian bytes in manifest order, then of all else that is stored."""
        return self._digest(rebuilt=False)

    def write_out(self) -> None:
        """End the overlay and leave the model with its weights as they are now, as real parameters."""
        self._check_idle()
        for tuned in self._tensors:
            self._place_one(tuned, nn.Parameter(self.materialise(tuned.name), requires_grad=False))
            del self._weights[tuned.name]
            tuned.free()  # the base goes as its weights come: no second copy of the model
        for fixed in self._fixed:
            if isinstance(fixed.weight, Placeholder):  # a base that is kept in another way
                self._place_one(fixed, nn.Parameter(fixed.weight.in_fresh(), requires_grad=False))
                fixed.free()
        self._end()

    def detach(self) -> None:
        """End the overlay and give the model its base weights back."""
        self._check_idle()
        for tuned in self._tensors:
            self._place_one(tuned, tuned.weight)
        self._end()

    @torch.no_grad()
    def verify(self, input_ids: Tensor) -> None:
        """Check that the model computes what it would with its weights written out: the same logits, bit for bit.

        input_ids: int64 (B, T). Needs memory for all weights once. Raises UserError where the logits differ; off the
        CPU they may differ in the last bits, because libraries choose algorithms by memory alignment.
        """
        with_overlay = self.model(input_ids=input_ids).logits
        for tuned in self._tensors:
            self._place_one(tuned, nn.Parameter(self.materialise(tuned.name), requires_grad=False))
        try:
            plain = self.model(input_ids=input_ids).logits
        finally:
            self._attach()
        is_equal = torch.equal(with_overlay, plain) if plain.is_cpu else torch.allclose(with_overlay, plain)
        if not is_equal:
            worst = float((with_overlay.float() - plain.float()).abs().max())
            raise UserError(
                f"the overlay's logits differ from those of the written-out model by up to {worst:.3g}; they must be "
                "equal. This model uses its weights in a way the overlay does not know: tune another one."
            )

    @property
    def scratch_bytes(self) -> int:
        """Memory that the weights in use take; constant after the first step."""
        return self._scratch.allocated_bytes

    def _find(self, name: str) -> BaseWeights:
        if name not in self._weights:
            raise UserError(f"the manifest has no tensor {name!r}; it has {len(self._weights)}, such as "
                            f"{next(iter(self._weights))!r}. Name one of them.")  # fmt: skip
        return self._weights[name]

    def _digest(self, *, rebuilt: bool) -> bytes:
        self._check_idle()
        hashed = hashlib.sha256()
        read = [(one.base.elements, one.fill if rebuilt else one.base.read) for one in self._weights.values()]
        read += [] if rebuilt else [(one.base.elements, one.base.read) for one in self._fixed]
        for elements, fill in read:
            for start in range(0, elements, _DIGEST_CHUNK):
                part = self._scratch.take(0, min(_DIGEST_CHUNK, elements - start))
                fill(torch.tensor([start], dtype=torch.int64, device=part.device), part.view(1, -1))
                hashed.update(part.view(torch.uint8).cpu().numpy().data)
        hashed.update(b"" if rebuilt else stored_buffers(self.model, DTYPES[self.dtype]))
        return hashed.digest()

    @contextmanager
    def placed(self, make: Callable[[BaseWeights, int], Placeholder]) -> Iterator[None]:
        """While it lasts, `make` of the weights and their number in the manifest stands for each tensor."""
        self._check_idle()
        try:
            self._attach(make)
            yield
        finally:
            self._attach()

    def _attach(self, make: Callable[[BaseWeights, int], Placeholder] = lambda weights, _: _plain(weights)) -> None:
        for number, tuned in enumerate(self._tensors):
            self._place_one(tuned, make(self._weights[tuned.name], number))

    def _place_one(self, tuned: Tuned, parameter: Tensor) -> None:
        for module, attribute in tuned.places:
            module._parameters[attribute] = parameter  # type: ignore[assignment]

    def _end(self) -> None:
        self._is_attached = False
        self._tensors, self._fixed = (), ()
        self._weights = {}

    def _check_seed(self, k: int) -> None:
        if not 0 <= k < self.seeds:
            raise UserError(f"seed {k} is outside the pool; a seed is in [0, {self.seeds}). Choose one inside.")

    def _check_idle(self) -> None:
        if self._is_probing or not self._is_attached:
            why = "inside a probe" if self._is_probing else "after write_out or detach"
            raise RuntimeError(f"the overlay cannot do this {why}")


def _plain(weights: BaseWeights) -> Placeholder:
    return Placeholder(weights, 0, weights.shape, weights.base.dtype, weights.base.device)
