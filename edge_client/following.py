"""From the current plan to the model version it needs, and on to work. Part of `session`; no I/O.

`pursue` is the one place that starts work: a function of the state alone, called after whatever may have unblocked it.
"""

from __future__ import annotations

from dataclasses import replace

from edge_client.events import (
    EXIT_LEFT,
    Abandon,
    Action,
    CloseRound,
    Conclude,
    Evaluate,
    Evaluated,
    Finish,
    LoadModel,
    Rebuild,
    Rebuilt,
    Say,
    Subscribe,
    Train,
    Unsubscribe,
)
from edge_client.plans import check_plan, conclude_s, patience_for, relation
from edge_client.state import (
    Evaluating,
    Fetching,
    Held,
    Patience,
    Rebuilding,
    Sending,
    Settled,
    State,
    Step,
    Training,
    Waiting,
    goes_on,
)
from shared.changes import add_change, drawn_seeds, read_change
from shared.errors import PeerError
from shared.messages import Plan, Snapshot
from shared.numbers import NUMBER_BYTES
from shared.seeds import takes_part
from shared.topics import Kind, Topic
from shared.wire import coefficients_from_bytes, coefficients_to_bytes


def ignored(state: State, what: str, error: PeerError) -> Step:
    """A bad message leaves a line and no other trace."""
    return state, (Say(f"ignored a {what} message: {error}", is_warning=True),)


def on_plan(state: State, plan: Plan, *, is_retained: bool) -> Step:
    """The current plan, first seen, repeated, amended (paused, extended, finished) or newer."""
    try:
        if state.run is not None:
            check_plan(state.run, plan)
    except PeerError as error:
        return ignored(state, "plan", error)
    kind = relation(state.plan, plan)
    if kind in ("stale", "same"):
        return state, ()
    followed = replace(
        state,
        plan=plan,
        patience=state.patience if state.run is None else patience_for(state, plan),
        conclude_s=conclude_s(state, plan, is_retained),
    )
    if kind == "amended":
        return _amended(followed, state.plan)
    actions: tuple[Action, ...] = ()
    if isinstance(state.work, (Training, Evaluating)):
        actions += (Abandon(), Say(f"round {plan.round} has begun; dropping the work of the round before"))
    if state.plan is not None:
        actions += (CloseRound(state.plan.round, state.receipt),)
    if state.suspect_from is not None and plan.round > state.suspect_from + 1:
        followed = replace(followed, suspect_from=None)  # a whole round went by without a complaint
    work = state.work if isinstance(state.work, Fetching) else Waiting()
    followed, changed = _follow_change(replace(followed, work=work, receipt=None), state.plan)
    followed, taken_up = _take_up(followed, plan)
    actions += changed + taken_up
    if plan.phase == "paused":
        actions += (Say(_phase_text(state, plan)),)
    followed, more = begin(followed)
    return followed, actions + more


def _follow_change(state: State, before: Plan | None) -> Step:
    """The step from the version held to that of the plan, where it is one; a change that does not fit is none."""
    run, plan, held = state.run, state.plan, state.held
    if run is None or plan is None or plan.change is None or held is None or held.version != plan.round - 1:
        return state, ()
    if before is None or before.round != held.version:
        before = None
        if plan.change.seeds is None and len(plan.change.values) != run.seeds * NUMBER_BYTES[run.change_format]:
            return state, ()  # only the plan before says whose numbers these are, and of how many bits
    try:
        known = None if before is None else drawn_seeds(before, run.seeds)
        change = read_change(plan.change, run.change_format, run.seeds, known)
        following = add_change(coefficients_from_bytes(held.coefficients, run.seeds), *change)
    except PeerError as error:
        return ignored(state, "change", error)
    return replace(state, held=Held(plan.round, coefficients_to_bytes(following))), ()


def _take_up(state: State, plan: Plan) -> Step:
    """What an earlier life of this agent left in the outbox: sent again in the same round, dropped after it."""
    kept = state.kept
    if kept is None or kept.update.round > plan.round:  # a plan that old is not the newest
        return state, ()
    number = kept.update.round
    state = replace(state, kept=None)
    if kept.nonce != plan.nonce or number != plan.round or plan.phase == "finished":
        return state, (Say(f"round {number} is over; dropped its update, which never had a receipt"),)
    text = f"round {number}: sending the update that was made before this agent was started again"
    again = Sending(kept.update, due_s=state.now_s, interval_s=state.identity.limits.resend_s)
    return replace(state, work=again), (Say(text),)


def _amended(state: State, before: Plan | None) -> Step:
    plan = state.plan
    assert plan is not None and before is not None
    actions: tuple[Action, ...] = ()
    if plan.phase != before.phase and plan.phase != "finished":
        actions += (Say(_phase_text(state, plan)),)
    if isinstance(state.work, Training):
        state = replace(state, work=Training(state.conclude_s))
    if isinstance(state.work, Settled) and not state.work.is_selected and _is_selected(state, plan):
        state = replace(state, work=Waiting())  # the round was extended to more devices
    if plan.phase == "finished" and before.phase != "finished":
        if isinstance(state.work, Training):
            actions += (Abandon(),)
        if not isinstance(state.work, Fetching):
            state = replace(state, work=Waiting())
    state, more = begin(state)
    return state, actions + more


def _phase_text(state: State, plan: Plan) -> str:
    why = f": {plan.reason}" if plan.reason else ""
    return f"run {state.identity.run!r} is {'open again' if plan.phase == 'open' else plan.phase}{why}"


def on_snapshot(state: State, snapshot: Snapshot) -> Step:
    """All coefficients of a version, asked for by `pursue`."""
    if state.run is None or not isinstance(state.work, Fetching) or state.plan is None:
        return state, ()  # it crossed our unsubscription
    try:
        coefficients_from_bytes(snapshot.coefficients, state.run.seeds)
    except PeerError as error:
        return ignored(state, "snapshot", error)
    if state.held is not None and snapshot.version <= state.held.version:
        return state, ()
    held = replace(state, held=Held(snapshot.version, snapshot.coefficients))
    if snapshot.version < state.plan.round:
        return held, (Say(f"the snapshot is version {snapshot.version}; waiting for version {state.plan.round}"),)
    return pursue(held)


def begin(state: State) -> Step:
    """Load the model once run and plan are known; then pursue the plan."""
    if state.run is None or state.plan is None or (state.is_leaving and not goes_on(state)):
        return state, ()
    if state.model == "none":
        if isinstance(state.work, Sending):  # loading takes long, and nothing is to be computed before its receipt
            return state, ()
        if state.plan.phase == "finished":
            return _after_end(state, state.plan)
        if state.pause is not None:
            return state, ()
        return replace(state, model="loading"), (LoadModel(state.run),)
    return pursue(state)


def pursue(state: State) -> Step:
    """Start what the plan asks for next, if nothing is under way and nothing forbids it."""
    plan = state.plan
    if state.model != "ready" or plan is None or not isinstance(state.work, (Waiting, Fetching)):
        return state, ()
    if state.pause is not None or plan.phase == "paused":
        return state, ()
    if plan.phase == "open" and not _is_selected(state, plan):
        text = f"round {plan.round}: this device is not selected; waiting for the next round"
        return replace(state, work=Settled(is_selected=False)), (*_stop_fetching(state), Say(text))
    version = None if state.held is None else state.held.version
    if state.held is not None and version == plan.round:
        actions = (*_stop_fetching(state), Rebuild(plan.round, state.held.coefficients))
        return replace(state, work=Rebuilding(plan.round)), actions
    if version is not None and version > plan.round:
        text = f"version {version} is here; waiting for the plan of round {version}"
        return replace(state, work=Waiting()), (*_stop_fetching(state), Say(text))
    if isinstance(state.work, Fetching):
        return state, ()
    limits = state.identity.limits
    work = Fetching(state.now_s + limits.refetch_s, min(2 * limits.refetch_s, limits.refetch_max_s))
    return replace(state, work=work), (Subscribe(_snapshot_topic(state)),)


def _is_selected(state: State, plan: Plan) -> bool:
    return takes_part(plan.participation, plan.nonce, state.identity.device)


def _snapshot_topic(state: State) -> Topic:
    return Topic(state.identity.run, "snapshot")


def _stop_fetching(state: State) -> tuple[Action, ...]:
    return (Unsubscribe(_snapshot_topic(state)),) if isinstance(state.work, Fetching) else ()


def on_rebuilt(state: State, event: Rebuilt) -> Step:
    """The overlay holds the version: train, or close the run with a last evaluation."""
    plan = state.plan
    if not isinstance(state.work, Rebuilding) or plan is None or event.version != plan.round:
        return state, ()
    if plan.phase == "open":
        return replace(state, work=Training(state.conclude_s)), (Train(plan, event.digest),)
    if plan.phase == "paused":
        return replace(state, work=Waiting()), ()
    if plan.evaluate:
        return replace(state, work=Evaluating(event.version)), (Evaluate(event.version),)
    return _ended(state, plan)


def on_evaluated(state: State, event: Evaluated) -> Step:
    """The last evaluation of a finished run is done."""
    if state.work != Evaluating(event.version) or state.plan is None:
        return state, ()
    return _ended(state, state.plan)


def _ended(state: State, plan: Plan) -> Step:
    return replace(state, work=Settled()), (
        CloseRound(plan.round, None),
        Finish(EXIT_LEFT, _finished_text(state, plan)),
    )


def _after_end(state: State, plan: Plan) -> Step:
    text = _finished_text(state, plan)
    if not state.identity.limits.waits_after_end:
        return state, (Finish(EXIT_LEFT, text),)
    said = () if isinstance(state.work, Settled) else (Say(f"{text}; waiting for it to go on"),)
    return replace(state, work=Settled(is_selected=False)), said


def _finished_text(state: State, plan: Plan) -> str:
    why = f": {plan.reason}" if plan.reason else ""
    return f"run {state.identity.run!r} is finished at version {plan.round}{why}"


def on_time(state: State) -> Step:
    """Deadlines of the plan: end the local steps, ask again for a snapshot, ask again for the plan."""
    actions: tuple[Action, ...] = ()
    work, limits = state.work, state.identity.limits
    if isinstance(work, Training) and work.conclude_s is not None and state.now_s >= work.conclude_s:
        state = replace(state, work=Training(None))
        actions += (Say("the deadline is near: sending what there is"), Conclude())
    if isinstance(work, Fetching) and state.now_s >= work.due_s:
        if state.plan is not None and state.plan.phase == "finished":
            text = f"{_finished_text(state, state.plan)}; no snapshot of it came"
            return state, (*_stop_fetching(state), Finish(EXIT_LEFT, text))
        again = Fetching(state.now_s + work.interval_s, min(2 * work.interval_s, limits.refetch_max_s))
        state = replace(state, work=again)
        topic = _snapshot_topic(state)
        actions += (Say("no snapshot yet; asking again"), Unsubscribe(topic), Subscribe(topic))
    patience = state.patience
    if patience.due_s is not None and state.now_s >= patience.due_s and state.link.is_connected:
        later = Patience(state.now_s + patience.interval_s, min(2 * patience.interval_s, limits.overdue_max_s))
        state = replace(state, patience=later)
        missing: Kind = "run" if state.run is None else "plan"
        actions += (Subscribe(Topic(state.identity.run, missing)),)  # what is retained there, once more
    return state, actions
