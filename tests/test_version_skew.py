"""Agents and aggregators one protocol version apart: they work together, or part as PROTOCOL.md, section 4, promises.

Everybody is the real thing over the in-process network. A side of another version is one whose payloads have another
first byte on their way, except receipts and presence, which are the same in every version.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from small_fleet import SmallFleet

from aggregator.config import RunConfig
from shared.messages import Presence, Receipt
from shared.refusals import Refusal
from shared.topics import parse_topic
from shared.transport import Received
from shared.wire import MIN_VERSION, PROTOCOL_VERSION, decode, encode

BEHIND, AHEAD = PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1
SAME_IN_ALL = ("receipt", "presence")


class Stamped:
    """A transport whose side writes and reads `version`, though its code says PROTOCOL_VERSION."""

    def __init__(self, transport, version, kinds=("run", "plan", "snapshot", "update")):
        self._transport, self._shift, self._kinds = transport, version - PROTOCOL_VERSION, kinds
        self.published: list[tuple[str, bytes]] = []

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def publish(self, topic, payload, *, retain=False):
        payload = self._shifted(topic, payload, self._shift)
        self.published.append((topic, payload))
        return self._transport.publish(topic, payload, retain=retain)

    def poll(self, timeout_s):
        event = self._transport.poll(timeout_s)
        if isinstance(event, Received):
            return replace(event, payload=self._shifted(event.topic, event.payload, -self._shift))
        return event

    def _shifted(self, topic, payload, shift):
        kind = parse_topic(topic).kind
        return bytes(((payload[0] + shift) % 256,)) + payload[1:] if kind in self._kinds and payload else payload


class Skewed(SmallFleet):
    """A small fleet in which everybody who connects may be of another version."""

    def stamp(self, version, **options):
        """Whoever connects from now on is of `version`."""
        plain_transport = type(self.network).transport

        def stamped(client_id, **kept):
            self.stamped = Stamped(plain_transport(self.network, client_id, **kept), version, **options)
            return self.stamped

        self.network.transport = stamped

    def unstamp(self):
        """Whoever connects from now on is of this version."""
        del self.network.transport


def fleet_of(tmp_path, **options):
    settings = {"seeds": 256, "rounds": 3, "local_steps": 3, "quorum": 2, "deadline_s": 20.0, **options}
    return Skewed(tmp_path, RunConfig(**settings))


def accepted(fleet):
    return {row.device: row.updates for row in fleet.store.devices("demo")}


@pytest.mark.parametrize(("version", "older"), [(AHEAD, "this agent"), (BEHIND, "the aggregator")])
def test_agent_leaves_a_run_of_another_version_naming_both_and_the_side_to_upgrade(tmp_path, version, older):
    fleet = fleet_of(tmp_path)
    fleet.network.kill("aggregator")
    fleet.stamp(version)
    fleet.serve()
    aggregators = fleet.stamped
    fleet.unstamp()
    agent = fleet.join("ann")
    before = fleet.service.state
    fleet.run_until(lambda: agent.ending is not None, turns=200)
    assert agent.ending.exit_code == 3
    assert f"protocol version {version}, this agent {MIN_VERSION} to {PROTOCOL_VERSION}. Upgrade {older}." in str(
        agent.ending.text
    )
    assert agent._trainer.loads == 0
    assert fleet.service.state.updates == before.updates and not accepted(fleet)
    goodbye = fleet.network.retained["kseed/demo/presence/ann"]
    assert goodbye[0] == 1 and decode("presence", goodbye).online is False
    assert {payload[0] for topic, payload in aggregators.published if "/receipt/" not in topic} == {version}


@pytest.mark.parametrize("version", [BEHIND, AHEAD])
def test_agent_of_another_version_leaves_and_the_others_go_on_without_it(tmp_path, version):
    fleet = fleet_of(tmp_path)
    fleet.stamp(version)
    stranger, told = fleet.join("cas"), fleet.stamped
    fleet.unstamp()
    for device in ("ann", "bob"):
        fleet.join(device)
    fleet.run_to_the_end()
    assert stranger.ending.exit_code == 3
    assert "Upgrade" in stranger.ending.text
    assert {parse_topic(topic).kind for topic, _ in told.published} == {"presence"}
    assert all(payload[0] == 1 for _, payload in told.published)
    assert accepted(fleet) == {"ann": 3, "bob": 3}
    coefficients = fleet.coefficients

    (tmp_path / "alone").mkdir()
    alone = fleet_of(tmp_path / "alone")
    for device in ("ann", "bob"):
        alone.join(device)
    alone.run_to_the_end()
    assert coefficients.tobytes() == alone.coefficients.tobytes()


@pytest.mark.parametrize("version", [BEHIND, AHEAD])
def test_update_of_another_version_is_answered_changes_nothing_and_stops_its_agent(tmp_path, version):
    fleet = fleet_of(tmp_path)
    fleet.stamp(version, kinds=("update",))  # it follows the run, and yet writes its own version
    stranger, uplink = fleet.join("cas"), fleet.stamped
    fleet.unstamp()
    heard = fleet.network.transport("reader")
    heard.start()
    heard.subscribe("kseed/demo/receipt/cas")
    fleet.run_until(lambda: stranger.ending is not None, turns=400)
    sent = [payload for topic, payload in uplink.published if "/update/" in topic]
    assert sent and {payload[0] for payload in sent} == {version}
    assert not fleet.service.state.updates and fleet.service.state.progress.round == 0
    receipts = []
    while len(receipts) < 1 and (event := heard.poll(0.0)) is not None:
        receipts += [event.payload] if isinstance(event, Received) else []
    (payload,) = receipts
    receipt = decode("receipt", payload)
    assert payload[0] == 1 and isinstance(receipt, Receipt)
    assert receipt.code == Refusal.UNSUPPORTED_VERSION
    assert f"version {version}" in receipt.detail and f"speaks {PROTOCOL_VERSION}" in receipt.detail
    assert stranger.ending.exit_code == 3 and "upgrade the older side" in stranger.ending.text
    for device in ("ann", "bob"):
        fleet.join(device)
    fleet.run_to_the_end()
    assert accepted(fleet) == {"ann": 3, "bob": 3}


class Newer(Stamped):
    """The side of an agent that speaks the next version too, and says so in its presence."""

    def __init__(self, transport):
        super().__init__(transport, PROTOCOL_VERSION)

    def publish(self, topic, payload, *, retain=False):
        return super().publish(topic, self._saying(topic, payload, AHEAD), retain=retain)

    def poll(self, timeout_s):
        event = super().poll(timeout_s)
        if isinstance(event, Received):  # what its own code would say of itself
            return replace(event, payload=self._saying(event.topic, event.payload, PROTOCOL_VERSION))
        return event

    def _saying(self, topic, payload, newest):
        if parse_topic(topic).kind != "presence":
            return payload
        return encode(msgspec.structs.replace(decode("presence", payload), protocol_max=newest))


def test_agent_one_version_ahead_that_still_speaks_the_runs_version_takes_part(tmp_path):
    fleet = fleet_of(tmp_path)
    real = fleet.network.transport
    fleet.network.transport = lambda client_id, **kept: Newer(real(client_id, **kept))
    fleet.join("ann")
    fleet.network.transport = real
    fleet.join("bob")
    fleet.run_until(lambda: "kseed/demo/presence/ann" in fleet.network.retained)
    newer = decode("presence", fleet.network.retained["kseed/demo/presence/ann"])
    assert isinstance(newer, Presence) and (newer.protocol_min, newer.protocol_max) == (MIN_VERSION, AHEAD)
    fleet.run_to_the_end()
    assert accepted(fleet) == {"ann": 3, "bob": 3}
    assert all(agent.ending.exit_code == 0 for agent in fleet.agents.values())


def test_aggregator_that_comes_back_in_another_version_refuses_its_agents_and_counts_nothing(tmp_path):
    fleet = fleet_of(tmp_path, quorum=2, local_steps=50)
    agent = fleet.join("ann")
    fleet.run_until(lambda: agent._jobs.has_job)
    fleet.network.kill("aggregator")
    fleet.stamp(AHEAD)
    fleet.serve()
    fleet.unstamp()
    fleet.run_until(lambda: agent.ending is not None, turns=400)
    assert agent.ending.exit_code == 3
    said = fleet.screens["ann"].getvalue() + agent.ending.text
    assert f"speaks protocol version {AHEAD}" in said and "Upgrade this agent" in said
    assert not accepted(fleet)


def test_receipts_and_presence_keep_their_first_byte_in_every_version():
    for message in (Receipt(3, 11, "x"), Presence(True, 1, 1, AHEAD, "agent", "")):
        payload = encode(message)
        assert payload[0] == 1, "PROTOCOL.md, section 4: always 1, whatever PROTOCOL_VERSION becomes"
