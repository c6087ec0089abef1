"""Every message of the protocol as a frozen value (PROTOCOL.md, section "Messages").

Each struct is encoded as a msgpack array in field order behind a two-byte header (`shared.wire`).
Arrays of numbers travel as little-endian bytes; `shared.wire` turns them into numpy arrays and checks them.
"""

from __future__ import annotations

from typing import Literal, Union

import msgspec

NumberFormat = Literal["f32", "f16", "f8"]  # PROTOCOL.md section 5.7
WeightDtype = Literal["bf16", "fp16", "fp32"]
DirectionKind = Literal["hadamard", "rademacher", "gaussian"]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Run(_Message, frozen=True):
    """What a run is, for its whole life. Aggregator -> devices, retained.

    An agent joins only if its own model gives the same `manifest_digest` and `base_digest`.
    """

    run: str  # id, [a-z0-9-]
    model: str  # hub id or name, a hint for people and for loading
    dtype: WeightDtype  # of the tuned weights on every device
    directions: DirectionKind
    seeds: int  # K, power of two, 256..65536
    pool_key: int  # u64, key of the directions
    manifest: bytes  # zlib of the manifest's canonical text
    manifest_digest: bytes  # SHA-256 of the canonical text, 32 bytes
    base_digest: bytes  # SHA-256 of the base weights in `dtype`, 32 bytes
    scalar_format: NumberFormat  # of the numbers in updates
    change_format: NumberFormat  # of the numbers in plans' changes
    first_order: bool  # True: updates that carry a change in place of scalars are welcome


class PlainStep(msgspec.Struct, frozen=True, array_like=True, tag="plain", forbid_unknown_fields=True):
    """The paper's rule: a[k] -= lr * g (FedKSeed, eq. 4)."""

    lr: float


class NormalisedStep(msgspec.Struct, frozen=True, array_like=True, tag="normalised", forbid_unknown_fields=True):
    """a[k] -= step_rms * clip(g / running_rms(g), -clip, clip) (PROTOCOL.md section 9.7)."""

    step_rms: float  # RMS change of a weight per step, in weight units
    clip: float  # in running RMS of the scalars
    decay: float  # of the running mean square, per step, in [0, 1)
    prior_mean_square: float  # running mean square of the fleet's scalars before this round; 0 with prior_count 0
    prior_count: int  # how many steps the prior stands for, 0 at the start of a run


StepRule = Union[PlainStep, NormalisedStep]


class Everyone(msgspec.Struct, frozen=True, array_like=True, tag="everyone", forbid_unknown_fields=True):
    """Every device takes part."""


class Threshold(msgspec.Struct, frozen=True, array_like=True, tag="threshold", forbid_unknown_fields=True):
    """A device takes part if the hash of (nonce, device id), 0 <= hash < 2**32, is below `below`."""

    below: int


class Listed(msgspec.Struct, frozen=True, array_like=True, tag="listed", forbid_unknown_fields=True):
    """The named devices take part."""

    devices: tuple[str, ...]


Participation = Union[Everyone, Threshold, Listed]


class Change(_Message, frozen=True):
    """What is added to some or all coefficients; inside other messages (`shared.changes` writes and reads it)."""

    seeds: bytes | None  # n uint16, little-endian, strictly increasing; None: all K, or those known without saying
    exponent: int  # a number x below stands for x * 2**exponent
    values: bytes  # n numbers in the format that the run states


class Plan(_Message, frozen=True):
    """What to do in the current round. Aggregator -> devices, retained.

    Round r trains from model version r; closing round r publishes version r + 1.
    """

    round: int
    phase: Literal["open", "paused", "finished"]
    nonce: bytes  # 16 bytes, fresh per round
    local_steps: int
    one_sided: int  # 0: both sides of each direction. n: groups of n directions, one batch, one side (section 9.8)
    batch_size: int
    eps: float
    step: StepRule
    participation: Participation
    common_seeds: bool  # True: every device draws the same seeds this round
    levels: bytes | None  # None: uniform seeds. K bytes: significance level per seed (FedKSeed-Pro)
    evaluate: bool  # ask for held-out loss of version `round`
    published_at_ms: int  # aggregator's clock, unix milliseconds
    deadline_s: float  # from publication
    reason: str  # why paused or finished, for people
    change: Change | None  # what turns version `round - 1` into `round`; None: take the snapshot


def forwards_of(plan: Plan) -> int:
    """How many forward passes over a batch the plan's local steps take: one per loss that is measured."""
    return plan.local_steps if plan.one_sided else 2 * plan.local_steps


class Snapshot(_Message, frozen=True):
    """All coefficients of one model version. Aggregator -> devices, retained."""

    version: int
    coefficients: bytes  # K float32, little-endian


class Update(_Message, frozen=True):
    """A device's work of one round. Device -> aggregator. Run and device stand in the topic."""

    round: int
    samples: int  # training examples on the device, its weight
    train_loss: float  # mean of the losses that the steps measured, nats per token
    held_out_loss: float | None  # of version `round`, nats per token
    held_out_accuracy: float | None  # in [0, 1]; None where the task has no labels
    model_digest: bytes  # first 16 bytes of the digest of the weights rebuilt for version `round`
    scalars: bytes  # projected gradients in step order, `scalar_format` of the run; empty where there is a change
    change: Change | None  # a first-order device's work, in place of scalars


class Receipt(_Message, frozen=True):
    """What became of an update. Aggregator -> one device."""

    round: int
    code: int
    detail: str  # "" where the code's sentence says it all


class Presence(_Message, frozen=True):
    """Whether a device is there. Device -> everyone, retained; the offline one is also the will."""

    online: bool
    session: int  # u64, random per agent process
    protocol_min: int
    protocol_max: int
    agent: str  # software and version
    note: str  # why paused, "" when at work


Message = Union[Run, Plan, Snapshot, Update, Receipt, Presence]
