"""Numbers of 32, 16 and 8 bits: every f8 there is, ties, clamping, and rounding by chance."""

from __future__ import annotations

import numpy as np
import pytest
import second_changes
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PeerError
from shared.numbers import LARGEST, NUMBER_BYTES, numbers_from_bytes, numbers_to_bytes, rounded_by_chance
from shared.refusals import Refusal

finite = st.floats(allow_nan=False, allow_infinity=False)


def test_every_finite_f8_survives_and_is_a_half_with_an_empty_lower_byte():
    every = bytes(byte for byte in range(256) if byte & 0x7C != 0x7C)
    values = numbers_from_bytes(every, "f8")
    assert len(every) == 248
    assert values.tobytes() == np.array([byte << 8 for byte in every], "<u2").view("<f2").astype(np.float32).tobytes()
    assert numbers_to_bytes(values.astype(np.float64), "f8") == every


@pytest.mark.parametrize("byte", [0x7C, 0x7D, 0x7F, 0xFC, 0xFE])
def test_an_f8_that_is_not_finite_is_refused(byte):
    with pytest.raises(PeerError) as error:
        numbers_from_bytes(bytes((0x3C, byte)), "f8")
    assert error.value.refusal is Refusal.NON_FINITE


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (1.125, 1.0),  # ties go to the even fraction
        (1.375, 1.5),
        (1.9, 2.0),
        (-1e9, -57344.0),
        (60000.0, 57344.0),
        (2.0**-16, 2.0**-16),  # the smallest
        (2.0**-17, 0.0),
        (3 * 2.0**-17, 2.0**-15),
        (1.125 + 2.0**-40, 1.25),  # rounded once: a half in between would make it a tie
    ],
)
def test_eight_bits_round_once_to_nearest_even_and_clamp(value, sent):
    assert numbers_from_bytes(numbers_to_bytes(np.array([value]), "f8"), "f8").tolist() == [sent]


@given(st.lists(finite, min_size=1, max_size=20), st.sampled_from(["f32", "f16", "f8"]))
def test_both_writers_write_the_same_bytes(values, form):
    data = numbers_to_bytes(np.array(values), form)
    assert data == b"".join(second_changes.write(value, form) for value in values)
    assert len(data) == NUMBER_BYTES[form] * len(values)
    again = numbers_from_bytes(data, form)
    assert np.abs(again).max() <= LARGEST[form]
    assert numbers_to_bytes(again.astype(np.float64), form) == data


def test_a_scalar_rounded_by_chance_is_right_on_average():
    noises = range(0, 2**32, 2**22)
    for value in (0.3, -1.1, 1.99, 7e-6, -40_000.0):
        sent = [float(rounded_by_chance(value, "f8", noise)) for noise in noises]
        assert len(set(sent)) == 2
        assert np.mean(sent) == pytest.approx(np.float32(value), rel=3e-3)


@pytest.mark.parametrize("noise", [0, 2**31, 2**32 - 1])
def test_what_eight_bits_hold_is_never_moved_by_chance(noise):
    for value in (0.0, 1.0, -1.25, 2.0**-16, 57344.0):
        assert rounded_by_chance(value, "f8", noise) == value
    assert rounded_by_chance(1e9, "f8", noise) == 57344.0


@pytest.mark.parametrize("form", ["f32", "f16"])
def test_wider_scalars_are_rounded_to_nearest_whatever_the_noise(form):
    sent = {float(rounded_by_chance(0.1, form, noise)) for noise in (0, 2**31, 2**32 - 1)}
    assert sent == {float({"f32": np.float32, "f16": np.float16}[form](0.1))}
