"""A conversation as it is recorded: who was told what, and what each side then sent; and how to play it again.

Payloads stand once in a table and are named by their number. A receipt's detail is for people and is left out, so that
better words are no drift. Everything else is bytes as they were sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aggregator import events as happenings
from aggregator.rounds import step as aggregator_step
from aggregator.spec import Spec
from aggregator.state import State as RunState
from aggregator.state import new_state
from edge_client import session
from edge_client.events import (
    Action,
    Evaluated,
    Event,
    Garbled,
    GateChanged,
    Heard,
    Leave,
    ModelReady,
    Publish,
    Rebuilt,
    Taken,
    Tick,
    Trained,
)
from edge_client.state import Identity
from shared.errors import PeerError
from shared.manifest import Manifest, Tensor
from shared.messages import Receipt, Update
from shared.refusals import Refusal
from shared.topics import Topic, parse_topic
from shared.transport import Connected
from shared.wire import decode, encode, kind_of

Json = dict[str, Any]
Sent = tuple[str, bytes, bool]  # topic, payload, retain
START_MS = 1_760_000_000_000  # when recordings begin; agents count seconds from there
MANIFEST = Manifest((Tensor("bias", (4,)), Tensor("weight", (4, 8))))
BASE_DIGEST = bytes(range(0x40, 0x60))


_TIMED: dict[str, Callable[[int], happenings.Event]] = {
    "begin": happenings.Begin,
    "tick": happenings.Tick,
    "resume": happenings.Resume,
}


class AggregatorSide:
    """The aggregator's round logic behind its wire; `told` is a recorded event, what comes back is sent."""

    def __init__(self, spec: Spec) -> None:
        self.state: RunState = new_state(spec)

    def tell(self, told: Json, payload: bytes) -> list[Sent]:
        """The publications that follow from one event, in order."""
        self.state, actions = aggregator_step(self.state, self._event(told, payload))
        sent: list[Sent] = []
        run = self.state.spec.name
        for action in actions:
            if isinstance(action, happenings.SendReceipt):
                quiet = Receipt(action.receipt.round, action.receipt.code, "")
                sent.append((str(Topic(run, "receipt", action.device)), encode(quiet), False))
            elif isinstance(action, happenings.Publish):
                message = action.message
                sent.append((str(Topic(run, kind_of(message))), encode(message), True))
        return sent

    def _event(self, told: Json, payload: bytes) -> happenings.Event:
        name, now_ms = told["event"], told["now_ms"]
        if name == "heard":
            return self._uplink(told, payload, now_ms)
        if name in ("pause", "stop"):
            return (happenings.Pause if name == "pause" else happenings.Stop)(now_ms, told["reason"])
        return _TIMED[name](now_ms)

    def _uplink(self, told: Json, payload: bytes, now_ms: int) -> happenings.Event:
        """As `aggregator.service` reads it."""
        topic = parse_topic(told["topic"])
        assert topic is not None and topic.device is not None
        spec = self.state.spec
        if topic.run != spec.name:
            return happenings.BadUplink(topic.device, Refusal.UNKNOWN_RUN, topic.run)
        if told["retained"]:
            return happenings.BadUplink(topic.device, Refusal.RETAINED, "")
        try:
            update = decode("update", payload, limit_bytes=spec.update_limit_bytes)
        except PeerError as error:
            return happenings.BadUplink(topic.device, error.refusal, error.detail)
        assert isinstance(update, Update)
        return happenings.UpdateArrived(topic.device, update, payload, now_ms)


class AgentSide:
    """One agent's protocol behind its wire."""

    def __init__(self, run: str, device: str, number: int) -> None:
        identity = Identity(run, device, session=number, agent="kseed recorded", broker="recorded")
        self.state = session.start(identity, 0.0, 0)

    def tell(self, told: Json, payload: bytes) -> list[Action]:
        """What follows from one event at its time, in order."""
        now_ms = told["now_ms"]
        actions: list[Action] = []
        for event in (Tick((now_ms - START_MS) / 1000, now_ms), self._event(told, payload)):
            self.state, more = session.step(self.state, event)
            actions += more
        return actions

    def _event(self, told: Json, payload: bytes) -> Event:
        match told["event"]:
            case "connected":
                return Connected("in-process", False)
            case "heard":
                return _heard(told, payload)
            case "taken":
                return Taken(told["kind"])
            case "model ready":
                return ModelReady(MANIFEST, BASE_DIGEST)
            case "rebuilt":
                return Rebuilt(told["version"], bytes.fromhex(told["digest_hex"]))
            case "trained":
                update = decode("update", payload)
                assert isinstance(update, Update)
                return Trained(update)
            case "evaluated":
                return Evaluated(told["version"])
            case "gate":
                return GateChanged(told["reason"])
            case "leave":
                return Leave()
        raise ValueError(f"no event is named {told['event']!r}")


def _heard(told: Json, payload: bytes) -> Event:
    """As `edge_client.agent` reads it."""
    topic = parse_topic(told["topic"])
    assert topic is not None
    try:
        return Heard(topic, decode(topic.kind, payload), told["retained"])
    except PeerError as error:
        return Garbled(told["topic"], error, payload[0] if payload else None)


def sent_by(actions: list[Action]) -> list[Sent]:
    """An agent's publications among its actions, in order."""
    publications = [action for action in actions if isinstance(action, Publish)]
    return [(str(one.topic), encode(one.message), one.retain) for one in publications]
