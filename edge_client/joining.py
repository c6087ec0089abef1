"""Whether this agent fits the run: the run's identity against the model's, and the protocol versions. No I/O."""

from __future__ import annotations

from dataclasses import replace

from edge_client.events import EXIT_PEER, EXIT_USER, Finish, Garbled, ModelReady, Say
from edge_client.following import begin, ignored
from edge_client.plans import check_plan, patience_for
from edge_client.state import State, Step
from shared.errors import PeerError
from shared.manifest import Manifest
from shared.messages import Run
from shared.refusals import Refusal
from shared.topics import Topic
from shared.wire import MIN_VERSION, PROTOCOL_VERSION


def on_garbled(state: State, event: Garbled) -> Step:
    """A payload that does not decode: nothing to do, unless it shows that the two sides cannot talk at all."""
    known = {str(Topic(state.identity.run, "run")): state.run, str(Topic(state.identity.run, "plan")): state.plan}
    if event.error.refusal is not Refusal.UNSUPPORTED_VERSION or event.topic not in known or event.version is None:
        return ignored(state, event.topic, event.error)
    older = "this agent" if event.version > PROTOCOL_VERSION else "the aggregator"
    text = (
        f"run {state.identity.run!r} speaks protocol version {event.version}, this agent "
        f"{MIN_VERSION} to {PROTOCOL_VERSION}. Upgrade {older}."
    )
    if known[event.topic] is not None:  # it spoke ours before, so this may be one stray message
        return state, (Say(text, is_warning=True),)
    return state, (Finish(EXIT_PEER, text),)


def on_run(state: State, run: Run) -> Step:
    """What the run is: learnt once, then compared."""
    if state.run is not None:
        difference = _identity_difference(state.run, run)
        if difference is None:
            return state, ()
        text = (
            f"run {run.run!r} is not the run this agent joined: {difference}. "
            "Start the agent again to join the new one; nothing was sent to it."
        )
        return state, (Finish(EXIT_PEER, text),)
    try:
        if run.run != state.identity.run:
            raise PeerError(Refusal.MALFORMED, f"it describes run {run.run!r}")
        if Manifest.unpack(run.manifest).digest() != run.manifest_digest:
            raise PeerError(Refusal.MALFORMED, "manifest_digest is not the manifest's")
    except PeerError as error:
        return ignored(state, "run", error)
    known = replace(state, run=run)
    try:
        if known.plan is not None:
            check_plan(run, known.plan)
    except PeerError as error:
        return ignored(replace(known, plan=None), "plan", error)
    if known.plan is not None:
        known = replace(known, patience=patience_for(known, known.plan))
    return begin(known)


def _identity_difference(ours: Run, theirs: Run) -> str | None:
    """The first field in which two run messages differ; `model` is a hint for people and does not count."""
    for name in ours.__struct_fields__:
        was, now = getattr(ours, name), getattr(theirs, name)
        if name != "model" and was != now:
            shown = (was.hex()[:16], now.hex()[:16]) if isinstance(was, bytes) else (was, now)
            return f"{name} was {shown[0]} and is {shown[1]}"
    return None


def on_model_ready(state: State, event: ModelReady) -> Step:
    """The model is loaded: join if it is the one the run tunes, to the bit."""
    run = state.run
    if run is None or state.model != "loading":
        return state, ()
    difference = event.manifest.first_difference(Manifest.unpack(run.manifest))
    if difference is None and event.base_digest != run.base_digest:
        ours, theirs = event.base_digest.hex()[:16], run.base_digest.hex()[:16]
        difference = f"the tensors are alike, but the weights are others (digest {ours}, the run has {theirs})"
    if difference is not None:
        text = f"this model is not the one of run {run.run!r}: {difference}. Give {run.model!r} with --model."
        return state, (Finish(EXIT_USER, text),)
    said = Say(
        f"joined run {run.run!r}: {run.model}, {len(event.manifest.tensors)} tensors, K = {run.seeds}, {run.dtype}"
    )
    state, actions = begin(replace(state, model="ready"))
    return state, (said, *actions)
