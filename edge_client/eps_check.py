"""Does the probe's distance suit model and data? Scalars at eps and at 2 eps must agree; it is told if they do not.

Too short a probe drowns in the rounding of weights and activations, and its scalars are too large; too long a one
measures the loss's curves and not its slope. Either shows as a disagreement. Nothing is refused for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_client.estimator import Loss, two_point
from edge_client.overlay import Overlay

ROUNDS_BETWEEN = 10
DIRECTIONS = 2  # four passes each, every so many rounds: about 2% of their work
LEAST, MOST = 0.5, 2.0  # of 1, for agreement


@dataclass(frozen=True)
class EpsCheck:
    """Scalars of the same batch along the same directions."""

    eps: float
    at_eps: tuple[float, ...]
    at_two_eps: tuple[float, ...]

    @property
    def slope(self) -> float:
        """What the scalars at eps are to be multiplied by to give those at 2 eps (least squares)."""
        squares = sum(one * one for one in self.at_eps)
        return sum(a * b for a, b in zip(self.at_eps, self.at_two_eps, strict=True)) / squares if squares else 0.0

    @property
    def agrees(self) -> bool:
        """The slope is near 1."""
        return LEAST <= self.slope <= MOST

    def __str__(self) -> str:
        what = f"eps {self.eps:g}: scalars at 2 eps are {self.slope:.2f} of those at eps"
        if self.agrees:
            return what
        return f"warning: {what}; a run with another eps, such as twice this one, would measure slopes better"


def eps_check(loss: Callable[[], Loss], overlay: Overlay, seeds: Sequence[int], eps: float) -> EpsCheck:
    """Measure `loss` of one batch on both sides along `seeds`, at eps and at 2 eps. Raises UserError as `two_point`."""
    near, far = (
        tuple(float(two_point(loss, overlay, k, distance, "f32").scalar) for k in seeds) for distance in (eps, 2 * eps)
    )
    return EpsCheck(eps, near, far)
