"""What the agent's state machine remembers: frozen values, so that states compare (`session` decides)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from edge_client.events import Action, Begun, Kept
from shared.messages import Plan, Run, Update
from shared.refusals import Refusal


@dataclass(frozen=True)
class Limits:
    """How long the agent waits for what. All in seconds; None: for ever."""

    connect_timeout_s: float | None = 30.0  # for the first connection
    run_timeout_s: float | None = 15.0  # for the run message, once connected
    resend_s: float = 20.0  # first repetition of an update without a receipt; doubles
    resend_max_s: float = 320.0
    refetch_s: float = 20.0  # first repetition of the request for a snapshot; doubles
    refetch_max_s: float = 640.0
    greeting_s: float = 5.0  # for what is retained to arrive after a connection
    restate_s: float = 5.0  # between two answers to somebody who says something else of this device
    overdue_s: float = 30.0  # past the deadline without a word: ask for the plan again; doubles
    overdue_max_s: float = 3600.0
    conclude_share: float = 0.9  # of the time to the deadline; then a slow device sends what it has
    waits_after_end: bool = False  # a run that is finished when the agent comes may go on one day


@dataclass(frozen=True)
class Identity:
    """Who this agent is, for its whole life."""

    run: str
    device: str
    session: int  # u64, random per process
    agent: str  # software and version
    broker: str  # for messages to people
    limits: Limits = Limits()


@dataclass(frozen=True)
class Held:
    """Coefficients of a model version, known but not necessarily in the overlay."""

    version: int
    coefficients: bytes  # K float32, little-endian


@dataclass(frozen=True)
class Waiting:
    """Nothing of the current plan is under way (no plan, paused, or a newer plan must come)."""


@dataclass(frozen=True)
class Fetching:
    """The snapshot is subscribed to."""

    due_s: float  # ask again then
    interval_s: float


@dataclass(frozen=True)
class Rebuilding:
    version: int


@dataclass(frozen=True)
class Training:
    conclude_s: float | None  # when to send what there is; None: the deadline is not known or past


@dataclass(frozen=True)
class Evaluating:
    version: int


@dataclass(frozen=True)
class Sending:
    """An update waits for its receipt. It is all that must survive a restart (`waiting`)."""

    update: Update
    due_s: float
    interval_s: float
    is_underway: bool = False  # given to the transport, which repeats it until the broker has it
    is_taken: bool = False  # the broker has had it


@dataclass(frozen=True)
class Settled:
    """Nothing more to do in this round."""

    is_selected: bool = True  # False: the plan does not select this device, which an extension may change


Work = Union[Waiting, Fetching, Rebuilding, Training, Evaluating, Sending, Settled]


@dataclass(frozen=True)
class Link:
    """The connection to the broker."""

    is_connected: bool = False
    connects: int = 0
    connected_s: float = 0.0  # of the last connection
    trouble: str = ""  # last reason of a disconnection, said once
    is_announcing: bool = False  # a presence is given to the transport, which repeats it until the broker has it
    must_announce: bool = False  # another one is to follow
    announce_s: float = 0.0  # at the latest then
    restated_s: float = float("-inf")  # when somebody else's word on the topic was, or will be, answered


@dataclass(frozen=True)
class Sessions:
    """What the own presence topic showed, to tell a predecessor that died from a second agent that lives."""

    has_echo: bool = False  # our own message came back: whatever was queued or retained from before is behind us
    predecessors: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Patience:
    """When to ask again for the run or, once that is known, for the plan."""

    due_s: float | None = None
    interval_s: float = 0.0


ModelStage = Literal["none", "loading", "ready"]


@dataclass(frozen=True)
class State:
    """All the agent's protocol knows. Equal states behave alike."""

    identity: Identity
    started_s: float
    now_s: float
    unix_ms: int
    link: Link = Link()
    sessions: Sessions = Sessions()
    run: Run | None = None
    model: ModelStage = "none"
    plan: Plan | None = None
    patience: Patience = Patience()
    conclude_s: float | None = None  # of the current plan
    held: Held | None = None
    kept: Kept | None = None  # from an earlier life of this agent, until a plan shows whether it still counts
    begun: Begun | None = None  # by an earlier life of this agent
    work: Work = Waiting()
    receipt: Refusal | None = None  # last one in this round
    accepted: int | None = None  # the last round whose update counts
    suspect_from: int | None = None  # after DIVERGED: first round whose update is built on a fresh snapshot
    pause: str | None = None  # the gate's reason
    is_quiet: bool = False  # the day's bytes are spent
    has_grumbled: bool = False  # said that the run has no plan
    is_leaving: bool = False  # when the round under way is finished and sent
    is_finished: bool = False


Step = tuple[State, tuple[Action, ...]]


def goes_on(state: State) -> bool:
    """Whether the plan's round is one that an earlier life of this agent began, and is not over."""
    begun, plan = state.begun, state.plan
    if begun is None or plan is None or isinstance(state.work, Settled):
        return False
    return (begun.round, begun.nonce) == (plan.round, plan.nonce) and plan.phase != "finished"


def waiting(state: State) -> Kept | None:
    """The update without a receipt: what the outbox must hold whenever something is sent."""
    if isinstance(state.work, Sending) and state.plan is not None:
        return Kept(state.plan.nonce, state.work.update)
    return state.kept
