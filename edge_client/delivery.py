"""An update on its way: sent, sent again until a receipt, and what each receipt means. Part of `session`; no I/O."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from edge_client.events import (
    EXIT_PEER,
    Abandon,
    Action,
    Finish,
    Publish,
    Refused,
    Say,
    Subscribe,
    Trained,
    TrainingFailed,
)
from edge_client.following import pursue
from edge_client.state import Evaluating, Fetching, Sending, Settled, State, Step, Training, Waiting
from shared.messages import Receipt
from shared.refusals import Refusal
from shared.topics import Topic

Consequence = Literal["counts", "again", "closed", "lost", "follow", "stop", "diverged"]

# What an agent does about each receipt. counts: done; again: send it later; closed: send it when the run opens again;
# lost: done, with a warning; follow: done, and the plan this agent holds is old; stop: nothing this agent sends can
# count; diverged: rebuild.
CONSEQUENCES: dict[Refusal, Consequence] = {
    Refusal.ACCEPTED: "counts",
    Refusal.DUPLICATE: "counts",
    Refusal.MALFORMED: "lost",
    Refusal.UNSUPPORTED_VERSION: "stop",
    Refusal.OVERSIZED: "lost",
    Refusal.WRONG_KIND: "lost",
    Refusal.RETAINED: "lost",
    Refusal.UNKNOWN_RUN: "lost",
    Refusal.STALE_ROUND: "follow",
    Refusal.FUTURE_ROUND: "follow",
    Refusal.NOT_SELECTED: "lost",
    Refusal.CONFLICT: "lost",
    Refusal.RUN_CLOSED: "closed",
    Refusal.NON_FINITE: "lost",
    Refusal.SCALAR_COUNT: "lost",
    Refusal.SEED_OUTSIDE_POOL: "lost",
    Refusal.WEIGHT_OUT_OF_RANGE: "lost",
    Refusal.DIVERGED: "diverged",
    Refusal.COEFFICIENT_COUNT: "lost",
    Refusal.FIRST_ORDER: "lost",
    Refusal.LARGE_CHANGE: "lost",
    Refusal.BUSY: "again",
    Refusal.STORAGE: "again",
}


def on_trained(state: State, event: Trained) -> Step:
    """The local steps are done: send the update, unless the plan has moved on."""
    plan = state.plan
    if not isinstance(state.work, Training) or plan is None or event.update.round != plan.round:
        return state, ()
    work = Sending(event.update, due_s=state.now_s, interval_s=state.identity.limits.resend_s)
    return send_if_due(replace(state, work=work, kept=None))


def on_training_failed(state: State, event: TrainingFailed) -> Step:
    """The local steps gave nothing to send: sit the round out."""
    if not isinstance(state.work, Training) or state.plan is None or event.round != state.plan.round:
        return state, ()
    text = f"round {event.round}: no update from this device: {event.reason}"
    return replace(state, work=Settled()), (Say(text, is_warning=True),)


def send_if_due(state: State) -> Step:
    """Send the waiting update if its time has come, the broker is there and the run is open."""
    work = state.work
    if not isinstance(work, Sending) or not state.link.is_connected or state.now_s < work.due_s:
        return state, ()
    if work.is_underway or (work.is_taken and state.is_quiet):  # a bad link must not pile up copies, nor cost more
        return state, ()
    if state.plan is None or state.plan.phase != "open":
        return state, ()
    interval_s = min(work.interval_s, state.identity.limits.resend_max_s)
    waiting = Sending(work.update, state.now_s + interval_s, 2 * interval_s, is_underway=True, is_taken=work.is_taken)
    return replace(state, work=waiting), (
        Publish(Topic(state.identity.run, "update", state.identity.device), work.update),
    )


def send_now(state: State) -> Step:
    """Send the waiting update at once: the connection is new, or the run goes on."""
    if isinstance(state.work, Sending):
        state = replace(state, work=replace(state.work, due_s=state.now_s))
    return send_if_due(state)


def on_receipt(state: State, receipt: Receipt) -> Step:
    """What became of an update. Receipts for anything but the update under way are echoes, except DIVERGED.

    Whoever keeps an account of what was told hears of refusals that come too late for anything else as well.
    """
    code = Refusal(receipt.code)
    state, actions = _settled(state, receipt, code)
    if CONSEQUENCES[code] in ("counts", "again", "closed") or code is Refusal.CONFLICT:  # an update of the round counts
        return state, actions
    return state, (Refused(receipt.round), *actions)


def _settled(state: State, receipt: Receipt, code: Refusal) -> Step:
    consequence = CONSEQUENCES[code]
    if consequence == "diverged":
        return _on_diverged(state, receipt)
    work = state.work
    if not isinstance(work, Sending) or receipt.round != work.update.round:
        return state, ()
    text = f"round {receipt.round}: {_sentence(code, receipt.detail)}"
    noted = replace(state, receipt=code)
    if consequence == "counts":
        said = Say(f"round {receipt.round}: update {code.name.lower()}")
        return replace(noted, work=Settled(), accepted=receipt.round), (said,)
    if consequence in ("again", "closed"):
        interval_s = min(work.interval_s, state.identity.limits.resend_max_s)
        later = Sending(work.update, state.now_s + interval_s, 2 * interval_s, is_taken=True)  # its receipt is here
        look = (Subscribe(Topic(state.identity.run, "plan")),) if consequence == "closed" else ()
        return replace(noted, work=later), (Say(f"{text} Next try in {interval_s:.0f} s.", is_warning=True), *look)
    if consequence == "stop":
        return noted, (Finish(EXIT_PEER, f"{text} This agent: {state.identity.agent}."),)
    actions: tuple[Action, ...] = (Say(text, is_warning=True),)
    if consequence == "follow":
        actions += (Subscribe(Topic(state.identity.run, "plan")),)  # the retained plan once more
    return replace(noted, work=Settled()), actions


def _sentence(code: Refusal, detail: str) -> str:
    return f"{code.sentence} ({detail})" if detail else code.sentence


def _on_diverged(state: State, receipt: Receipt) -> Step:
    """The aggregator left this device out: take a fresh snapshot, once; a second time the device itself is at fault."""
    plan = state.plan
    if plan is None or not plan.round - 1 <= receipt.round <= plan.round:
        return state, ()
    suspect_from = state.suspect_from
    if suspect_from is not None and receipt.round < suspect_from:
        return state, ()  # an echo: the fresh snapshot has not been used yet
    text = f"round {receipt.round}: {_sentence(Refusal.DIVERGED, receipt.detail)}"
    if suspect_from is not None:
        advice = "It differs again after a rebuild from a fresh snapshot: try another --kernel, and report this."
        return replace(state, receipt=Refusal.DIVERGED), (Finish(EXIT_PEER, f"{text} {advice}"),)
    has_sent = isinstance(state.work, (Sending, Settled))
    fresh = replace(
        state,
        held=None,
        receipt=Refusal.DIVERGED,
        suspect_from=plan.round + 1 if has_sent else plan.round,
    )
    actions: tuple[Action, ...] = (Say(f"{text} Rebuilding from a fresh snapshot.", is_warning=True),)
    if has_sent:
        is_over = receipt.round == plan.round
        return (replace(fresh, work=Settled()) if is_over else fresh), actions
    if isinstance(state.work, (Training, Evaluating)):
        actions += (Abandon(),)
    if not isinstance(state.work, Fetching):
        fresh = replace(fresh, work=Waiting())
    fresh, more = pursue(fresh)
    return fresh, actions + more
