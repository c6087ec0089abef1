"""The agent's side of the protocol as a pure function: `step(state, event) -> (state, actions)`. No I/O, no torch.

Rules, in the order in which they bind:
1. A message that does not decode, does not fit the run or is out of place changes nothing; it may leave a line.
2. The newest plan is followed; work for an older one is dropped.
3. An update is sent until a receipt settles it or the plan moves on.
4. An update without a receipt is in the outbox before it is sent (`state.waiting`), and in no other case.
5. Whoever shares this device's id ends this agent: two agents would take each other's connection for ever.

`following` turns plans into work, `delivery` sends updates, `events` names everything.
"""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import assert_never

from edge_client.delivery import on_receipt, on_trained, on_training_failed, send_if_due, send_now
from edge_client.events import (
    EXIT_UNAVAILABLE,
    EXIT_USER,
    Action,
    Begun,
    Broken,
    CloseRound,
    DeviceEvent,
    Evaluated,
    Event,
    Finish,
    Forget,
    Garbled,
    GateChanged,
    Heard,
    Keep,
    Kept,
    Leave,
    LeaveAfterRound,
    ModelReady,
    NetworkEvent,
    NotTaken,
    Publish,
    Rebuilt,
    Say,
    Subscribe,
    Taken,
    Tick,
    Trained,
    TrainingFailed,
)
from edge_client.following import (
    begin,
    ignored,
    on_evaluated,
    on_plan,
    on_rebuilt,
    on_snapshot,
    on_time,
)
from edge_client.joining import on_garbled, on_model_ready, on_run
from edge_client.leaving import leave_when_done, on_leave, on_leave_after_round
from edge_client.presence import announce, on_presence, presence, taken
from edge_client.state import Evaluating, Identity, Patience, Sending, State, Step, Training, waiting
from shared.errors import PeerError
from shared.messages import Plan, Presence, Receipt, Run, Snapshot, Update
from shared.refusals import Refusal
from shared.topics import Kind, Topic
from shared.transport import TAKEN_OVER, Connected, Disconnected
from shared.wire import encode


def start(
    identity: Identity, now_s: float, unix_ms: int, kept: Kept | None = None, begun: Begun | None = None
) -> State:
    """The state of an agent that has not connected yet. kept, begun: the update and the round an earlier life left."""
    return State(identity, started_s=now_s, now_s=now_s, unix_ms=unix_ms, kept=kept, begun=begun)


def step(state: State, event: Event) -> Step:
    """What the agent knows after `event`, and what it does about it, in order. Nothing follows a Finish."""
    if state.is_finished:
        return state, ()
    before = waiting(state)
    match event:
        case Connected() | Disconnected() | Taken() | NotTaken() | Heard() | Garbled():
            state, actions = _on_network(state, event)
        case _:
            state, actions = _on_device(state, event)
    actions = leave_when_done(state, actions)
    if (after := waiting(state)) != before:
        actions = (Forget() if after is None else Keep(after), *actions)
    for number, action in enumerate(actions):
        if isinstance(action, Finish):
            return replace(state, is_finished=True), (*_farewell(state, actions[:number], action), action)
    return state, actions


def will(identity: Identity) -> tuple[str, bytes]:
    """What the broker publishes, retained, where the agent goes without goodbye: topic and payload."""
    return str(Topic(identity.run, "presence", identity.device)), encode(
        presence(start(identity, 0.0, 0), online=False)
    )


def may_step(state: State) -> bool:
    """True where the next local step (or held-out batch) may start: the device's gate and the run are both open."""
    if state.pause is not None or state.is_finished or state.plan is None:
        return False
    return isinstance(state.work, Evaluating) or (isinstance(state.work, Training) and state.plan.phase == "open")


def _on_network(state: State, event: NetworkEvent) -> Step:
    match event:
        case Connected():
            return _on_connected(state, event)
        case Disconnected():
            return _on_disconnected(state, event)
        case Taken(kind):
            return _on_taken(state, kind)
        case NotTaken(kind, reason):
            state, _ = _on_taken(state, kind)
            return state, (Say(f"the broker did not take a message: {reason}", is_warning=True),)
        case Heard():
            return _on_heard(state, event)
        case Garbled():
            return on_garbled(state, event)
        case _:
            assert_never(event)


def _on_device(state: State, event: DeviceEvent) -> Step:
    match event:
        case Tick():
            return _on_tick(state, event)
        case ModelReady():
            return on_model_ready(state, event)
        case Rebuilt():
            return on_rebuilt(state, event)
        case Trained():
            return on_trained(state, event)
        case TrainingFailed():
            return on_training_failed(state, event)
        case Evaluated():
            return on_evaluated(state, event)
        case GateChanged():
            return _on_gate(state, event)
        case Broken(exit_code, text):
            return state, (Finish(exit_code, text),)
        case Leave():
            return on_leave(state)
        case LeaveAfterRound():
            return on_leave_after_round(state, event)
        case _:
            assert_never(event)


def _topic(state: State, kind: Kind) -> Topic:
    per_device = kind in ("update", "receipt", "presence")
    return Topic(state.identity.run, kind, state.identity.device if per_device else None)


def _farewell(state: State, actions: tuple[Action, ...], finish: Finish) -> tuple[Action, ...]:
    """`actions`, the metrics of the round under way, and the offline presence unless the topic is another agent's."""
    plan = state.plan
    if plan is not None and state.model == "ready" and not any(isinstance(action, CloseRound) for action in actions):
        actions += (CloseRound(plan.round, state.receipt),)
    if not state.link.is_connected or finish.is_taken:
        return actions
    return (*actions, Publish(_topic(state, "presence"), presence(state, online=False), retain=True))


# The connection.


def _on_connected(state: State, event: Connected) -> Step:
    """First look at the own presence: what is retained there tells who else was here. Then announce, then the rest.

    A broker need not tell an agent that another one took its connection (mosquitto 2.0.11 only breaks it), so after a
    reconnection nothing is announced until the retained presence has shown that it is still this agent's.
    """
    greeting_s = state.identity.limits.greeting_s
    link = replace(
        state.link,
        is_connected=True,
        connects=state.link.connects + 1,
        connected_s=state.now_s,
    )
    look = Subscribe(_topic(state, "presence"))
    if link.connects > 1:
        waiting = replace(link, must_announce=True, announce_s=state.now_s + greeting_s)
        state, sent = send_now(replace(state, link=waiting))
        return state, (Say(f"connected again ({event.protocol})"), look, *sent)
    rest: tuple[Kind, ...] = ("run", "plan", "receipt")
    subscriptions = tuple(Subscribe(_topic(state, kind)) for kind in rest)
    said = Say(f"connected to {state.identity.broker} ({event.protocol}) as {state.identity.device}")
    patience = Patience(state.now_s + greeting_s, 2 * greeting_s)
    state, announced = announce(replace(state, link=link, patience=patience))
    return state, (said, look, *announced, *subscriptions)


def _on_taken(state: State, kind: Kind | None) -> Step:
    """The broker has dealt with a publication."""
    if kind == "update" and isinstance(state.work, Sending):
        return replace(state, work=replace(state.work, is_underway=False, is_taken=True)), ()
    if kind != "presence":
        return state, ()
    state = replace(state, link=replace(state.link, is_announcing=False))
    is_due = state.link.must_announce and state.now_s >= state.link.announce_s
    return announce(state) if is_due else (state, ())


def _on_disconnected(state: State, event: Disconnected) -> Step:
    lost = replace(state, link=replace(state.link, is_connected=False, trouble=event.reason))
    if event.reason == TAKEN_OVER:
        return lost, (taken(state, "it took over the connection"),)
    if event.is_final:
        return lost, (Finish(EXIT_UNAVAILABLE, f"broker {state.identity.broker}: {event.reason}"),)
    if not state.link.is_connected and event.reason == state.link.trouble:
        return lost, ()  # said before
    what = "lost the connection to" if state.link.is_connected else "cannot connect to"
    return lost, (Say(f"{what} broker {state.identity.broker}: {event.reason}; trying again", is_warning=True),)


# Messages.


def _on_heard(state: State, event: Heard) -> Step:
    message, topic = event.message, event.topic
    if topic.run != state.identity.run or topic.device not in (None, state.identity.device):
        return ignored(state, str(topic), PeerError(Refusal.WRONG_KIND, "it is not addressed to this agent"))
    match message:
        case Run():
            return on_run(state, message)
        case Plan():
            return on_plan(state, message, is_retained=event.is_retained)
        case Snapshot():
            return on_snapshot(state, message)
        case Receipt():
            return on_receipt(state, message)
        case Presence():
            return on_presence(state, message)
        case Update():
            return ignored(state, str(topic), PeerError(Refusal.WRONG_KIND, "devices take no updates"))
        case _:
            assert_never(message)


# Time, gate, leaving.


def _on_tick(state: State, event: Tick) -> Step:
    state = replace(state, now_s=event.now_s, unix_ms=event.unix_ms)
    state, missing = _on_silence(state)
    if missing:
        return state, missing
    state, first = on_time(state)
    state, second = send_if_due(state)
    link = state.link
    is_due = link.must_announce and link.is_connected and not link.is_announcing and event.now_s >= link.announce_s
    state, third = announce(state) if is_due else (state, ())
    return state, first + second + third


def _on_silence(state: State) -> Step:
    """What is missing to begin with, said once or, where the owner set a limit, the end."""
    limits, link, broker = state.identity.limits, state.link, state.identity.broker
    if link.connects == 0:
        if limits.connect_timeout_s is None or state.now_s - state.started_s < limits.connect_timeout_s:
            return state, ()
        why = f": {link.trouble}" if link.trouble else ""
        text = f"no connection to broker {broker} in {limits.connect_timeout_s:g} s{why}"
        return state, (Finish(EXIT_UNAVAILABLE, f"{text}. Check the address, or wait for it with --wait."),)
    patience_s = limits.run_timeout_s if limits.run_timeout_s is not None else limits.overdue_s
    if not link.is_connected or state.now_s - link.connected_s < patience_s:
        return state, ()
    run = state.identity.run
    if state.run is None and limits.run_timeout_s is not None:
        text = f"broker {broker} has no run {run!r} (waited {patience_s:g} s)"
        return state, (Finish(EXIT_USER, f"{text}. Check the name, or wait for it with --wait."),)
    if state.plan is not None or state.has_grumbled:
        return state, ()
    what = f"broker {broker} has no run {run!r} yet" if state.run is None else f"run {run!r} has no plan yet"
    return replace(state, has_grumbled=True), (Say(f"{what}; waiting for its aggregator"),)


def _on_gate(state: State, event: GateChanged) -> Step:
    is_new = event.reason != state.pause
    state = replace(state, pause=event.reason, is_quiet=event.is_quiet)
    if not is_new:
        return state, ()
    said = Say(f"paused: {event.reason}" if event.reason else "working again")
    state, announced = announce(state)
    state, actions = begin(state)
    return state, (said, *announced, *actions)
