"""The round logic: `step(state, event) -> (state, actions)`, pure. Time enters by events, nothing else enters at all.

A run is created, then open (a round collects updates), now and then paused, at last finished. Round r trains from
version r and closes into version r + 1.

    event          created     open                  paused              finished
    Begin          open 0      say all again (1)     say all again       say all again
    UpdateArrived  refuse      admit (2)             refuse (2)          refuse (2)
    BadUplink      answer      answer                answer              answer
    Tick           -           close or extend (3)   -                   -
    Online         count       count (5)             count               -
    Pause          paused      paused                -                   -
    Resume         -           -                     open, new deadline  -
    Stop           finished    close, finished (4)   close, finished (4) -

1. A deadline that passed while the network was away starts anew, because no update could come in. So does one that
   a clock set back has moved far away.
2. Module `admission` says in which order. A refusal leaves the state as it is, the very same object. The update that
   makes the quorum, with `min_updates` votes in the round, closes it.
3. At the deadline: `min_updates` are there -> close; else one more deadline, and a wider selection.
4. With `min_updates` there, the round closes with what it has, so that accepted work counts; else it changes nothing.
5. The next round's over-selection goes by it. It is kept when something else of the progress is.

Closing (module `closing`) publishes snapshot and plan, in this order, after everything is kept.
Accepted updates are receipted before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from aggregator.accepted import Accepted, AcceptedUpdates
from aggregator.admission import refusal, sent_again
from aggregator.closing import Closing, close
from aggregator.events import (
    Action,
    BadUplink,
    Begin,
    Event,
    KeepProgress,
    KeepUpdate,
    KeepVersion,
    Note,
    Online,
    Pause,
    Publish,
    Resume,
    SendReceipt,
    Stop,
    Tick,
    UpdateArrived,
)
from aggregator.repeating import everything, left_out_again
from aggregator.spec import selected_part
from aggregator.state import Phase, Progress, State, counting, plan_of, snapshot_of
from shared.messages import Receipt
from shared.ranges import MAX_DETAIL, MAX_REASON
from shared.refusals import Refusal


class Transition(NamedTuple):
    """The next state, and what to do: first keep, then send, each in order."""

    state: State
    actions: tuple[Action, ...] = ()


def step(state: State, event: Event) -> Transition:
    """What follows from an event: `TABLE`, nothing else."""
    return TABLE[state.progress.phase, type(event)](state, event)


# --- rules, one per cell of the table


def _nothing(state: State, event: Event) -> Transition:
    return Transition(state)


def _open_first(state: State, event: Begin) -> Transition:
    opened = _at(state, _opened(state.progress, event.now_ms, state))
    return Transition(opened, (KeepProgress(opened.progress), *everything(opened)))


def _say_again(state: State, event: Begin) -> Transition:
    progress = state.progress
    is_in_time = progress.published_at_ms <= event.now_ms < progress.deadline_at_ms
    if progress.phase != "open" or is_in_time:
        return Transition(state, (*left_out_again(state), *everything(state)))
    later = _at(state, _with_deadline(progress, event.now_ms, state))
    note = Note(f"round {progress.round}: its deadline passed while nobody could answer; it starts anew")
    return Transition(later, (KeepProgress(later.progress), note, *left_out_again(later), *everything(later)))


def _admit(state: State, event: UpdateArrived) -> Transition:
    verdict = refusal(state, event)
    if verdict is not None:
        return _refuse(state, event, verdict)
    number, made_for, entry = state.progress.round, event.update.round, Accepted(event.payload, event.update)
    keep = KeepUpdate(made_for, event.device, event.payload, event.now_ms, counted_in=number)
    if made_for != number:  # late: it neither makes the quorum nor closes the round
        detail = f"it counts, for 1 / sqrt({1 + number - made_for}) of its weight, if round {number} combines anything"
        late = replace(state, late=state.late.with_one((event.device, made_for), entry))
        return Transition(late, (keep, SendReceipt(event.device, Receipt(made_for, int(Refusal.ACCEPTED), detail))))
    accepted = replace(state, updates=state.updates.with_one(event.device, entry))
    receipt = SendReceipt(event.device, Receipt(number, int(Refusal.ACCEPTED), ""))
    config = state.spec.config
    if len(accepted.updates) < config.quorum or counting(accepted) < config.min_updates:
        return Transition(accepted, (keep, receipt))
    closed = _close(accepted, event.now_ms, None)
    return Transition(closed.state, (keep, receipt, *closed.actions))


def _refuse_closed(state: State, event: UpdateArrived) -> Transition:
    verdict = sent_again(state, event) or (Refusal.RUN_CLOSED, state.progress.reason)
    return _refuse(state, event, verdict)


def _answer_bad(state: State, event: BadUplink) -> Transition:
    receipt = Receipt(state.progress.round, int(event.refusal), event.detail[:MAX_DETAIL])
    return Transition(state, (SendReceipt(event.device, receipt),))


def _check_deadline(state: State, event: Tick) -> Transition:
    progress, config = state.progress, state.spec.config
    if event.now_ms < progress.deadline_at_ms:
        return Transition(state)
    if counting(state) >= config.min_updates:
        return _close(state, event.now_ms, None)
    extended = msgspec.structs.replace(progress, extensions=progress.extensions + 1)
    later = _at(state, _with_deadline(extended, event.now_ms, state))
    note = Note(
        f"round {progress.round}: {counting(state)} of {config.min_updates} updates at the deadline; "
        f"extended by {config.deadline_s:g} s"
    )
    return Transition(later, (KeepProgress(later.progress), note, Publish(plan_of(later))))


def _count_online(state: State, event: Online) -> Transition:
    if event.devices == state.progress.online:
        return Transition(state)
    return Transition(_at(state, msgspec.structs.replace(state.progress, online=event.devices)))


def _pause(state: State, event: Pause) -> Transition:
    paused = _ended(state, "paused", event.reason or "paused by the operator", event.now_ms)
    return _announced(paused, f"round {state.progress.round}: paused: {paused.progress.reason}")


def _resume(state: State, event: Resume) -> Transition:
    progress = msgspec.structs.replace(state.progress, phase="open", reason="")
    resumed = _at(state, _with_deadline(progress, event.now_ms, state))
    if not progress.opened_at_ms:  # paused before it was ever served
        resumed = _at(resumed, _opened(resumed.progress, event.now_ms, state))
    return _announced(resumed, f"round {progress.round}: resumed")


def _stop(state: State, event: Stop) -> Transition:
    reason = event.reason or "stopped by the operator"
    if counting(state) >= state.spec.config.min_updates:
        return _close(state, event.now_ms, reason)
    stopped = _ended(state, "finished", reason, event.now_ms)
    return _announced(stopped, f"round {state.progress.round}: finished: {stopped.progress.reason}")


TABLE: Mapping[tuple[Phase, type[Any]], Callable[[State, Any], Transition]] = {
    ("created", Begin): _open_first,
    ("created", UpdateArrived): _refuse_closed,
    ("created", BadUplink): _answer_bad,
    ("created", Tick): _nothing,
    ("created", Online): _count_online,
    ("created", Pause): _pause,
    ("created", Resume): _nothing,
    ("created", Stop): _stop,
    ("open", Begin): _say_again,
    ("open", UpdateArrived): _admit,
    ("open", BadUplink): _answer_bad,
    ("open", Tick): _check_deadline,
    ("open", Online): _count_online,
    ("open", Pause): _pause,
    ("open", Resume): _nothing,
    ("open", Stop): _stop,
    ("paused", Begin): _say_again,
    ("paused", UpdateArrived): _refuse_closed,
    ("paused", BadUplink): _answer_bad,
    ("paused", Tick): _nothing,
    ("paused", Online): _count_online,
    ("paused", Pause): _nothing,
    ("paused", Resume): _resume,
    ("paused", Stop): _stop,
    ("finished", Begin): _say_again,
    ("finished", UpdateArrived): _refuse_closed,
    ("finished", BadUplink): _answer_bad,
    ("finished", Tick): _nothing,
    ("finished", Online): _nothing,
    ("finished", Pause): _nothing,
    ("finished", Resume): _nothing,
    ("finished", Stop): _nothing,
}


# --- what the rules are made of


def _refuse(state: State, event: UpdateArrived, verdict: tuple[Refusal, str]) -> Transition:
    code, detail = verdict
    receipt = Receipt(event.update.round, int(code), detail[:MAX_DETAIL])
    return Transition(state, (SendReceipt(event.device, receipt),))


def _close(state: State, now_ms: int, stop_reason: str | None) -> Transition:
    """Close the round; finish where it was the last one or the operator stops the run."""
    closing = close(state, now_ms)
    config, version = state.spec.config, state.progress.round + 1
    progress = Progress(round=version, excluded=closing.excluded, online=state.progress.online)
    advanced = replace(
        state,
        progress=progress,
        coefficients=closing.coefficients,
        carried=closing.carried,
        change=closing.change,
        algorithm_state=closing.algorithm_state,
        fleet=closing.fleet,
        updates=AcceptedUpdates(),
        late=AcceptedUpdates(),
        past=closing.past,
    )
    if stop_reason is not None:
        advanced = _ended(advanced, "finished", stop_reason, now_ms)
    elif version >= config.rounds:
        advanced = _ended(advanced, "finished", f"all {config.rounds} rounds are done", now_ms)
    else:
        advanced = _at(advanced, _opened(progress, now_ms, state))
    return Transition(
        advanced,
        (
            _version(version, closing),
            KeepProgress(advanced.progress),
            *(Note(text) for text in closing.notes),
            *([Note(f"finished: {advanced.progress.reason}")] if advanced.progress.phase == "finished" else []),
            *closing.receipts,
            Publish(snapshot_of(advanced)),
            Publish(plan_of(advanced)),
        ),
    )


def _version(number: int, closing: Closing) -> KeepVersion:
    return KeepVersion(
        number,
        closing.coefficients,
        closing.carried,
        closing.change,
        closing.algorithm_state,
        closing.fleet,
        closing.report,
        plan=closing.past[-1].plan,
    )


def _at(state: State, progress: Progress) -> State:
    return replace(state, progress=progress)


def _opened(progress: Progress, now_ms: int, state: State) -> Progress:
    part = selected_part(state.spec.config, progress.online)
    opened = msgspec.structs.replace(progress, phase="open", opened_at_ms=now_ms, part=part)
    return _with_deadline(opened, now_ms, state)


def _with_deadline(progress: Progress, now_ms: int, state: State) -> Progress:
    deadline_at_ms = now_ms + math.ceil(state.spec.config.deadline_s * 1000)
    published_at_ms = max(now_ms, progress.published_at_ms)
    return msgspec.structs.replace(progress, published_at_ms=published_at_ms, deadline_at_ms=deadline_at_ms)


def _ended(state: State, phase: Phase, reason: str, now_ms: int) -> State:
    published_at_ms = max(now_ms, state.progress.published_at_ms)  # devices ignore a plan that is older
    progress = msgspec.structs.replace(
        state.progress, phase=phase, reason=reason[:MAX_REASON], published_at_ms=published_at_ms
    )
    return _at(state, progress)


def _announced(state: State, note: str) -> Transition:
    return Transition(state, (KeepProgress(state.progress), Note(note), Publish(plan_of(state))))
