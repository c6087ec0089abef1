"""From what a round's updates make together to what is published: the next version, and the change that leads to it.

A change travels in 32, 16 or 8 bits. What rounding leaves over is carried into the next round (error feedback), so
over the rounds nothing is lost. The next version is what a device makes of the change, to the bit: a device that
follows changes and one that takes snapshots hold the same coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.changes import NOTHING, add_change, read_change, write_change
from shared.errors import PeerError, UserError
from shared.messages import Change, NumberFormat
from shared.numbers import NUMBER_BYTES

FLOAT32_MAX = float(np.finfo(np.float32).max)


class CombinationError(UserError):
    """The updates of a round cannot be combined into finite coefficients; the round changes nothing."""


@dataclass(frozen=True, eq=False)
class NextVersion:
    """A version and how it came about."""

    coefficients: NDArray[np.float32]  # (K,)
    carried: NDArray[np.float32]  # (K,), what the change left over
    change: Change | None  # None: a snapshot is no longer
    rms: float  # RMS change of a weight for orthogonal directions: the norm of the coefficients' change


def next_version(
    coefficients: NDArray[np.float32],
    carried: NDArray[np.float32],
    combined: NDArray[np.float64],
    form: NumberFormat,
    drawn: NDArray[np.int64] | None,
) -> NextVersion:
    """The version after `coefficients` (K,), given what its round adds (`combined`, (K,)) and what is carried (K,).

    drawn: the seeds (n,) that every device of the round drew, if they are the same. The change covers the seeds that
    the round moved, those drawn, or all, whatever is shortest; what is carried for the others stays carried.
    Raises CombinationError where float32 cannot hold a coefficient.
    """
    wanted = carried.astype(np.float64) + combined
    with np.errstate(invalid="ignore"):
        _must_fit(wanted, "the change of coefficient")
        _must_fit(coefficients.astype(np.float64) + wanted, "coefficient")
    covered, is_named, length = _covered(np.flatnonzero(combined), form, len(coefficients), drawn)
    change = write_change(covered if is_named else None, wanted[covered], form)
    try:
        following = add_change(coefficients, *read_change(change, form, len(coefficients), covered))
    except PeerError as error:
        raise CombinationError(f"{error.detail}. Lower the step of the run.") from error
    moved = following.astype(np.float64) - coefficients
    return NextVersion(
        coefficients=following,
        carried=(wanted - moved).astype(np.float32),
        change=change if length < 4 * len(coefficients) else None,
        rms=math.sqrt(math.fsum((moved * moved).tolist())),
    )


def same_version(coefficients: NDArray[np.float32], carried: NDArray[np.float32]) -> NextVersion:
    """A round that combines nothing: the same coefficients under the next number."""
    return NextVersion(coefficients, carried, NOTHING, 0.0)


def _covered(
    moved: NDArray[np.int64], form: NumberFormat, pool: int, drawn: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], bool, int]:
    """The seeds of the shortest change, whether it must name them, and how many bytes it takes."""
    size = NUMBER_BYTES[form]
    choices = [(moved, True, (2 + size) * len(moved)), (np.arange(pool, dtype=np.int64), False, size * pool)]
    if drawn is not None and len(np.setdiff1d(moved, drawn)) == 0:
        choices.insert(1, (drawn, False, size * len(drawn)))
    return min(choices, key=lambda choice: choice[2])


def _must_fit(values: NDArray[np.float64], what: str) -> None:
    bad = np.flatnonzero(~(np.abs(values) <= FLOAT32_MAX))
    if len(bad):
        raise CombinationError(
            f"the combination makes {what} {bad[0]} {values[bad[0]]}; float32 holds up to {FLOAT32_MAX:.4g}. "
            "Lower the step of the run."
        )
