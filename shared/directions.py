"""Directions: the definition, to the bit. Every kernel is a fast twin of this module; golden vectors pin both.

A model is `w = round(w0 + sum_k a[k] * z_k)`: base weights w0, coefficients a (K of them, K = `seeds`), and K fixed
directions z_k. Element i is the flat row-major index in its tensor, t the tensor's number in the manifest, and
W(c, stream) four 32-bit words of Philox (`shared.philox.words`, which takes the run's pool key and t).

`hadamard` (the default): z_k[i] = s[i] * H[k, b[i]] with H[k, b] = (-1)^popcount(k & b).
    s[i] = -1 where bit (i mod 32) of word ((i div 32) mod 4) of W(i div 128, 0) is 1, else +1.
    b[i] = (word 0 of W(i div K, 1) + i) mod K: every block of K weights is a rotation of all K buckets.
`rademacher`: z_k[i] = s[i] as above, but from stream 0x0100_0000 + k instead of 0.
`gaussian`: z_k[i] = Q[16 bits of W(i div 8, 0x0200_0000 + k)], the bits being those of word ((i div 2) mod 4), the low
    half for even i, the high half for odd i. Q[j] is the standard normal quantile at (j + 0.5) / 65536, rounded to
    float32 (`normal_quantiles`).

Displacement, all in float32, every operation rounded to nearest even, none fused:
    `hadamard`: s[i] * y[b[i]], y = H a by butterflies (`offsets`); a probe of k by `step` replaces y by
        y + step * H[k].
    the others: acc = 0; for k ascending over a[k] != 0: acc = acc + (a[k] * z_k[i]); a probe of k by `step` ends with
        acc = acc + (step * z_k[i]).
Weights: w = round to nearest even in the weight's dtype of (float32(w0) + displacement), itself rounded to float32.
A NaN comes out as the dtype's canonical quiet NaN (0x7FC00000, 0x7E00, 0x7FC0), because hardware keeps different
payloads. Subnormal numbers are kept, never flushed.

Source of the estimator: FedKSeed (Qin et al., ICML 2024), equation 4; the Hadamard directions are kseed's own.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from shared import philox
from shared.errors import UserError
from shared.messages import DirectionKind, WeightDtype

MIN_SEEDS = 256
MAX_SEEDS = 65536
SIGN_STREAM = 0
BUCKET_STREAM = 1
RADEMACHER_STREAM = 0x0100_0000
GAUSSIAN_STREAM = 0x0200_0000
QUANTILES_SHA256 = "6621a18f629e82396c088501c1095eae46f6d8033b42db7b4158e0f4cf34a0ce"

_SIGNS_PER_CALL = 128
_NORMALS_PER_CALL = 8
_CHUNK = 1 << 18  # elements at a time: bounds the memory, has no influence on the bits

Floats = NDArray[np.float32]


def check_seed_count(seeds: int) -> int:
    """Return `seeds` if it may be a run's K. Raises UserError otherwise."""
    is_power_of_two = seeds > 0 and seeds & (seeds - 1) == 0
    if not (is_power_of_two and MIN_SEEDS <= seeds <= MAX_SEEDS):
        raise UserError(
            f"the number of seeds K is {seeds}; it must be a power of two from {MIN_SEEDS} to {MAX_SEEDS}. "
            "Choose one of them, such as 4096."
        )
    return seeds


def signs(pool_key: int, tensor: int, start: int, stop: int, stream: int = SIGN_STREAM) -> Floats:
    """s[start:stop] of one tensor: float32 (stop - start,) of +1 and -1, one bit each."""
    first = start // _SIGNS_PER_CALL
    calls = np.arange(first, -(-stop // _SIGNS_PER_CALL), dtype=np.uint64)
    stored = philox.words(pool_key, tensor, stream, calls).astype("<u4")
    bits = np.unpackbits(stored.reshape(-1).view(np.uint8), bitorder="little")
    skipped = first * _SIGNS_PER_CALL
    return np.float32(1) - np.float32(2) * bits[start - skipped : stop - skipped].astype(np.float32)


def buckets(pool_key: int, tensor: int, start: int, stop: int, seeds: int) -> NDArray[np.int64]:
    """b[start:stop] of one tensor: int64 (stop - start,) in [0, seeds). `seeds` is a power of two."""
    first = start // seeds
    blocks = np.arange(first, -(-stop // seeds), dtype=np.uint64)
    rotation = philox.words(pool_key, tensor, BUCKET_STREAM, blocks)[:, 0].astype(np.int64)
    index = np.arange(start, stop, dtype=np.int64)
    return (rotation[index // seeds - first] + index) & (seeds - 1)


def hadamard_row(k: int, seeds: int) -> Floats:
    """H[k], float32 (seeds,) of +1 and -1: (-1)^popcount(k & b) for b in [0, seeds)."""
    parity = _check_seed(k, seeds) & np.arange(_power_of_two(seeds), dtype=np.int64)
    for shift in (16, 8, 4, 2, 1):  # fold the popcount's parity into bit 0
        parity ^= parity >> shift
    return np.float32(1) - np.float32(2) * (parity & 1).astype(np.float32)


def offsets(coefficients: Floats) -> Floats:
    """y = H a by fast Walsh-Hadamard butterflies, float32 throughout.

    coefficients: float32 (K,), K a power of two. Returns float32 (K,).
    The order is part of the definition: h = 1, 2, 4 .. K/2, each turning every pair (x, z) = (y[j], y[j + h]) into
    (x + z, x - z). Raises UserError where K is no power of two or an offset is not finite.
    """
    pool = _power_of_two(coefficients.size)
    low = 1 << pool.bit_length() // 2
    y = np.asarray(coefficients, dtype=np.float32).reshape(-1, low)
    with np.errstate(over="ignore", invalid="ignore"):  # checked below, with a message
        # The lower half of the stages on the transposed array, where the two of a pair lie far apart as well: numpy is
        # fast along memory alone.
        y = _butterflies(y.T.flatten(), pool // low).reshape(low, -1)
        y = _butterflies(y.T.flatten(), low)
    return _finite(y)


def _butterflies(y: Floats, h: int) -> Floats:
    """The stages h, 2 h .. K/2 of an array (K,), which is overwritten."""
    following = np.empty_like(y)
    while h < y.size:
        pairs, turned = y.reshape(-1, 2, h), following.reshape(-1, 2, h)
        np.add(pairs[:, 0], pairs[:, 1], out=turned[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=turned[:, 1])
        y, following = following, y
        h *= 2
    return y


@lru_cache(maxsize=1)
def normal_quantiles() -> Floats:
    """Q, float32 (65536,), read-only: the standard normal's quantiles at (j + 0.5) / 65536.

    normal_quantiles.bin holds j >= 32768 as little-endian float32; the lower half is Q[65535 - j] = -Q[j]. The file was
    made with mpmath: sqrt(2) * erfinv(2 p - 1) at 120 bits, then rounded once to 24 bits; `statistics.NormalDist`
    rounded to float32 gives the same bytes. It is shipped, not computed, because log differs between C libraries.
    Raises UserError if the file is not the shipped one.
    """
    stored = resources.files("shared").joinpath("normal_quantiles.bin").read_bytes()
    found = hashlib.sha256(stored).hexdigest()
    if found != QUANTILES_SHA256:
        raise UserError(
            f"shared/normal_quantiles.bin has SHA-256 {found}; it must be {QUANTILES_SHA256}. Install kseed again."
        )
    upper = np.frombuffer(stored, dtype="<f4").astype(np.float32)
    table = np.concatenate((-upper[::-1], upper))
    table.flags.writeable = False
    return table


def direction(kind: DirectionKind, pool_key: int, tensor: int, start: int, stop: int, k: int, seeds: int) -> Floats:
    """z_k[start:stop] of one tensor: float32 (stop - start,). k in [0, seeds)."""
    _check_seed(k, seeds)
    if kind == "hadamard":
        row = hadamard_row(k, seeds)
        return signs(pool_key, tensor, start, stop) * row[buckets(pool_key, tensor, start, stop, seeds)]
    if kind == "rademacher":
        return signs(pool_key, tensor, start, stop, RADEMACHER_STREAM + k)
    return _normals(pool_key, tensor, start, stop, GAUSSIAN_STREAM + k)


def displacement(
    kind: DirectionKind,
    pool_key: int,
    tensor: int,
    start: int,
    stop: int,
    coefficients: Floats,
    probe: tuple[int, float | np.float32] | None = None,
) -> Floats:
    """What is added to the base weights start..stop of one tensor: float32 (stop - start,).

    coefficients: float32 (K,), K a power of two. probe: (k, step) adds step * z_k, in the order the module's docstring
    gives; step is rounded to float32 first. Raises UserError where K is no power of two, a seed is outside the pool, or
    coefficients (hadamard: offsets) are not finite.
    """
    out = np.empty(stop - start, dtype=np.float32)
    if kind == "hadamard":
        y = offsets(coefficients)
        if probe is not None:
            y = y + np.float32(probe[1]) * hadamard_row(probe[0], coefficients.size)
        for lower, upper in _chunks(start, stop):
            rotated = y[buckets(pool_key, tensor, lower, upper, coefficients.size)]
            out[lower - start : upper - start] = signs(pool_key, tensor, lower, upper) * rotated
        return out
    terms = [(int(k), coefficients[k]) for k in np.flatnonzero(_finite(coefficients))]
    if probe is not None:
        terms.append((probe[0], np.float32(probe[1])))
    for lower, upper in _chunks(start, stop):
        accumulated = np.zeros(upper - lower, dtype=np.float32)
        for k, amount in terms:
            # Two numpy calls, so that the product is rounded before it is added.
            term = amount * direction(kind, pool_key, tensor, lower, upper, k, coefficients.size)
            accumulated = accumulated + term
        out[lower - start : upper - start] = accumulated
    return out


def add_displacement(base: NDArray[np.generic], dtype: WeightDtype, displaced: Floats) -> NDArray[np.generic]:
    """w = base + displaced, in the storage of `dtype`.

    base: (n,) float32 for fp32, float16 for fp16, uint16 bit patterns for bf16. displaced: float32 (n,).
    Returns a new array of base's dtype and shape.
    """
    expected = np.dtype({"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[dtype])
    if base.dtype != expected or displaced.dtype != np.float32 or base.shape != displaced.shape:
        raise ValueError(f"{dtype} is stored as {expected}; got {base.dtype} {base.shape} and {displaced.dtype}")
    wide = bf16_to_float32(base.astype(np.uint16)) if dtype == "bf16" else base.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is the right rounding of what is too large
        total = wide + displaced
        total[np.isnan(total)] = np.float32(np.nan)
        if dtype == "bf16":
            return float32_to_bf16(total)
        return total.astype(expected)


def bf16_to_float32(patterns: NDArray[np.uint16]) -> Floats:
    """The float32 values of bfloat16 bit patterns; exact. Shapes are kept."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Bit patterns of `values` rounded to nearest even in bfloat16; a NaN becomes 0x7FC0. Shapes are kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def _normals(pool_key: int, tensor: int, start: int, stop: int, stream: int) -> Floats:
    first = start // _NORMALS_PER_CALL
    calls = np.arange(first, -(-stop // _NORMALS_PER_CALL), dtype=np.uint64)
    # Little-endian halves of little-endian words are already in element order.
    halves = philox.words(pool_key, tensor, stream, calls).astype("<u4").reshape(-1).view("<u2")
    skipped = first * _NORMALS_PER_CALL
    normals: Floats = normal_quantiles()[halves[start - skipped : stop - skipped]]
    return normals


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for lower in range(start, stop, _CHUNK):
        yield lower, min(lower + _CHUNK, stop)


def _finite(values: Floats) -> Floats:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise UserError(
            f"the coefficients give {values[bad[0]]} at {bad[0]}; every weight must stay finite. Take an older version "
            "of the model and lower the run's step."
        )
    return values


def _power_of_two(seeds: int) -> int:
    if seeds < 1 or seeds & (seeds - 1):
        raise UserError(f"there are {seeds} coefficients; their number K must be a power of two. Choose another K.")
    return seeds


def _check_seed(k: int, seeds: int) -> int:
    if not 0 <= k < seeds:
        raise UserError(f"seed {k} is outside the pool; a seed is in [0, {seeds}). Choose one inside.")
    return operator.index(k)
