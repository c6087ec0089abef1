"""What happens to a run (events) and what follows from it (actions), as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from aggregator import algorithms
from aggregator.reports import RoundReport
from aggregator.schedule import Fleet
from aggregator.state import Progress
from shared.messages import Change, Plan, Receipt, Run, Snapshot, Update
from shared.refusals import Refusal

# --- events; `now_ms` is the aggregator's clock, unix milliseconds


@dataclass(frozen=True)
class Begin:
    """The message network is there: at the start, and again after every reconnection."""

    now_ms: int


@dataclass(frozen=True)
class UpdateArrived:
    """A device's update, decoded; `payload` is what came."""

    device: str
    update: Update
    payload: bytes
    now_ms: int


@dataclass(frozen=True)
class BadUplink:
    """A device sent something that is no update of this run: undecodable, oversized, retained, another run's."""

    device: str
    refusal: Refusal
    detail: str


@dataclass(frozen=True)
class Tick:
    """Time has passed. The only way it enters."""

    now_ms: int


@dataclass(frozen=True)
class Online:
    """So many devices are online, by their presence."""

    devices: int


@dataclass(frozen=True)
class Pause:
    """The operator wants no work done for now."""

    now_ms: int
    reason: str


@dataclass(frozen=True)
class Resume:
    """The operator wants the run to go on."""

    now_ms: int


@dataclass(frozen=True)
class Stop:
    """The operator wants the run to end, for good."""

    now_ms: int
    reason: str


Event = Union[Begin, UpdateArrived, BadUplink, Tick, Online, Pause, Resume, Stop]


# --- actions: first everything to keep, in one transaction, then everything to send, in order


@dataclass(frozen=True)
class KeepUpdate:
    """Commit an accepted update. The key is (round, device): the round that it was made for."""

    round: int
    device: str
    payload: bytes
    received_at_ms: int
    counted_in: int  # the round whose closing combines it; later than `round` for a late update


@dataclass(frozen=True)
class KeepVersion:
    """Commit a version of the coefficients (K little-endian float32), and all that the next round starts from."""

    version: int
    coefficients: bytes
    carried: bytes  # what changes left over so far, likewise
    change: Change | None  # from the version before
    algorithm_state: algorithms.State
    fleet: Fleet
    report: RoundReport
    plan: Plan  # of the round that closed, as it stood then


@dataclass(frozen=True)
class KeepProgress:
    """Commit where the run stands."""

    progress: Progress


@dataclass(frozen=True)
class Note:
    """Commit a sentence for people, and log it."""

    text: str


@dataclass(frozen=True)
class SendReceipt:
    """Tell one device."""

    device: str
    receipt: Receipt


@dataclass(frozen=True)
class Publish:
    """Tell all devices, retained."""

    message: Run | Plan | Snapshot


Keep = Union[KeepUpdate, KeepVersion, KeepProgress, Note]
Send = Union[SendReceipt, Publish]
Action = Union[Keep, Send]
