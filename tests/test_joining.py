"""The session until it follows its first plan: connecting, and whether model, run and protocol fit."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from edge_client.events import CloseRound, Garbled, LoadModel, ModelReady, Publish, Say, Subscribe, Tick
from edge_client.state import Limits
from shared.errors import PeerError
from shared.manifest import Manifest, Tensor
from shared.messages import Presence
from shared.refusals import Refusal
from shared.topics import Topic
from shared.transport import Connected, Disconnected
from tests.driven_session import IDENTITY, MANIFEST, PLAN, PLAN_TOPIC, PRESENCE_TOPIC, RUN, Driven, finish, only, texts


def test_first_connection_announces_and_subscribes_to_everything_but_the_snapshot():
    actions = Driven().on(Connected("MQTT 5", False))
    assert actions[1:] == [
        Subscribe(PRESENCE_TOPIC),
        Publish(PRESENCE_TOPIC, Presence(True, 5, 1, 1, "kseed 0", ""), retain=True),
        Subscribe(Topic("demo", "run")),
        Subscribe(PLAN_TOPIC),
        Subscribe(Topic("demo", "receipt", "ann")),
    ]


def test_model_is_loaded_once_run_and_plan_are_known_in_either_order():
    run_first, plan_first = Driven(), Driven()
    assert run_first.hear(RUN) == []
    assert run_first.hear(PLAN) == [LoadModel(RUN)]
    assert plan_first.hear(PLAN) == []
    assert plan_first.hear(RUN) == [LoadModel(RUN)]


def test_model_is_not_loaded_for_a_finished_run():
    driven = Driven().joined()
    end = finish(driven.hear(msgspec.structs.replace(PLAN, phase="finished", reason="ten rounds")))
    assert (end.exit_code, end.text) == (0, "run 'demo' is finished at version 3: ten rounds")


def test_model_with_another_manifest_is_refused_naming_the_first_difference():
    driven = Driven().joined()
    driven.hear(PLAN)
    other = Manifest((Tensor("head.weight", (4, 9)), Tensor("norm.weight", (8,))))
    actions = driven.on(ModelReady(other, RUN.base_digest))
    end = finish(actions)
    assert end.exit_code == 2
    assert "tensor 'head.weight' has the shape [4, 9] in this model and [4, 8] in the run" in end.text
    assert "Give 'tiny' with --model" in end.text
    assert not only(actions, CloseRound)
    assert only(actions, Publish)[-1] == Publish(PRESENCE_TOPIC, Presence(False, 5, 1, 1, "kseed 0", ""), retain=True)


def test_model_with_other_weights_is_refused_naming_both_digests():
    driven = Driven().joined()
    driven.hear(PLAN)
    end = finish(driven.on(ModelReady(MANIFEST, b"\x22" * 32)))
    assert end.exit_code == 2
    assert "digest 2222222222222222, the run has 1111111111111111" in end.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pool_key": 8}, "pool_key was 7 and is 8"),
        ({"base_digest": b"\x33" * 32}, "base_digest was 1111111111111111 and is 3333333333333333"),
        ({"dtype": "bf16"}, "dtype was fp32 and is bf16"),
        ({"seeds": 512}, "seeds was 256 and is 512"),
    ],
)
def test_run_of_the_same_name_with_another_identity_ends_the_agent(change, named):
    driven = Driven().training()
    end = finish(driven.hear(msgspec.structs.replace(RUN, **change)))
    assert end.exit_code == 3
    assert named in end.text


def test_run_message_that_only_renames_its_model_changes_nothing():
    driven = Driven().training()
    before = driven.state
    assert driven.hear(msgspec.structs.replace(RUN, model="org/tiny")) == []
    assert driven.state == before


@pytest.mark.parametrize(
    ("version", "older"), [(2, "Upgrade this agent."), (0, "Upgrade the aggregator.")], ids=["newer", "older"]
)
def test_run_of_another_protocol_version_says_which_side_to_upgrade(version, older):
    error = PeerError(Refusal.UNSUPPORTED_VERSION, "")
    end = finish(Driven().on(Garbled("kseed/demo/run", error, version)))
    assert end.exit_code == 3
    assert f"speaks protocol version {version}, this agent 1 to 1. {older}" in end.text


def test_stray_message_of_another_version_in_mid_run_is_a_warning_only():
    driven = Driven().training()
    before = driven.state
    (said,) = driven.on(Garbled("kseed/demo/plan", PeerError(Refusal.UNSUPPORTED_VERSION, ""), 2))
    assert isinstance(said, Say)
    assert said.text.endswith("Upgrade this agent.")
    assert driven.state == before


def test_unknown_run_ends_with_the_names_of_run_and_broker():
    driven = Driven()
    driven.on(Connected("MQTT 5", False), Tick(14.9, 0))
    end = finish(driven.on(Tick(15.0, 0)))
    assert (end.exit_code, end.text) == (
        2,
        "broker localhost:1883 has no run 'demo' (waited 15 s). Check the name, or wait for it with --wait.",
    )


def test_broker_that_is_not_there_ends_with_its_reason():
    driven = Driven()
    said = driven.on(Disconnected("connection refused"), Disconnected("connection refused"))
    assert texts(said) == "cannot connect to broker localhost:1883: connection refused; trying again"
    end = finish(driven.on(Tick(30.0, 0)))
    assert end.exit_code == 4
    assert "no connection to broker localhost:1883 in 30 s: connection refused" in end.text


def test_waiting_agent_has_no_time_limits():
    driven = Driven(replace(IDENTITY, limits=Limits(connect_timeout_s=None, run_timeout_s=None)))
    actions = driven.on(Tick(1e6, 0), Connected("MQTT 5", False), Tick(2e6, 0), Tick(3e6, 0))
    assert texts(actions).count("broker localhost:1883 has no run 'demo' yet; waiting for its aggregator") == 1
    assert not driven.state.is_finished


def test_run_without_a_plan_is_said_once():
    driven = Driven().joined()
    assert texts(driven.on(Tick(20.0, 0), Tick(40.0, 0))) == "run 'demo' has no plan yet; waiting for its aggregator"


def test_connection_refused_for_good_ends_the_agent():
    end = finish(Driven().on(Disconnected("bad user name or password", is_final=True)))
    assert (end.exit_code, end.text) == (4, "broker localhost:1883: bad user name or password")
