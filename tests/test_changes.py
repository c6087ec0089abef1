"""A change in bytes and back, and what is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import second_changes
from hypothesis import given
from hypothesis import strategies as st

from shared.changes import FEW_BITS, add_change, drawn_seeds, read_change, write_change, write_few_bits
from shared.errors import PeerError
from shared.messages import Change, Everyone, PlainStep, Plan
from shared.refusals import Refusal
from shared.seeds import draw

FORMS = st.sampled_from(["f32", "f16", "f8"])
PLAN = Plan(7, "open", bytes(16), 200, 0, 8, 1e-3, PlainStep(1e-3), Everyone(), True, None, False, 0, 60.0, "", None)


def test_a_change_names_its_seeds_and_scales_its_values_into_the_halves():
    change = write_change(np.array([3, 200]), np.array([3e-7, -1e-7]), "f16")
    assert change.seeds == b"\3\0\xc8\0"
    assert change.exponent == -36  # 3e-7 is 1.26 * 2^-22
    seeds, values = read_change(change, "f16", 256)
    assert seeds.tolist() == [3, 200]
    assert values.tolist() == pytest.approx([3e-7, -1e-7], rel=2**-11)
    assert values.dtype == np.float32


def test_nothing_is_scaled_as_float32_or_where_all_is_zero():
    assert write_change(None, np.array([1e-30]), "f32").exponent == 0
    assert write_change(None, np.zeros(2), "f8") == Change(None, 0, b"\0\0")
    assert write_change(np.zeros(0, np.int64), np.zeros(0), "f8") == Change(b"", 0, b"")


values = st.floats(-3.4e38, 3.4e38, allow_subnormal=True)


@given(st.lists(values, min_size=1, max_size=9), FORMS)
def test_both_readers_read_what_is_written_and_it_is_near(numbers, form):
    change = write_change(np.arange(len(numbers)), np.array(numbers), form)
    try:
        seeds, found = read_change(change, form, 256)
    except PeerError as error:  # the largest rounds up past float32
        assert error.refusal is Refusal.NON_FINITE
        assert max(map(abs, numbers)) > 2.9e38
        return
    record = {name: getattr(change, name) for name in ("seeds", "exponent", "values")}
    assert second_changes.read(record, form, 256, None) == (seeds.tolist(), found.tolist())
    spacing = {"f32": 2.0**-24, "f16": 2.0**-11, "f8": 2.0**-3}[form]
    floor = {"f32": 0.0, "f16": 2.0**-39, "f8": 2.0**-31}[form] * max(map(abs, numbers))  # below: subnormal halves
    for number, one in zip(numbers, found.tolist(), strict=True):
        assert abs(number - one) <= spacing * abs(number) + floor + 2.0**-149


def test_seeds_that_do_not_travel_are_those_drawn_or_all():
    drawn = np.array([1, 2, 200])
    three = write_change(None, np.array([1.0, 2.0, 3.0]), "f16")
    assert read_change(three, "f16", 256, drawn)[0].tolist() == [1, 2, 200]
    dense = write_change(None, np.ones(256), "f16")
    for known in (None, drawn, np.arange(256)):
        assert read_change(dense, "f16", 256, known)[0].tolist() == list(range(256))
    for known in (None, drawn[:2]):
        with pytest.raises(PeerError) as error:
            read_change(three, "f16", 256, known)
        assert error.value.refusal is Refusal.COEFFICIENT_COUNT


def test_the_drawn_seeds_are_those_of_every_step_once_and_in_order():
    drawn = drawn_seeds(PLAN, 256)
    assert drawn is not None
    assert drawn.tolist() == sorted(set(draw(PLAN.nonce, None, 200, 256, None).tolist()))
    assert drawn_seeds(msgspec.structs.replace(PLAN, common_seeds=False), 256) is None


def test_a_change_is_added_in_float32():
    a = np.array([1.0, 1.0, 0.0], np.float32)
    after = add_change(a, np.array([0, 2]), np.array([2.0**-25, -2.0], np.float32))
    assert after.tolist() == [1.0, 1.0, -2.0]
    assert a.tolist() == [1.0, 1.0, 0.0]


def test_a_change_past_float32_is_the_peers_fault():
    with pytest.raises(PeerError) as error:
        add_change(np.array([3e38], np.float32), np.array([0]), np.array([3e38], np.float32))
    assert error.value.refusal is Refusal.NON_FINITE


@pytest.mark.parametrize(("bits", "kept"), [(4, 0.985), (2, 0.85), (1, 0.6)])
def test_few_bits_for_all_coefficients_keep_most_of_a_gaussian_change(bits, kept):
    wanted = np.random.default_rng(bits).normal(size=4096) * 3e-4
    change = write_few_bits(wanted, bits)
    assert (change.seeds, len(change.values)) == (None, 4096 * bits // 8)
    seeds, found = read_change(change, "f32", 4096)
    assert seeds.tolist() == list(range(4096))
    assert 1 - ((wanted - found) ** 2).sum() / (wanted**2).sum() > kept


@pytest.mark.parametrize("bits", FEW_BITS)
def test_both_readers_read_the_same_bits(bits):
    change = write_few_bits(np.random.default_rng(7).normal(size=256), bits)
    record = {name: getattr(change, name) for name in ("seeds", "exponent", "values")}
    for form in ("f32", "f16", "f8"):
        seeds, found = read_change(change, form, 256)
        assert second_changes.read(record, form, 256, None) == (seeds.tolist(), found.tolist())


def test_two_bits_are_four_odd_multiples_lowest_first():
    change = Change(None, -3, b"\xe4" * 64)  # 0, 1, 2, 3 from the lowest bits up
    assert read_change(change, "f16", 256)[1][:4].tolist() == [-3 / 8, -1 / 8, 1 / 8, 3 / 8]


def test_what_few_bits_cannot_say_is_said_over_the_rounds():
    wanted = np.random.default_rng(3).normal(size=256)
    said = np.zeros(256)
    for round_number in range(1, 41):
        left = wanted * round_number - said
        said += read_change(write_few_bits(left, 2), "f16", 256)[1]
    assert np.sqrt(((said / 40 - wanted) ** 2).mean()) < 0.1  # a tenth of the values, where one round leaves a third


def test_as_many_bytes_as_the_drawn_seeds_take_are_theirs():
    drawn = np.arange(0, 256, 4)  # 64 of them: as f8 as long as 2 bits for all 256
    change = write_change(None, np.ones(64), "f8")
    assert read_change(change, "f8", 256, drawn)[0].tolist() == drawn.tolist()
    assert len(read_change(change, "f8", 256)[0]) == 256
