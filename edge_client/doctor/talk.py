"""MQTT with the broker: the login, its limits, the own topics, and what is known of the run.

The doctor speaks under the agent's own id, because access rules tie topics to it. So it must not do so while the agent
is connected, which would be thrown out; then the agent's status answers in its place. The session is the agent's own:
what waits there for the agent is not acknowledged, and the doctor's own message is not retained.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from edge_client.doctor.check import Seen, Trouble
from shared.config import BrokerConfig
from shared.counted_client import Meter
from shared.errors import PeerError
from shared.messages import Plan, Presence, Run
from shared.mqtt_link import Accepted, Answered, Arrived, Cause, Ended, LinkEvent, Subscribed
from shared.mqtt_settings import Settings, tls_context
from shared.outgoing import Publication
from shared.paho_link import PahoLink
from shared.reconnecting import MqttVersion
from shared.topics import Kind, Topic
from shared.wire import LIMIT_BYTES, MIN_VERSION, PROTOCOL_VERSION, decode, encode

ANSWER_S = 5.0
PACKET_OVERHEAD_BYTES = 512  # header, topic (at most 140) and properties
RULES = "kseed-aggregator broker-config writes the access rules that kseed needs (PROTOCOL.md, section 2)."


class Talk:
    """One conversation with the broker; the checks go through it in order."""

    def __init__(self, broker: BrokerConfig, run: str, device: str, agent: str, session_expiry_s: int) -> None:
        """agent: software and version. session_expiry_s: the agent's, because the session is."""
        self._broker, self._run, self._device, self._agent = broker, run, device, agent
        self._session_expiry_s = session_expiry_s
        self._link: PahoLink | None = None
        self._seen: list[LinkEvent] = []
        self._wake, self._other_end = socket.socketpair()
        self.run: Run | None = None
        self.plan: Plan | None = None

    def login(self) -> Seen:
        """CONNECT, in MQTT 5 or, where the broker cannot, 3.1.1."""
        versions: tuple[MqttVersion, ...] = ("MQTT 5", "MQTT 3.1.1")
        for version in versions:
            ended = self._open(version)
            if ended is None:
                break
            if ended.cause not in (Cause.UNANSWERED, Cause.WRONG_VERSION) or version == versions[-1]:
                raise Trouble(ended.reason, _login_remedy(ended.cause, self._broker))
        accepted = self._accepted()
        known = "knows this device from before" if accepted.session_present else "does not know this device yet"
        login = f"login {self._broker.username}" if self._broker.username else "no login"
        return Seen(f"{version}, client id {self._device}, {login}; the broker {known}")

    def limits(self) -> Seen:
        """What the broker said of itself."""
        accepted, longest = self._accepted(), max(LIMIT_BYTES.values()) + PACKET_OVERHEAD_BYTES
        packet = accepted.largest_packet_bytes
        window = accepted.receive_maximum
        text = (
            f"packets up to {packet or 'any number of'} bytes, {window or 'any number of'} in flight, "
            f"a keepalive of {accepted.keepalive_s or self._broker.keepalive_s} s"
        )
        if packet is None or packet >= longest:
            return Seen(text)
        own = LIMIT_BYTES["update"] + PACKET_OVERHEAD_BYTES
        if packet < own:
            raise Trouble(f"{text}; an update may need {own}", f"mosquitto: max_packet_size {longest}.")
        return Seen(f"{text}; the longest message of kseed needs {longest}", f"mosquitto: max_packet_size {longest}.")

    def topics(self) -> Seen:
        """Publish on the own presence topic, and hear it."""
        assert self._link is not None
        topic = Topic(self._run, "presence", self._device)
        ours = Presence(False, secrets.randbits(64), MIN_VERSION, PROTOCOL_VERSION, self._agent, "kseed-edge doctor")
        refusal = self._subscribe(topic)
        if refusal is not None:
            raise Trouble(f"the broker refuses the subscription to {topic}: {refusal}", RULES)
        payload, began_s = encode(ours), time.perf_counter()
        self._link.publish(Publication(1, str(topic), payload, retain=False))
        answer = self._wait(lambda event: isinstance(event, Answered))
        if not isinstance(answer, Answered):
            raise Trouble(f"{topic}: the broker does not say that it has the message", "Check the broker's log.")
        if answer.failure is not None:
            raise Trouble(f"{topic}: {answer.failure}", RULES)
        taken_ms = (time.perf_counter() - began_s) * 1000
        heard = self._wait(lambda event: isinstance(event, Arrived) and event.payload == payload)
        if not isinstance(heard, Arrived):
            raise Trouble(
                f"{topic}: the broker took a message, and did not send it back in {ANSWER_S:.0f} s",
                f"It may not let this device read the topic, or drops what it writes. {RULES}",
            )
        self._link.acknowledge(heard.packet_id)
        text = f"{topic}: taken after {taken_ms:.3g} ms, heard after {(time.perf_counter() - began_s) * 1000:.3g} ms"
        if self._was_online(str(topic)):
            return Seen(
                f"{text}; an agent with this id was online, on another machine or with another state folder",
                "Every agent needs a device id of its own; the doctor has just taken this one's connection.",
            )
        return Seen(text)

    def about_run(self) -> Seen:
        """The run and its plan, as the broker keeps them."""
        for kind in ("run", "plan"):
            topic = Topic(self._run, kind)
            if (refusal := self._subscribe(topic)) is not None:
                raise Trouble(f"the broker refuses the subscription to {topic}: {refusal}", RULES)
        self.run, self.plan = self._message("run", Run), self._message("plan", Plan)
        if self.run is None:
            return Seen(
                f"the broker has no run {self._run!r}",
                "Check run under [agent]; or nothing is wrong, and its aggregator has not begun. `up` waits for it.",
            )
        plan = "no plan yet" if self.plan is None else f"round {self.plan.round}, {self.plan.phase}"
        return Seen(f"{self._run!r}: {self.run.model} in {self.run.dtype}, K = {self.run.seeds}; {plan}")

    def close(self) -> None:
        """Say goodbye."""
        if self._link is not None:
            self._link.disconnect()
            self._wait(lambda event: isinstance(event, Ended))
            self._link.abort()
        self._wake.close()
        self._other_end.close()

    def _open(self, version: MqttVersion) -> Ended | None:
        """None where it was accepted."""
        broker = self._broker
        settings = Settings(
            broker, broker.password(), tls_context(broker), self._device, None, self._session_expiry_s, ANSWER_S
        )
        self._seen.clear()
        link = PahoLink(settings, version, Meter())
        link.open()
        self._link = link
        event = self._wait(lambda event: isinstance(event, (Accepted, Ended)), 3 * ANSWER_S)
        if isinstance(event, Accepted):
            return None
        self._link = None
        link.abort()
        return event if isinstance(event, Ended) else Ended(Cause.UNANSWERED, "the broker does not answer")

    def _accepted(self) -> Accepted:
        return next(event for event in self._seen if isinstance(event, Accepted))

    def _subscribe(self, topic: Topic) -> str | None:
        """Why the broker refused; None where it did not."""
        assert self._link is not None
        self._link.subscribe(str(topic))
        event = self._wait(lambda event: isinstance(event, Subscribed) and event.topic_filter == str(topic))
        return event.failure if isinstance(event, Subscribed) else "it did not answer"

    def _message(self, kind: Kind, wanted: type[Run] | type[Plan]) -> Any:
        topic = str(Topic(self._run, kind))
        event = self._wait(lambda event: isinstance(event, Arrived) and event.topic == topic, 1.0)
        if not isinstance(event, Arrived):
            return None
        try:
            message = decode(kind, event.payload)
        except PeerError as error:
            raise Trouble(f"{topic}: {error}", "Agent and aggregator may be of versions that do not fit.") from error
        return message if isinstance(message, wanted) else None

    def _was_online(self, topic: str) -> bool:
        for event in self._seen:
            if isinstance(event, Arrived) and event.topic == topic and event.is_retained:
                try:
                    presence = decode("presence", event.payload)
                except PeerError:
                    continue
                return isinstance(presence, Presence) and presence.online
        return False

    def _wait(self, is_wanted: Callable[[LinkEvent], bool], timeout_s: float = ANSWER_S) -> LinkEvent | None:
        """The first such event since the connection began; None where it does not come."""
        until_s = time.monotonic() + timeout_s
        while True:
            found = next((event for event in self._seen if is_wanted(event)), None)
            if found is not None or self._link is None or any(isinstance(event, Ended) for event in self._seen):
                return found
            if (left_s := until_s - time.monotonic()) <= 0:
                return None
            self._seen += self._link.step(self._wake, left_s)


def _login_remedy(cause: Cause, broker: BrokerConfig) -> str:
    if cause is Cause.CREDENTIALS:
        if broker.username is None:
            return "Give username and password_file under [broker]."
        return f"Check username ({broker.username}) and password_file ({broker.password_file}) under [broker]. {RULES}"
    if cause is Cause.UNANSWERED:
        return "Check that an MQTT broker listens there, and whether it wants TLS or a client certificate (cert_file)."
    if cause is Cause.UNFIT:
        return "Allow QoS 1 and retained messages on the broker."
    return "Read the broker's log: it says why it closed the connection."
