"""What the agent's state machine is told, and what it asks for. Values only (`session` decides, `state` remembers).

Times: `now_s` is a monotonic clock in seconds, `unix_ms` the wall clock in milliseconds. Both arrive with Tick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from shared.errors import PeerError
from shared.manifest import Manifest
from shared.messages import Message, Plan, Run, Update
from shared.refusals import Refusal
from shared.topics import Kind, Topic
from shared.transport import Connected, Disconnected

EXIT_LEFT, EXIT_USER, EXIT_PEER, EXIT_UNAVAILABLE = 0, 2, 3, 4  # as in shared.errors


@dataclass(frozen=True)
class Kept:
    """An update that must survive this process, and the nonce of the plan it was made for, which no other run has."""

    nonce: bytes
    update: Update


@dataclass(frozen=True)
class Begun:
    """The round whose local steps an earlier life of this agent began last."""

    round: int
    nonce: bytes


# Events: from the network, then from the device itself.


@dataclass(frozen=True)
class Heard:
    """A message that decoded."""

    topic: Topic
    message: Message
    is_retained: bool


@dataclass(frozen=True)
class Garbled:
    """A payload that did not decode; `version` is its first byte, None where it has none."""

    topic: str
    error: PeerError
    version: int | None


@dataclass(frozen=True)
class ModelReady:
    """The model is loaded; what it is, for the comparison with the run."""

    manifest: Manifest
    base_digest: bytes  # SHA-256, 32 bytes
    data_digest: bytes = b""  # of the examples; b"": not known


@dataclass(frozen=True)
class Rebuilt:
    """The overlay holds the coefficients of `version`."""

    version: int
    digest: bytes  # first 16 bytes of the model digest


@dataclass(frozen=True)
class Trained:
    """The local steps of a round are done."""

    update: Update


@dataclass(frozen=True)
class TrainingFailed:
    """The local steps of a round ended without an update, for example at a NaN loss."""

    round: int
    reason: str


@dataclass(frozen=True)
class Evaluated:
    """The held-out split was evaluated on `version` (asked for with Evaluate only)."""

    version: int


@dataclass(frozen=True)
class GateChanged:
    """Why the device may not work now; None: it may."""

    reason: str | None
    is_quiet: bool = False  # the day's bytes are spent: nothing is sent twice


@dataclass(frozen=True)
class Tick:
    """Time passed."""

    now_s: float
    unix_ms: int


@dataclass(frozen=True)
class Broken:
    """Model or data turned out to be unusable; nothing can be done here without the owner."""

    exit_code: int
    text: str


@dataclass(frozen=True)
class Leave:
    """The owner wants the agent to stop."""


@dataclass(frozen=True)
class LeaveAfterRound:
    """The owner wants the agent to stop when the round under way is finished and sent, or no longer wants it."""

    is_wanted: bool


@dataclass(frozen=True)
class Taken:
    """The broker has the latest publication of this kind (update or presence)."""

    kind: Kind


@dataclass(frozen=True)
class NotTaken:
    """The broker refused a publication; `kind` where it was the latest update or presence."""

    kind: Kind | None
    reason: str


NetworkEvent = Union[Connected, Disconnected, Taken, NotTaken, Heard, Garbled]
DeviceEvent = Union[
    ModelReady, Rebuilt, Trained, TrainingFailed, Evaluated, GateChanged, Tick, Broken, Leave, LeaveAfterRound
]
Event = Union[NetworkEvent, DeviceEvent]


# Actions.


@dataclass(frozen=True)
class Subscribe:
    topic: Topic


@dataclass(frozen=True)
class Unsubscribe:
    topic: Topic


@dataclass(frozen=True)
class Publish:
    topic: Topic
    message: Message
    retain: bool = False


@dataclass(frozen=True)
class LoadModel:
    """Load the base model in the run's dtype, then answer ModelReady."""

    run: Run


@dataclass(frozen=True)
class Rebuild:
    """Set the overlay to these coefficients (K float32, little-endian), then answer Rebuilt."""

    version: int
    coefficients: bytes


@dataclass(frozen=True)
class Train:
    """Begin the local steps of `plan` from the rebuilt model; answer Trained or TrainingFailed.

    `model_digest` (16 bytes) goes into the update.
    """

    plan: Plan
    model_digest: bytes


@dataclass(frozen=True)
class Conclude:
    """The deadline is near: end the local steps here and answer with what there is."""


@dataclass(frozen=True)
class Abandon:
    """Drop the local steps (or the evaluation) under way; answer nothing."""


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the rebuilt model on the held-out split, then answer Evaluated."""

    version: int


@dataclass(frozen=True)
class Keep:
    """Write the update down before anything is sent."""

    kept: Kept


@dataclass(frozen=True)
class Forget:
    """The update written down is settled, or its round is over."""


@dataclass(frozen=True)
class Refused:
    """The update of this round counts for nothing, and never will."""

    round: int


@dataclass(frozen=True)
class CloseRound:
    """A round is over for this device: write its metrics."""

    round: int
    receipt: Refusal | None  # the last one for this round's update


@dataclass(frozen=True)
class Say:
    """A line for people."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Finish:
    """The agent's life is over; nothing follows."""

    exit_code: int
    text: str
    is_taken: bool = False  # another agent has this id now, and the presence topic with it


Outboxed = Union[Keep, Forget]
ModelAction = Union[LoadModel, Rebuild, Train, Conclude, Abandon, Evaluate]
Action = Union[Subscribe, Unsubscribe, Publish, ModelAction, Outboxed, Refused, CloseRound, Say, Finish]
