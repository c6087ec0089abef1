"""Who is there under a device's name: announced again when it must be, and noticed when it is another."""

from __future__ import annotations

import pytest

from edge_client import session
from edge_client.events import Action, Publish, Subscribe, Taken, Tick
from shared.messages import Presence
from shared.transport import TAKEN_OVER, Connected, Disconnected
from tests.driven_session import PRESENCE_TOPIC, Driven, finish, only

ONLINE = Publish(PRESENCE_TOPIC, Presence(True, 5, 1, 1, "kseed 0", ""), retain=True)


def reconnected() -> Driven:
    driven = Driven().joined()
    actions = driven.on(Disconnected("cut"), Connected("MQTT 5", True))
    assert actions[-1] == Subscribe(PRESENCE_TOPIC)
    assert not only(actions, Publish)
    return driven


def test_agent_whose_will_was_published_announces_again_after_the_reconnection():
    driven = reconnected()
    assert driven.hear(session.presence(driven.state, online=False), is_retained=True) == [ONLINE]
    assert not only(driven.on(Tick(10.0, 0), Taken("presence")), Publish)


def test_agent_that_is_still_announced_after_the_reconnection_spares_the_bytes():
    driven = reconnected()
    assert driven.hear(session.presence(driven.state, online=True), is_retained=True) == []
    assert not only(driven.on(Tick(10.0, 0)), Publish)


def test_agent_announces_again_where_the_broker_has_forgotten_its_presence():
    driven = reconnected()
    assert not only(driven.on(Tick(4.9, 0)), Publish)
    assert only(driven.on(Tick(5.0, 0), Tick(6.0, 0), Taken("presence"), Tick(7.0, 0)), Publish) == [ONLINE]


def test_agent_whose_place_was_taken_while_it_was_away_ends_without_announcing():
    driven = reconnected()
    actions = driven.hear(Presence(True, 6, 1, 1, "kseed 0", ""), is_retained=True)
    assert finish(actions).exit_code == 3
    assert not only(actions, Publish)


def test_second_agent_that_is_thrown_out_before_it_announced_announces_at_once():
    driven = Driven()
    driven.on(Connected("MQTT 5", False), Disconnected("cut"), Connected("MQTT 5", True))
    assert driven.hear(Presence(True, 6, 1, 1, "kseed 0", ""), is_retained=True) == []  # the first is on its way
    driven.on(Taken("presence"))
    assert not driven.state.is_finished


def test_takeover_ends_the_agent_without_touching_the_others_presence():
    driven = Driven().training()
    actions = driven.on(Disconnected(TAKEN_OVER, is_final=True))
    end = finish(actions)
    assert end.exit_code == 3
    assert "another agent runs with the device id 'ann' in run 'demo' (it took over the connection)" in end.text
    assert not only(actions, Publish)


@pytest.mark.parametrize("online", [True, False])
def test_foreign_session_on_the_own_presence_topic_ends_the_agent(online):
    driven = Driven().training()
    end = finish(driven.hear(Presence(online, 6, 1, 1, "kseed 0", "")))
    assert end.exit_code == 3
    assert "give it another --device-id" in end.text


def test_presence_of_a_predecessor_that_died_is_taken_over_in_silence():
    driven = Driven()
    driven.on(Connected("MQTT 5", True))
    assert driven.hear(Presence(True, 6, 1, 1, "kseed 0", ""), is_retained=True) == []
    driven.on(Taken("presence"))
    driven.hear(session.presence(driven.state, online=True))
    (again,) = driven.hear(Presence(False, 6, 1, 1, "kseed 0", ""))
    assert again == Publish(PRESENCE_TOPIC, session.presence(driven.state, online=True), retain=True)


def test_who_contradicts_without_end_is_answered_now_and_then():
    driven = Driven().joined()
    others = session.presence(driven.state, online=False)
    answers: list[Action] = []
    for tenth in range(1, 101):
        answers += only(driven.on(Tick(100.0 + tenth / 10, 0)), Publish)
        answers += driven.on(Taken("presence"))
        answers += driven.hear(others)
    assert set(answers) == {ONLINE}
    assert len(answers) == 2  # at once, and after five seconds, in ten
    driven.hear(session.presence(driven.state, online=True))
    assert not only(driven.on(Taken("presence"), Tick(200.0, 0)), Publish)


def test_own_will_that_comes_late_is_contradicted():
    driven = Driven().joined()
    (again,) = driven.hear(session.presence(driven.state, online=False))
    assert again == Publish(PRESENCE_TOPIC, session.presence(driven.state, online=True), retain=True)
