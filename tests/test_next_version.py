"""From what a round adds to the published version, on four coefficients and numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from aggregator.next_version import CombinationError, NextVersion, next_version
from shared.changes import add_change, read_change
from shared.messages import NumberFormat

ZERO = np.zeros(4, np.float32)


def version(
    combined: list[float],
    form: NumberFormat = "f32",
    *,
    a: list[float] | None = None,
    carried: list[float] | None = None,
    drawn: list[int] | None = None,
) -> NextVersion:
    return next_version(
        ZERO if a is None else np.array(a, np.float32),
        ZERO if carried is None else np.array(carried, np.float32),
        np.array(combined),
        form,
        None if drawn is None else np.array(drawn),
    )


def test_what_float32_holds_is_added_and_nothing_is_carried() -> None:
    found = version([0.5, 0.0, -2.0, 0.0], a=[1.0, 1.0, 1.0, 1.0])
    assert found.coefficients.tolist() == [1.5, 1.0, -1.0, 1.0]
    assert found.carried.tolist() == [0.0] * 4
    assert found.rms == np.hypot(0.5, 2.0)


def test_what_float32_cannot_hold_is_carried_until_it_can() -> None:
    # Half of the distance to the next float32 after 1: nothing, then a whole one.
    first = version([2.0**-24, 0.0, 0.0, 0.0], a=[1.0, 0.0, 0.0, 0.0])
    assert (first.coefficients[0], first.carried[0]) == (1.0, np.float32(2.0**-24))
    second = version([2.0**-24, 0, 0, 0], a=first.coefficients.tolist(), carried=first.carried.tolist())
    assert (second.coefficients[0], second.carried[0]) == (np.float32(1 + 2.0**-23), 0.0)


def test_half_precision_sends_what_rounding_took_in_a_later_round() -> None:
    wanted = 1 + 2.0**-12  # a quarter of the distance of halves above 1
    found = version([wanted, 0.0, 0.0, 0.0], "f16")
    assert (found.coefficients[0], found.carried[0]) == (1.0, 2.0**-12)
    again = version([2.0**-12, 0, 0, 0], "f16", a=found.coefficients.tolist(), carried=found.carried.tolist())
    assert (again.coefficients[0], again.carried[0]) == (1 + 2.0**-11, 0.0)


@pytest.mark.parametrize("form", ["f32", "f16", "f8"])
def test_over_many_rounds_nothing_is_lost(form: NumberFormat) -> None:
    rng = np.random.default_rng(0)
    a, carried, exact = np.zeros(256, np.float32), np.zeros(256, np.float32), np.zeros(256)
    for _ in range(200):
        combined = rng.normal(size=256) * 1e-3 * (rng.random(256) < 0.1)
        exact += combined
        after = next_version(a, carried, combined, form, None)
        a, carried = after.coefficients, after.carried
    left = np.abs(a.astype(np.float64) + carried - exact)
    assert left.max() < 1e-8  # float32's rounding of what is carried, 200 times
    assert np.abs(carried).max() < {"f32": 1e-9, "f16": 3e-6, "f8": 6e-4}[form]


def test_the_shortest_cover_is_chosen_and_names_seeds_only_where_it_must() -> None:
    wide = [0.0] * 64
    wide[3] = 1.0
    named = version(wide, "f16", a=[0.0] * 64, carried=[0.0] * 64, drawn=[1, 2, 3])
    assert named.change is not None and named.change.seeds == b"\3\0" and len(named.change.values) == 2
    wide[1] = 2.0
    drawn = version(wide, "f16", a=[0.0] * 64, carried=[0.0] * 64, drawn=[1, 2, 3])
    assert drawn.change is not None and drawn.change.seeds is None and len(drawn.change.values) == 6
    late = version(wide, "f16", a=[0.0] * 64, carried=[0.0] * 64, drawn=[2, 3])  # seed 1 was not drawn by all
    assert late.change is not None and late.change.seeds == b"\1\0\3\0"


def test_a_change_as_long_as_a_snapshot_is_none() -> None:
    assert version([1.0, 2.0, 3.0, 4.0]).change is None
    dense = version([1.0, 2.0, 3.0, 4.0], "f16").change
    assert dense is not None and dense.seeds is None and len(dense.values) == 8


def test_what_is_carried_for_other_seeds_stays_carried() -> None:
    found = version([0.0, 1.0, 0.0, 0.0], "f16", carried=[0.25, 0.0, 0.0, 0.0])
    assert found.coefficients.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert found.carried.tolist() == [0.25, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("form", ["f32", "f16", "f8"])
def test_a_follower_of_changes_has_the_published_bits(form: NumberFormat) -> None:
    rng = np.random.default_rng(1)
    a, follower, carried = (np.zeros(256, np.float32) for _ in range(3))
    for _ in range(20):
        combined = np.where(rng.random(256) < 0.2, rng.normal(size=256) * 10.0 ** rng.integers(-9, 9, 256), 0.0)
        after = next_version(a, carried, combined, form, None)
        assert after.change is not None
        follower = add_change(follower, *read_change(after.change, form, 256))
        a, carried = after.coefficients, after.carried
        assert follower.tobytes() == a.tobytes()


@pytest.mark.parametrize("combined", [3.0e38, float("inf"), float("nan")])
def test_a_coefficient_past_float32_is_refused_and_named(combined: float) -> None:
    with pytest.raises(CombinationError, match=r"coefficient 2 .*float32 holds up to 3\.403e\+38"):
        version([0.0, 0.0, combined, 0.0], a=[0.0, 0.0, 3.0e38, 0.0])


def test_rounding_to_few_bits_may_not_pass_float32_either() -> None:
    with pytest.raises(CombinationError, match="Lower the step"):
        version([0.0, 0.0, 3.4028234663852886e38, 0.0], "f8")
