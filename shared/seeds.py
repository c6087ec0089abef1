"""Who takes part in a round and which seed each step draws: functions of the plan, so neither has to travel.

The device and the aggregator compute the same seeds from (plan nonce, device id, published levels), so no peer can
choose its own.
"""

from __future__ import annotations

import hashlib
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shared import philox
from shared.directions import check_seed_count
from shared.errors import PeerError
from shared.messages import Everyone, Participation, Threshold
from shared.refusals import Refusal

DRAW_STREAM = 0x0300_0000
TOP_LEVEL = 255


def draw_key(nonce: bytes, device: str | None) -> int:
    """The u64 key of one device's draws: the first 8 bytes, little-endian, of SHA-256(nonce + device id in ASCII).

    `device` None (the plan's common_seeds): the id is left out, so every device has the same key.
    """
    name = b"" if device is None else device.encode("ascii")
    return int.from_bytes(hashlib.sha256(nonce + name).digest()[:8], "little")


def draw(nonce: bytes, device: str | None, steps: int, seeds: int, levels: bytes | None) -> NDArray[np.int64]:
    """The seeds of a device's local steps 0 .. steps-1: int64 (steps,) in [0, seeds).

    Step j uses the words of Philox(counter = [j, 0, 0, 0x0300_0000], key of `draw_key`).
    Uniform (`levels` None): word 0 mod K.
    By significance: weights t[q] of the K levels (`level_weights`), c their cumulative sum, u = word 0 + 2^32 word 1,
    r = (u * c[K-1]) div 2^64; the seed is the first k with r < c[k].
    Raises UserError if `seeds` is no possible K, PeerError if `levels` has not K bytes.
    """
    check_seed_count(seeds)
    drawn = philox.words(draw_key(nonce, device), 0, DRAW_STREAM, np.arange(steps, dtype=np.uint64))
    if levels is None:
        return drawn[:, 0].astype(np.int64) & (seeds - 1)
    if len(levels) != seeds:
        raise PeerError(Refusal.MALFORMED, f"the plan has {len(levels)} significance levels, the run {seeds} seeds")
    cumulative = np.cumsum(level_weights()[np.frombuffer(levels, dtype=np.uint8)])
    total = int(cumulative[-1])
    # Python integers: the product takes up to 98 bits.
    ranks = [((low + (high << 32)) * total) >> 64 for low, high in drawn[:, :2].tolist()]
    return np.searchsorted(cumulative, np.array(ranks, dtype=np.int64), side="right").astype(np.int64)


def rounding_noise(nonce: bytes, device: str | None, steps: int) -> NDArray[np.uint32]:
    """One u32 per local step, uint32 (steps,): word 2 of what `draw` draws the seed from."""
    drawn = philox.words(draw_key(nonce, device), 0, DRAW_STREAM, np.arange(steps, dtype=np.uint64))
    return drawn[:, 2].astype(np.uint32)


def takes_part(participation: Participation, nonce: bytes, device: str) -> bool:
    """True when the plan with that nonce selects the device.

    The hash of a threshold is the first 4 bytes, little-endian, of SHA-256(nonce + "/" + device id in ASCII).
    """
    if isinstance(participation, Everyone):
        return True
    if isinstance(participation, Threshold):
        hashed = hashlib.sha256(nonce + b"/" + device.encode("ascii")).digest()
        return int.from_bytes(hashed[:4], "little") < participation.below
    return device in participation.devices


@lru_cache(maxsize=1)
def level_weights() -> NDArray[np.int64]:
    """t[q] = 65536 * exp(q / 255) rounded to an integer, int64 (256,), read-only.

    A seed of level q is drawn with probability t[q] / (sum of t over all seeds): FedKSeed-Pro's softmax of min-max
    scaled significance (section 4.3), with the significance in 255 steps. Decimal's exp is correctly rounded, which
    the C library's is not.
    """
    context = Context(prec=40, rounding=ROUND_HALF_EVEN)
    exact = [context.multiply(context.exp(context.divide(Decimal(q), Decimal(TOP_LEVEL))), 65536) for q in range(256)]
    weights = np.array([int(value.to_integral_value(ROUND_HALF_EVEN)) for value in exact], dtype=np.int64)
    weights.flags.writeable = False
    return weights


def significance_levels(mean_abs: NDArray[np.float64]) -> bytes:
    """Levels 0..255 of the seeds' mean |scalar|, min-max scaled and rounded half up; all 0 where all are equal.

    mean_abs: float64 (K,), finite, not negative. Returns K bytes. Raises ValueError where it is empty or not finite.
    """
    values = np.asarray(mean_abs, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("the mean |scalar| of every seed must be finite, and there must be at least one seed")
    lowest, highest = values.min(), values.max()
    if lowest == highest:
        return bytes(values.size)
    scaled = (values - lowest) / (highest - lowest)
    return bytes(np.floor(scaled * TOP_LEVEL + 0.5).astype(np.uint8))
