"""Scalars, coefficients and seeds as bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PeerError, UserError
from shared.refusals import Refusal
from shared.wire import (
    coefficients_from_bytes,
    coefficients_to_bytes,
    scalars_from_bytes,
    scalars_to_bytes,
    seeds_from_bytes,
    seeds_to_bytes,
)


def scalars_as_sent(scalars, form):
    return scalars_from_bytes(scalars_to_bytes(scalars, form), form)


def test_scalars_keep_their_bits():
    values = np.array([0.1, -0.0, 1e-45, 3.4028234663852886e38], dtype=np.float32)
    data = scalars_to_bytes(values, "f32")
    assert data == struct.pack("<4f", *values)
    assert scalars_from_bytes(data, "f32").tobytes() == values.tobytes()


def test_half_scalars_round_to_even_and_clamp():
    sent = scalars_as_sent([1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, -1e30, 2**-26, -0.0], "f16")
    assert sent.dtype == np.float32
    assert sent.tolist() == [1.0, 1 + 2**-9, 65504.0, 65504.0, -65504.0, 0.0, 0.0]
    assert np.signbit(sent[-1])


@pytest.mark.parametrize("values", [[], [[1.0]], [float("nan")], [float("inf")], [1e39], [0.0] * 16385])
def test_scalars_that_cannot_be_sent_are_the_senders_fault(values):
    with np.errstate(over="ignore"), pytest.raises(UserError, match="allowed: 1 to 16384 finite numbers"):
        scalars_to_bytes(values, "f16")


@pytest.mark.parametrize(
    ("data", "form", "refusal", "detail"),
    [
        (b"\0\0\0", "f16", Refusal.MALFORMED, "3 bytes do not hold whole f16 scalars"),
        (b"\0\0", "f32", Refusal.MALFORMED, "2 bytes do not hold whole f32 scalars"),
        (b"", "f32", Refusal.SCALAR_COUNT, "scalars is empty"),
        (b"\0\0\0\x7e", "f16", Refusal.NON_FINITE, "scalar 1 is nan"),
        (b"\0\0\x80\xff", "f32", Refusal.NON_FINITE, "scalar 0 is -inf"),
    ],
)
def test_bad_scalars_are_the_peers_fault(data, form, refusal, detail):
    with pytest.raises(PeerError) as error:
        scalars_from_bytes(data, form)
    assert (error.value.refusal, error.value.detail) == (refusal, detail)


def test_coefficients_keep_their_bits():
    values = np.arange(-128, 128, dtype=np.float32) / np.float32(3)
    found = coefficients_from_bytes(coefficients_to_bytes(values), 256)
    assert found.dtype == np.float32
    assert found.tobytes() == values.tobytes()


def test_what_comes_out_of_bytes_may_be_written_to():
    coefficients_from_bytes(bytes(4), 1)[0] = 1
    seeds_from_bytes(bytes(2), 256)[0] = 1
    scalars_from_bytes(bytes(2), "f16")[0] = 1


def test_bad_coefficients_name_their_fault():
    with pytest.raises(PeerError, match=r"1020 bytes; allowed: 1024 for 256 float32") as error:
        coefficients_from_bytes(bytes(1020), 256)
    assert error.value.refusal is Refusal.COEFFICIENT_COUNT
    with pytest.raises(PeerError, match="coefficient 1 is nan") as error:
        coefficients_from_bytes(struct.pack("<2f", 0, float("nan")), 2)
    assert error.value.refusal is Refusal.NON_FINITE
    with pytest.raises(UserError, match="finite numbers in one dimension"):
        coefficients_to_bytes([1.0, float("inf")])


def test_seeds_keep_their_values_up_to_the_last():
    assert seeds_to_bytes([0, 5, 65535]) == b"\0\0\5\0\xff\xff"
    assert seeds_from_bytes(b"\0\0\5\0\xff\xff", 65536).tolist() == [0, 5, 65535]
    assert seeds_from_bytes(b"", 256).tolist() == []


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"\0", Refusal.MALFORMED),
        (b"\5\0\5\0", Refusal.MALFORMED),
        (b"\5\0\4\0", Refusal.MALFORMED),
        (b"\xff\x00\x00\x01", Refusal.SEED_OUTSIDE_POOL),
    ],
)
def test_bad_seeds_are_the_peers_fault(data, refusal):
    with pytest.raises(PeerError) as error:
        seeds_from_bytes(data, 256)
    assert error.value.refusal is refusal


@pytest.mark.parametrize("values", [[-1], [65536], [3, 3], [4, 3], [[1]]])
def test_seeds_that_cannot_be_sent_are_the_senders_fault(values):
    with pytest.raises(UserError, match="strictly increasing"):
        seeds_to_bytes(values)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_what_is_sent_twice_is_sent_alike(values):
    for form in ("f8", "f16", "f32"):
        sent = scalars_as_sent(values, form)
        assert np.isfinite(sent).all()
        assert scalars_as_sent(sent, form).tobytes() == sent.tobytes()
