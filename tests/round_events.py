"""What may happen to a run, for hypothesis: its settings, and updates good and odd. And states that compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import hypothesis.strategies as st
import msgspec
import numpy as np

DEVICES = ("ann", "bob", "cas", "dan", "eve")
MODEL, OTHER, THIRD = b"m" * 16, b"x" * 16, b"y" * 16
NAN, INF = math.nan, math.inf

groups = st.sampled_from([(3, 0), (3, 3), (1, 0)]).map(lambda pair: {"local_steps": pair[0], "one_sided": pair[1]})
steps_and_kinds = st.sampled_from([("plain", "refuse"), ("normalised", "refuse"), ("normalised", "accept")]).map(
    lambda pair: {"step": pair[0], "first_order": pair[1]}
)
configurations = st.fixed_dictionaries(
    {
        "seeds": st.just(256),
        "rounds": st.sampled_from([30, 30, 30, 4]),
        "scalar_format": st.sampled_from(["f32", "f16", "f8"]),
        "change_format": st.sampled_from(["f32", "f16", "f8"]),
        "lr": st.just(0.5),
        "clip": st.sampled_from([3.0, 0.5]),
        "decay": st.sampled_from([0.0, 0.9]),
        "algorithm": st.sampled_from(["fedkseed", "fedkseed-pro"]),
        "weighting": st.sampled_from(["samples", "equal"]),
        "server_scale": st.sampled_from(["mean", "sqrt", "sum"]),
        "promise_limit": st.sampled_from([0.0, 1.0, 0.01]),
        "common_seeds": st.booleans(),
        "evaluate_every": st.integers(0, 2),
        "deadline_s": st.just(60.0),
        "max_samples": st.just(100),
        "late": st.sampled_from(["fold", "refuse"]),
        "max_staleness": st.integers(1, 3),
    }
)
leasts = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 1), (4, 3)]).map(
    lambda pair: {"quorum": pair[0], "min_updates": pair[1]}
)
selections = st.sampled_from([{}, {}, {}, {"participation": 0.4}, {"devices": ("ann", "bob", "cas", "dan")}])
numbers = st.sampled_from([0.0, -0.0, 1.0, -2.5, 7.25, 1 / 3, 1500.0, 65504.0, 1e-7, 3e38, -3e38, 1e-45])
losses = st.sampled_from([2.0, 3.0, 1.0, 2.5, -1.0, 9.0, None])
# Seeds, exponent and numbers of a change; seeds None: all. Most are short enough for the step rule.
few = st.lists(st.integers(0, 255), min_size=0, max_size=4, unique=True).map(sorted)
moves = few.flatmap(
    lambda seeds: st.tuples(
        st.just(seeds),
        st.sampled_from([-12, -12, -14, -160, 0]),
        st.lists(st.sampled_from([1.0, -2.5, 7.25, 1 / 3, 0.0]), min_size=len(seeds), max_size=len(seeds)),
    )
) | st.just((None, -16, [0.5, -1.0, 0.25, 1 / 3] * 64))
odd_moves = st.sampled_from([([5, 4], 0, [1.0, 1.0]), ([256], -12, [1.0]), ([1], -12, []), ([1], 127, [7.25])])
fields = st.fixed_dictionaries(
    {
        "device": st.sampled_from(DEVICES),
        "samples": st.sampled_from([1, 10, 10, 33, 100, 101, 0, 2**32 - 1]),
        "train_loss": st.sampled_from([2.0, 2.0, 2.0, 0.0, 1.7e308, -1.7e308, NAN, INF]),
        "held_out_loss": losses,
        "held_out_accuracy": st.sampled_from([None, None, 0.5, NAN]),
        "digest": st.sampled_from([MODEL] * 5 + [OTHER, THIRD]),
        "numbers": st.lists(numbers, min_size=1, max_size=3),
        "moves": st.none() | moves | odd_moves,
    }
)
good = st.fixed_dictionaries(
    {
        "is_good": st.just(True),
        "device": st.sampled_from(DEVICES),
        "samples": st.integers(1, 100),
        "train_loss": st.sampled_from([2.0, 1.7e308, -1.7e308]),
        "held_out_loss": losses,
        "held_out_accuracy": st.none(),
        "digest": st.sampled_from([MODEL] * 8 + [OTHER]),
        "numbers": st.lists(st.sampled_from([1.0, -2.5, 7.25, 1 / 3, 0.0]), min_size=1, max_size=3),
        "moves": st.none() | moves,
    }
)
rounds_of_updates = st.lists(good, min_size=1, max_size=5, unique_by=lambda update: update["device"])


def frozen(value):
    """Everything that a value is, to the bit, in a form that compares and cannot change."""
    if isinstance(value, msgspec.Struct):
        return type(value).__name__, tuple(frozen(getattr(value, name)) for name in value.__struct_fields__)
    if dataclasses.is_dataclass(value):
        return type(value).__name__, tuple(frozen(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return tuple(sorted((repr(name), frozen(item)) for name, item in value.items()))
    if isinstance(value, (tuple, list)):
        return tuple(map(frozen, value))
    return value.hex() if isinstance(value, float) else value
