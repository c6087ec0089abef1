"""Whether this device is there, and whether another agent says the same of itself. Part of `session`; no I/O."""

from __future__ import annotations

from dataclasses import replace

from edge_client.events import EXIT_PEER, Finish, Publish
from edge_client.state import Sessions, State, Step
from shared.messages import Presence
from shared.topics import Topic
from shared.wire import MIN_VERSION, PROTOCOL_VERSION


def presence(state: State, *, online: bool) -> Presence:
    """What the agent tells everyone about itself; the offline one is also its will."""
    note = (state.pause or "")[:256] if online else ""
    return Presence(online, state.identity.session, MIN_VERSION, PROTOCOL_VERSION, state.identity.agent, note)


def announce(state: State) -> Step:
    """Publish the presence; if one is still on its way, once that has arrived: a bad link must not pile them up."""
    link = state.link
    if not link.is_connected or link.is_announcing:
        return replace(state, link=replace(link, must_announce=True)), ()
    told = replace(state, link=replace(link, is_announcing=True, must_announce=False))
    return told, (
        Publish(
            Topic(state.identity.run, "presence", state.identity.device), presence(state, online=True), retain=True
        ),
    )


def on_presence(state: State, heard: Presence) -> Step:
    """Who else uses this id. Whatever comes before our own echo is from a predecessor that died."""
    sessions = state.sessions
    if heard.session == state.identity.session:
        return _restate(replace(state, sessions=replace(sessions, has_echo=True)), heard)
    if heard.session in sessions.predecessors:
        return _restate(state, heard)  # its will, late
    if not sessions.has_echo:
        return _restate(replace(state, sessions=Sessions(predecessors=sessions.predecessors | {heard.session})), heard)
    return state, (taken(state, "it published its presence"),)


def _restate(state: State, heard: Presence) -> Step:
    """Announce what is true if `heard`, the newest on the topic, is not; unless the truth is on its way behind it.

    At once the first time, later ones `restate_s` apart: who writes there without end gets no answer to each.
    """
    if heard == presence(state, online=True):
        return replace(state, link=replace(state.link, must_announce=False)), ()
    link = state.link
    if link.is_announcing or state.now_s < link.restated_s:  # the answer is on its way, or will be
        return state, ()
    if state.now_s < (due_s := link.restated_s + state.identity.limits.restate_s):
        return replace(state, link=replace(link, must_announce=True, announce_s=due_s, restated_s=due_s)), ()
    return announce(replace(state, link=replace(link, restated_s=state.now_s)))


def taken(state: State, evidence: str) -> Finish:
    """The end of an agent whose device id another one uses."""
    return Finish(
        EXIT_PEER,
        f"another agent runs with the device id {state.identity.device!r} in run {state.identity.run!r} ({evidence}). "
        "Every agent needs an id of its own: stop one of them or give it another --device-id.",
        is_taken=True,
    )
