"""The owner wants the agent to leave: at once, or when the round under way is sent. Part of `session`; no I/O."""

from __future__ import annotations

from dataclasses import replace

from edge_client.events import EXIT_LEFT, Action, Finish, LeaveAfterRound, Say
from edge_client.following import begin
from edge_client.state import Evaluating, Sending, State, Step, Training, goes_on


def on_leave(state: State) -> Step:
    """Leave after the step under way."""
    return state, (Finish(EXIT_LEFT, leave_text(state)),)


def on_leave_after_round(state: State, event: LeaveAfterRound) -> Step:
    """Begin no other round; `leave_when_done` does the rest. Taken back, everything goes on."""
    if event.is_wanted == state.is_leaving:
        return state, ()
    state = replace(state, is_leaving=event.is_wanted)
    if not event.is_wanted:
        state, actions = begin(state)
        return state, (Say("staying after all"), *actions)
    said = Say("leaving when the round under way is finished and sent")
    return state, ((said,) if _has_work(state) else ())


def leave_when_done(state: State, actions: tuple[Action, ...]) -> tuple[Action, ...]:
    """`actions`, and the end where the owner waits for it and nothing is under way any more."""
    if not state.is_leaving or _has_work(state) or any(isinstance(action, Finish) for action in actions):
        return actions
    return (*actions, Finish(EXIT_LEFT, leave_text(state)))


def _has_work(state: State) -> bool:
    """Whether a round is under way, in this life or from an earlier one, or a plan must first show if it still is."""
    if isinstance(state.work, (Training, Sending, Evaluating)) or state.kept is not None:
        return True
    if state.begun is None or (state.is_quiet and state.pause is not None):  # when plans are heard again, it is over
        return False
    return state.plan is None or state.plan.round < state.begun.round or goes_on(state)


def leave_text(state: State) -> str:
    """What is said of an agent that leaves."""
    if isinstance(state.work, Sending):
        return f"left run {state.identity.run!r}; the update of round {state.work.update.round} has no receipt yet"
    return f"left run {state.identity.run!r}"
