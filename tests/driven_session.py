"""A small run as one device sees it, and the device's session, driven event by event."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from edge_client import session
from edge_client.events import Action, Event, Finish, Heard, ModelReady, Rebuilt, Say, Taken, Trained
from edge_client.state import Identity, Sending, Training
from shared.changes import write_change
from shared.manifest import Manifest, Tensor
from shared.messages import Change, Everyone, Message, PlainStep, Plan, Run, Snapshot, Update
from shared.topics import Topic
from shared.transport import Connected
from shared.wire import coefficients_to_bytes, kind_of

SEEDS = 256
MANIFEST = Manifest((Tensor("head.weight", (4, 8)), Tensor("norm.weight", (8,))))
RUN = Run(
    run="demo",
    model="tiny",
    dtype="fp32",
    directions="hadamard",
    seeds=SEEDS,
    pool_key=7,
    manifest=MANIFEST.pack(),
    manifest_digest=MANIFEST.digest(),
    base_digest=b"\x11" * 32,
    scalar_format="f32",
    change_format="f32",
    first_order=False,
)
PLAN = Plan(
    round=3,
    phase="open",
    nonce=b"nonce-of-round-3",
    local_steps=2,
    one_sided=0,
    batch_size=1,
    eps=1e-3,
    step=PlainStep(0.1),
    participation=Everyone(),
    common_seeds=False,
    levels=None,
    evaluate=False,
    published_at_ms=1_000_000,
    deadline_s=100.0,
    reason="",
    change=None,
)
NEXT = msgspec.structs.replace(PLAN, round=4, nonce=b"nonce-of-round-4", published_at_ms=1_100_000)
IDENTITY = Identity("demo", "ann", session=5, agent="kseed 0", broker="localhost:1883")
DIGEST = b"d" * 16
UPDATE = Update(3, 10, 2.0, None, None, DIGEST, np.array([1, 2], "<f4").tobytes(), None)
READY = ModelReady(MANIFEST, RUN.base_digest)
PRESENCE_TOPIC = Topic("demo", "presence", "ann")
PLAN_TOPIC = Topic("demo", "plan")
SNAPSHOT_TOPIC = Topic("demo", "snapshot")
UPDATE_TOPIC = Topic("demo", "update", "ann")


def snapshot(version: int, value: float = 0.0) -> Snapshot:
    return Snapshot(version, coefficients_to_bytes(np.full(SEEDS, value, np.float32)))


def change_of(seeds: list[int] | None, values: list[float]) -> Change:
    return write_change(None if seeds is None else np.array(seeds), np.array(values), "f32")


def next_with(change: Change, **fields: Any) -> Plan:
    """The next plan, with the change that leads to it."""
    return msgspec.structs.replace(NEXT, change=change, **fields)


class Driven:
    """A state and what came of each event."""

    def __init__(self, identity: Identity = IDENTITY) -> None:
        self.state = session.start(identity, now_s=0.0, unix_ms=1_000_000)

    def on(self, *events: Event) -> list[Action]:
        """The actions of all events, in order."""
        actions: list[Action] = []
        for event in events:
            self.state, done = session.step(self.state, event)
            actions += done
        return actions

    def hear(self, message: Message, *, is_retained: bool = False, device: str = "ann") -> list[Action]:
        kind = kind_of(message)
        topic = Topic("demo", kind, device if kind in ("update", "receipt", "presence") else None)
        return self.on(Heard(topic, message, is_retained))

    def joined(self) -> Driven:
        self.on(Connected("MQTT 5", False), Taken("presence"))
        self.hear(session.presence(self.state, online=True))
        self.hear(RUN)
        return self

    def training(self, plan: Plan = PLAN) -> Driven:
        """In the local steps of round 3."""
        self.joined().hear(plan)
        self.on(READY)
        self.hear(snapshot(3))
        self.on(Rebuilt(3, DIGEST))
        assert isinstance(self.state.work, Training)
        return self

    def sending(self, plan: Plan = PLAN) -> Driven:
        """The update of round 3 is out."""
        self.training(plan).on(Trained(UPDATE), Taken("update"))
        assert isinstance(self.state.work, Sending)
        return self


def only(actions: list[Action], kind: type[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def texts(actions: list[Action]) -> str:
    return "\n".join(action.text for action in actions if isinstance(action, (Say, Finish)))


def finish(actions: list[Action]) -> Finish:
    (last,) = only(actions, Finish)
    assert actions[-1] is last
    assert isinstance(last, Finish)
    return last
