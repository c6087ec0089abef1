"""Directions: small cases checked by hand, the algebra of the Hadamard basis, rounding, and slices."""

from __future__ import annotations

import hashlib
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import directions, philox
from shared.errors import UserError

KEY = 0x0123_4567_89AB_CDEF
KINDS = ("hadamard", "rademacher", "gaussian")


def f32(values) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def random_coefficients(seeds: int, nonzero: int | None = None) -> np.ndarray:
    generator = np.random.default_rng(seeds)
    coefficients = f32(generator.standard_normal(seeds) * 1e-3)
    if nonzero is not None:
        coefficients[generator.permutation(seeds)[nonzero:]] = 0
    return coefficients


# Small cases by hand


def test_four_offsets_by_hand():
    # H of order 4, rows k = 0..3: + + + +, + - + -, + + - -, + - - +
    by_hand = [1 + 2 + 4 + 8, 1 - 2 + 4 - 8, 1 + 2 - 4 - 8, 1 - 2 - 4 + 8]
    assert directions.offsets(f32([1, 2, 4, 8])).tolist() == by_hand


@pytest.mark.parametrize(
    ("k", "row"), [(0, [1, 1, 1, 1]), (1, [1, -1, 1, -1]), (2, [1, 1, -1, -1]), (3, [1, -1, -1, 1])]
)
def test_four_hadamard_rows_by_hand(k, row):
    assert directions.hadamard_row(k, 4).tolist() == row


def test_three_weights_by_hand():
    """K = 4, three weights: every step of the displacement spelled out from Philox's words."""
    sign_words = philox.words(KEY, 2, 0, np.array([0]))[0]
    start = int(philox.words(KEY, 2, 1, np.array([0]))[0, 0])
    y = [15.0, -5.0, -9.0, 3.0]  # of coefficients 1, 2, 4, 8, see above
    expected = [(-1 if int(sign_words[0]) >> i & 1 else 1) * y[(start + i) % 4] for i in range(3)]
    assert directions.displacement("hadamard", KEY, 2, 0, 3, f32([1, 2, 4, 8])).tolist() == expected


def test_sign_and_normal_bits_are_taken_from_the_words_the_definition_names():
    i = 300
    word = int(philox.words(KEY, 5, 0, np.array([i // 128]))[0, (i // 32) % 4])
    assert directions.signs(KEY, 5, i, i + 1)[0] == (-1 if word >> (i % 32) & 1 else 1)
    for i, shift in ((44, 0), (45, 16)):
        word = int(philox.words(KEY, 5, 0x0200_0000 + 9, np.array([i // 8]))[0, (i // 2) % 4])
        expected = directions.normal_quantiles()[word >> shift & 0xFFFF]
        assert directions.direction("gaussian", KEY, 5, i, i + 1, 9, 16)[0] == expected


def test_order_of_the_butterflies_is_the_definitions():
    # 1 + 2^-24 rounds to 1, so what survives tells who was added first: neighbours (h = 1), not h = 2.
    tiny = 2.0**-24
    assert directions.offsets(f32([1, tiny, 0, tiny]))[0] == 1
    assert directions.offsets(f32([1, 0, tiny, tiny]))[0] == np.float32(1 + 2 * tiny)


def plain_offsets(coefficients: np.ndarray) -> np.ndarray:
    """The definition's order, pair by pair."""
    y, h = coefficients.copy(), 1
    while h < y.size:
        for j in (j for j in range(y.size) if not j & h):
            y[j], y[j + h] = y[j] + y[j + h], y[j] - y[j + h]
        h *= 2
    return y


@pytest.mark.parametrize("seeds", [1, 2, 4, 8, 128, 256, 512, 4096])
def test_offsets_are_those_of_pair_after_pair_bit_for_bit(seeds):
    coefficients = random_coefficients(seeds) * f32(2.0) ** np.random.default_rng(2).integers(-130, 60, seeds)
    before = coefficients.copy()
    found = directions.offsets(coefficients)
    assert (found.view(np.uint32) == plain_offsets(coefficients.astype(np.float32)).view(np.uint32)).all()
    assert (coefficients == before).all()


# The Hadamard basis


def test_offsets_are_the_matrix_product_where_sums_are_exact():
    coefficients = np.random.default_rng(1).integers(-50, 50, 256).astype(np.float32)
    matrix = np.array([directions.hadamard_row(k, 256) for k in range(256)], dtype=np.int64)
    assert (directions.offsets(coefficients) == matrix.T @ coefficients.astype(np.int64)).all()


def test_hadamard_directions_are_orthogonal_over_every_full_block():
    seeds, block = 256, 3
    z = np.array([directions.direction("hadamard", KEY, 1, 256 * block, 512 * 2, k, seeds) for k in range(seeds)])
    gram = z.astype(np.int64) @ z.astype(np.int64).T
    assert (gram == 256 * np.eye(seeds, dtype=np.int64)).all()


def test_every_bucket_gets_exactly_one_weight_of_each_full_block():
    found = directions.buckets(KEY, 0, 0, 4 * 256, 256).reshape(4, 256)
    assert (np.sort(found, axis=1) == np.arange(256)).all()
    assert len({int(block[0]) for block in found}) > 1  # each block is rotated on its own


def test_displacement_is_the_sum_of_directions_where_sums_are_exact():
    coefficients = np.zeros(256, dtype=np.float32)
    coefficients[[0, 7, 255]] = [3, -2, 5]
    for kind in ("hadamard", "rademacher"):
        z = [directions.direction(kind, KEY, 4, 10, 900, k, 256) for k in (0, 7, 255)]
        expected = 3 * z[0] - 2 * z[1] + 5 * z[2]
        assert (directions.displacement(kind, KEY, 4, 10, 900, coefficients) == expected).all()


# The other kinds


def test_accumulation_is_ascending_and_rounds_every_product_and_sum():
    coefficients = random_coefficients(256, nonzero=5)
    accumulated = np.zeros(100, dtype=np.float32)
    for k in np.flatnonzero(coefficients):
        z = directions.direction("gaussian", KEY, 0, 0, 100, int(k), 256)
        product = (coefficients[k].astype(np.float64) * z).astype(np.float32)  # exact in float64, then rounded once
        accumulated = (accumulated.astype(np.float64) + product).astype(np.float32)
    assert (directions.displacement("gaussian", KEY, 0, 0, 100, coefficients) == accumulated).all()


def test_quantile_table_is_the_normal_distributions_and_pinned():
    table = directions.normal_quantiles()
    normal = statistics.NormalDist()
    for j in (0, 1, 7, 1000, 32767, 32768, 50000, 65534, 65535):
        exact = normal.inv_cdf((j + 0.5) / 65536)
        assert abs(float(table[j]) - exact) <= abs(np.spacing(np.float32(exact)))
    assert (table == -table[::-1]).all()
    assert (np.diff(table) > 0).all()
    stored = table[32768:].astype("<f4").tobytes()
    assert hashlib.sha256(stored).hexdigest() == directions.QUANTILES_SHA256
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0


@pytest.mark.parametrize("kind", ("rademacher", "gaussian"))
def test_independent_directions_have_mean_zero_and_variance_one(kind):
    z = directions.direction(kind, KEY, 0, 0, 200_000, 3, 256).astype(np.float64)
    other = directions.direction(kind, KEY, 0, 0, 200_000, 4, 256).astype(np.float64)
    bound = 5 / np.sqrt(z.size)  # five standard errors
    assert abs(z.mean()) < bound
    assert abs((z * z).mean() - 1) < 2 * bound
    assert abs((z * other).mean()) < bound


# Slices and probes, every kind


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 1200), length=st.integers(0, 300), far=st.sampled_from((0, (1 << 33) + 5)))
def test_any_slice_is_the_slice_of_the_whole(kind, start, length, far):
    coefficients = random_coefficients(256, None if kind == "hadamard" else 3)
    whole = directions.displacement(kind, KEY, 3, far, far + 1500, coefficients, (2, 1e-3))
    part = directions.displacement(kind, KEY, 3, far + start, far + start + length, coefficients, (2, 1e-3))
    assert (part == whole[start : start + length]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_leave_no_seam(kind, monkeypatch):
    coefficients = random_coefficients(256, 4)
    whole = directions.displacement(kind, KEY, 3, 17, 2000, coefficients, (9, 1e-3))
    monkeypatch.setattr(directions, "_CHUNK", 61)
    assert (directions.displacement(kind, KEY, 3, 17, 2000, coefficients, (9, 1e-3)) == whole).all()


@pytest.mark.parametrize("kind", KINDS)
def test_probe_adds_step_times_the_direction(kind):
    coefficients = random_coefficients(256, 6)
    step = np.float32(1e-3)
    z = directions.direction(kind, KEY, 3, 5, 700, 77, 256)
    for signed in (step, -step):
        probed = directions.displacement(kind, KEY, 3, 5, 700, coefficients, (77, signed))
        at_rest = directions.displacement(kind, KEY, 3, 5, 700, coefficients)
        assert (probed == at_rest + signed * z).all()


def test_a_probe_without_coefficients_is_the_scaled_direction():
    nothing = np.zeros(256, dtype=np.float32)
    for kind in KINDS:
        z = directions.direction(kind, KEY, 3, 5, 700, 77, 256)
        assert (directions.displacement(kind, KEY, 3, 5, 700, nothing, (77, 0.5)) == np.float32(0.5) * z).all()


def test_tensor_key_and_seed_each_change_the_direction():
    for kind in KINDS:
        z = directions.direction(kind, KEY, 3, 0, 512, 7, 256)
        for other in ((KEY + 1, 3, 7), (KEY, 4, 7), (KEY, 3, 8), (KEY + (1 << 32), 3, 7)):
            assert (directions.direction(kind, other[0], other[1], 0, 512, other[2], 256) != z).any()


# Weights


def fp16_patterns(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float16)


def test_bf16_weights_round_to_nearest_and_ties_to_even():
    one = np.uint16(0x3F80)  # 1.0; its neighbours are 2^-7 above and 2^-8 below
    base = np.full(5, one)
    displaced = f32([2**-8, 2**-8 + 2**-20, 3 * 2**-8, -(2**-9), -(2**-9) - 2**-20])
    rounded = directions.add_displacement(base, "bf16", displaced)
    assert rounded.dtype == np.uint16
    assert rounded.tolist() == [0x3F80, 0x3F81, 0x3F82, 0x3F80, 0x3F7F]


def test_fp16_weights_round_to_nearest_and_ties_to_even():
    displaced = f32([2**-11, 2**-11 + 2**-20, 3 * 2**-11])
    rounded = directions.add_displacement(fp16_patterns([1, 1, 1]), "fp16", displaced)
    assert rounded.dtype == np.float16
    assert rounded.tolist() == [1, 1 + 2**-10, 1 + 2**-9]


def test_fp32_weights_round_the_sum_once():
    rounded = directions.add_displacement(f32([1, 1]), "fp32", f32([2**-24, 3 * 2**-24]))
    assert rounded.tolist() == [1, 1 + 2**-22]


def test_subnormal_weights_are_not_flushed():
    smallest = np.float32(2**-149)
    assert directions.add_displacement(f32([0]), "fp32", f32([smallest]))[0] == smallest
    assert directions.add_displacement(fp16_patterns([0]), "fp16", f32([2**-24])).view(np.uint16)[0] == 1
    assert directions.add_displacement(np.zeros(1, np.uint16), "bf16", f32([2**-133]))[0] == 1


@pytest.mark.parametrize(
    ("dtype", "base", "expected"),
    [
        ("fp32", np.array([0xFF800001, 0x7F800000, 0xFF800000], np.uint32).view(np.float32), [0x7FC00000, 0x7F800000]),
        ("fp16", np.array([0xFC01, 0x7C00, 0xFC00], np.uint16).view(np.float16), [0x7E00, 0x7C00]),
        ("bf16", np.array([0xFF81, 0x7F80, 0xFF80], np.uint16), [0x7FC0, 0x7F80]),
    ],
)
def test_nan_becomes_the_canonical_one_and_infinity_stays(dtype, base, expected):
    weights = directions.add_displacement(base, dtype, f32([1, 1, np.inf]))
    bits = weights.view(np.uint32 if dtype == "fp32" else np.uint16)
    assert bits.tolist() == [*expected, expected[0]]  # infinity minus infinity is no number


def test_what_is_too_large_becomes_infinity():
    assert directions.add_displacement(np.array([0x7F7F], np.uint16), "bf16", f32([3e38]))[0] == 0x7F80
    assert directions.add_displacement(fp16_patterns([65504]), "fp16", f32([16])).view(np.uint16)[0] == 0x7C00
    assert directions.float32_to_bf16(f32([3.4e38]))[0] == 0x7F80


def test_every_bf16_pattern_survives_the_way_through_float32():
    patterns = np.arange(65536, dtype=np.uint16)
    back = directions.float32_to_bf16(directions.bf16_to_float32(patterns))
    is_nan = (patterns & 0x7FFF) > 0x7F80
    assert (back == np.where(is_nan, 0x7FC0, patterns)).all()
    square = patterns.reshape(256, 256)
    assert (directions.float32_to_bf16(directions.bf16_to_float32(square).T) == back.reshape(256, 256).T).all()


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_the_nearest_of_all_patterns(value):
    got = int(directions.float32_to_bf16(f32([value]))[0])
    candidates = [p for p in (got - 1, got, got + 1) if 0 <= p < 65536 and (p & 0x7FFF) < 0x7F80]
    values = directions.bf16_to_float32(np.array(candidates, dtype=np.uint16)).astype(np.float64)
    if (got & 0x7FFF) == 0x7F80:
        assert abs(value) >= 3.3961775292304957e38  # halfway between the largest bfloat16 and 2^128
    else:
        nearest = np.abs(values - np.float64(np.float32(value))).min()
        assert abs(values[candidates.index(got)] - np.float64(np.float32(value))) == nearest


def test_a_wrong_storage_raises():
    for base, dtype in ((f32([1]), "bf16"), (f32([1]), "fp16"), (fp16_patterns([1]), "fp32")):
        with pytest.raises(ValueError, match=f"{dtype} is stored as"):
            directions.add_displacement(base, dtype, f32([1]))


# Refusals


@pytest.mark.parametrize("seeds", (256, 4096, 65536))
def test_possible_seed_counts_pass(seeds):
    assert directions.check_seed_count(seeds) == seeds


@pytest.mark.parametrize("seeds", (-4096, 0, 1, 128, 300, 4095, 131072))
def test_impossible_seed_counts_are_user_errors(seeds):
    with pytest.raises(UserError) as refused:
        directions.check_seed_count(seeds)
    assert str(refused.value) == (
        f"the number of seeds K is {seeds}; it must be a power of two from 256 to 65536. "
        "Choose one of them, such as 4096."
    )


def test_coefficients_that_are_no_power_of_two_are_refused():
    for seeds in (0, 3, 300):
        with pytest.raises(UserError, match=f"there are {seeds} coefficients"):
            directions.offsets(np.zeros(seeds, dtype=np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", (-1, 256))
def test_a_seed_outside_the_pool_is_refused(kind, k):
    with pytest.raises(UserError, match=rf"seed {k} is outside the pool"):
        directions.direction(kind, KEY, 0, 0, 8, k, 256)
    with pytest.raises(UserError, match=rf"seed {k} is outside the pool"):
        directions.displacement(kind, KEY, 0, 0, 8, np.zeros(256, dtype=np.float32), (k, 1e-3))


def test_a_damaged_quantile_file_is_refused(monkeypatch):
    directions.normal_quantiles.cache_clear()
    monkeypatch.setattr(directions, "QUANTILES_SHA256", "0" * 64)
    with pytest.raises(UserError, match="Install kseed again"):
        directions.normal_quantiles()
    directions.normal_quantiles.cache_clear()


@pytest.mark.parametrize("bad", ([np.nan], [np.inf], [-np.inf], [3e38, 3e38]))
def test_coefficients_that_break_the_weights_are_refused(bad):
    coefficients = np.zeros(256, dtype=np.float32)
    coefficients[: len(bad)] = bad
    with pytest.raises(UserError, match="every weight must stay finite"):
        directions.offsets(coefficients)
    if not np.isfinite(bad).all():
        for kind in KINDS:
            with pytest.raises(UserError, match="every weight must stay finite"):
                directions.displacement(kind, KEY, 0, 0, 8, coefficients)
