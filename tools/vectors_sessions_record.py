"""Both sides of a run over a network that delivers in order, and the recording of all that is said.

The scalars are made up and the models' digests stand-ins (SHA-256 of the coefficients); the rest is what the two state
machines say.
"""

from __future__ import annotations

import hashlib
from collections import deque

import msgspec
import numpy as np

from aggregator.config import RunConfig
from aggregator.spec import Spec
from aggregator.state import plan_of
from edge_client.events import Action, Evaluate, LoadModel, Publish, Rebuild, Subscribe, Train, Unsubscribe
from shared.messages import Plan, Run, Update
from shared.wire import PROTOCOL_VERSION, encode, scalars_to_bytes
from tools.vectors_sessions_form import (
    BASE_DIGEST,
    MANIFEST,
    START_MS,
    AgentSide,
    AggregatorSide,
    Json,
    Sent,
    sent_by,
)
from tools.vectors_wire_form import stored

STEP_MS = 250  # between two events
RUN = "recorded"
AGGREGATOR = "aggregator"
MAX_EVENTS = 1000


def spec_of(settings: Json) -> Spec:
    """The run of a recording: K = 256, tiny tensors, `settings` of its configuration."""
    config = RunConfig(**{**settings, "devices": tuple(settings.get("devices", ()))})
    facts = Run(
        run=RUN,
        model="tiny",
        dtype="fp32",
        directions=config.directions,
        seeds=config.seeds,
        pool_key=0x0123_4567_89AB_CDEF,
        manifest=stored(MANIFEST.canonical_text().encode()),
        manifest_digest=MANIFEST.digest(),
        base_digest=BASE_DIGEST,
        scalar_format=config.scalar_format,
        change_format=config.change_format,
        first_order=config.first_order == "accept",
    )
    return Spec(facts, config, nonce_key=bytes(range(32)))


class Recorder:
    """Both sides, a network that delivers in order, and the recording of it all."""

    def __init__(self, name: str, about: str, **settings: object) -> None:
        small: Json = {"seeds": 256, "rounds": 3, "local_steps": 3, "quorum": 2, "deadline_s": 60.0}
        small |= {"scalar_format": "f16", "change_format": "f32"}
        self.settings: Json = {**small, **settings}
        self.aggregator = AggregatorSide(spec_of(self.settings))
        self.agents: dict[str, AgentSide] = {}
        self.name, self.about = f"v{PROTOCOL_VERSION}-{name}", about
        self._waiting: deque[tuple[str, Json, bytes | None]] = deque()
        self._filters: dict[str, set[str]] = {}
        self._retained: dict[str, bytes] = {}
        self._payloads: dict[bytes, int] = {}
        self._events: list[Json] = []
        self._now_ms = START_MS
        self.model_digest = model_digest  # of what a device rebuilds: (device, version, coefficients) -> 16 bytes
        self.held: set[tuple[str, int]] = set()  # (device, round): it is slow and has not finished its steps

    def vector(self) -> Json:
        """The recording."""
        return {
            "name": self.name,
            "about": self.about,
            "run_settings": self.settings,
            "sessions": {device: agent.state.identity.session for device, agent in self.agents.items()},
            "payloads_hex": [payload.hex() for payload in self._payloads],
            "events": self._events,
        }

    # --- what a scenario does

    def aggregate(self, event: str, **fields: object) -> None:
        """Something happens to the aggregator; then everything that follows."""
        self._waiting.append((AGGREGATOR, {"event": event, **fields}, None))
        self._run()

    def uplink(self, device: str, payload: bytes, *, run: str = RUN, is_retained: bool = False) -> None:
        """A device that is no agent of ours sends something."""
        told = {"event": "heard", "topic": f"kseed/{run}/update/{device}", "retained": is_retained}
        self._waiting.append((AGGREGATOR, told, payload))
        self._run()

    def downlink(self, device: str, kind: str, payload: bytes) -> None:
        """An agent hears something that our aggregator has not said."""
        topic = f"kseed/{RUN}/{kind}"
        self._waiting.append((device, {"event": "heard", "topic": topic, "retained": True}, payload))
        self._run()

    def connect(self, *devices: str) -> None:
        """Agents join; then everything that follows, up to where nothing more happens by itself."""
        for device in devices:
            self.agents[device] = AgentSide(RUN, device, len(self.agents) + 1)
            self._filters[device] = set()
            self._waiting.append((device, {"event": "connected"}, None))
        self._run()

    def wait(self, ms: int) -> None:
        """Nothing happens for so long."""
        self._now_ms += ms

    def good_update(self, device: str, **fields: object) -> Update:
        """What a device that is no agent of ours sends in the current round."""
        state = self.aggregator.state
        digest = model_digest(device, state.progress.round, state.coefficients)
        return update_of(device, plan_of(state), digest, **fields)

    def tell(self, device: str, event: str, **fields: object) -> None:
        """Something happens to an agent; then everything that follows."""
        self._waiting.append((device, {"event": event, **fields}, None))
        self._run()

    # --- the network

    def _run(self) -> None:
        while self._waiting:
            party, told, payload = self._waiting.popleft()
            self._now_ms += STEP_MS
            told["now_ms"] = self._now_ms
            if party == AGGREGATOR:
                sent = self.aggregator.tell(told, payload or b"")
                self._record(party, told, payload, sent)
                for one in sent:
                    self._deliver(*one)
            else:
                if self.agents[party].state.is_finished:
                    continue
                actions = self.agents[party].tell(told, payload or b"")
                self._record(party, told, payload, sent_by(actions))
                for action in actions:
                    self._do(party, action)
            assert len(self._events) < MAX_EVENTS, "the conversation does not end"

    def _record(self, party: str, told: Json, payload: bytes | None, sent: list[Sent]) -> None:
        entry = {"to": party, **told}
        if payload is not None:
            entry["payload"] = self._number(payload)
        entry["sends"] = [
            {"topic": topic, "payload": self._number(one), "retain": retain} for topic, one, retain in sent
        ]
        self._events.append(entry)

    def _number(self, payload: bytes) -> int:
        return self._payloads.setdefault(payload, len(self._payloads))

    def _do(self, device: str, action: Action) -> None:
        """What an agent wants of the network, of its model, or of its data."""
        if isinstance(action, Publish):
            self._deliver(*sent_by([action])[0])
            self._waiting.append((device, {"event": "taken", "kind": action.topic.kind}, None))
        elif isinstance(action, Subscribe):
            self._subscribe(device, str(action.topic))
        elif isinstance(action, Unsubscribe):
            self._filters[device].discard(str(action.topic))
        elif isinstance(action, Train) and (device, action.plan.round) in self.held:
            return
        elif isinstance(action, (LoadModel, Rebuild, Train, Evaluate)):
            self._waiting.append(self._answer(device, action))

    def _deliver(self, topic: str, payload: bytes, retain: bool) -> None:
        if retain:
            self._retained[topic] = payload
        told: Json = {"event": "heard", "topic": topic, "retained": False}
        if "/update/" in topic:
            self._waiting.append((AGGREGATOR, dict(told), payload))
        for device, filters in self._filters.items():
            if topic in filters:
                self._waiting.append((device, dict(told), payload))

    def _subscribe(self, device: str, topic: str) -> None:
        self._filters[device].add(topic)
        if topic in self._retained:
            told = {"event": "heard", "topic": topic, "retained": True}
            self._waiting.append((device, told, self._retained[topic]))

    # --- what a device computes

    def _answer(self, device: str, action: LoadModel | Rebuild | Train | Evaluate) -> tuple[str, Json, bytes | None]:
        if isinstance(action, LoadModel):
            return device, {"event": "model ready"}, None
        if isinstance(action, Rebuild):
            digest = self.model_digest(device, action.version, action.coefficients)
            return device, {"event": "rebuilt", "version": action.version, "digest_hex": digest.hex()}, None
        if isinstance(action, Evaluate):
            return device, {"event": "evaluated", "version": action.version}, None
        return device, {"event": "trained"}, encode(update_of(device, action.plan, action.model_digest))


def model_digest(device: str, version: int, coefficients: bytes) -> bytes:
    """The stand-in for the digest of the rebuilt weights: the same on every device."""
    return hashlib.sha256(coefficients).digest()[:16]


def update_of(device: str, plan: Plan, model_digest: bytes, **fields: object) -> Update:
    """An update of made-up scalars: exact in f16, different for every device, round and step."""
    number = 1 + sum(device.encode()) % 7
    scalars = [(-1.0) ** j * (number + j + plan.round) / 8 for j in range(plan.local_steps)]
    update = Update(
        round=plan.round,
        samples=10 * number,
        train_loss=2.5 - plan.round / 8,
        held_out_loss=2.75 - plan.round / 8 if plan.evaluate else None,
        held_out_accuracy=0.5 if plan.evaluate else None,
        model_digest=model_digest,
        scalars=scalars_to_bytes(np.array(scalars, np.float32), "f16"),
        change=None,
    )
    return msgspec.structs.replace(update, **fields)
