"""Floods: every queue of the aggregator is bounded, nobody is dropped in silence, everything counts in the end."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest

from aggregator import admission, intake
from aggregator.events import SendReceipt
from aggregator.rounds import step
from shared.refusals import Refusal
from shared.transport import Delivered, Received
from shared.wire import encode
from tests.aggregator_setting import Device, Setting
from tests.runs import after, arrival, opened, update_of


class Stuck:
    """A transport whose broker takes nothing from us for a while: no Delivered comes."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.is_stuck = True
        self._held: deque[Delivered] = deque()
        self.acknowledged = 0

    def poll(self, timeout_s: float) -> Any:
        if not self.is_stuck and self._held:
            return self._held.popleft()
        while isinstance(event := self._inner.poll(timeout_s), Delivered) and self.is_stuck:
            self._held.append(event)
        if isinstance(event, Received):
            return Received(event.topic, event.payload, event.is_retained, lambda: self._acknowledge(event))
        return event

    def _acknowledge(self, event: Received) -> None:
        self.acknowledged += 1
        event.acknowledge()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_WAITING", 20)
    monkeypatch.setattr(intake, "MAX_UNSETTLED", 30)
    monkeypatch.setattr(intake, "ROOM_FOR_BUSY", 10)


def stuck(setting: Setting) -> Stuck:
    setting.run()
    transport = Stuck(setting.service._transport)
    setting.service._transport = setting.service._answers._transport = transport  # type: ignore[assignment]
    return transport


def test_while_the_broker_takes_no_answers_nothing_is_decided_and_the_rest_is_told_to_wait(
    tmp_path: Path, small: None
) -> None:
    setting = Setting(tmp_path, quorum=1000)
    transport = stuck(setting)
    devices = [Device(setting.network, f"d{i:03}") for i in range(200)]
    for device in devices:
        device.send(update_of())
    setting.run(*devices, turns=30)
    codes = [code for device in devices for code in device.codes]
    accepted, busy = codes.count(Refusal.ACCEPTED), codes.count(Refusal.BUSY)
    assert accepted + busy == len(codes) == transport.acknowledged  # acknowledged is answered
    assert 0 < accepted <= 30
    assert 0 < busy <= 40
    assert setting.service._answers.unsettled == 40
    # The loopback has no window. What waits here beyond MAX_WAITING is what a real broker would not have sent.
    assert len(setting.service._intake) == 200 - len(codes)
    assert len(setting.state.updates) == accepted


def test_when_the_broker_is_back_every_update_is_accepted_and_everyone_knows(tmp_path: Path, small: None) -> None:
    setting = Setting(tmp_path, quorum=1000)
    transport = stuck(setting)
    devices = [Device(setting.network, f"d{i:03}") for i in range(200)]
    for device in devices:
        device.send(update_of())
    setting.run(*devices, turns=10)
    transport.is_stuck = False
    answered = dict.fromkeys(devices, 0)
    for _ in range(60):
        setting.run(*devices, turns=1)
        for device in devices:
            if len(device.codes) > answered[device] and device.codes[-1] is Refusal.BUSY:
                answered[device] = len(device.codes)
                device.send(update_of())
    assert [device.codes[-1] for device in devices] == [Refusal.ACCEPTED] * 200
    assert len(setting.state.updates) == 200
    assert not len(setting.service._intake)


def test_a_busy_receipt_names_the_round_of_the_update(setting_of_two: Setting, small: None) -> None:
    setting = setting_of_two
    stuck(setting)
    setting.service._answers.unsettled = 30
    devices = [Device(setting.network, f"d{i:03}") for i in range(30)]
    for device in devices:
        device.send(update_of(7))
    setting.run(*devices, turns=2)
    told = [m for device in devices for m in device.heard if getattr(m, "code", None) == Refusal.BUSY]
    assert told
    assert {message.round for message in told} == {7}


@pytest.fixture
def setting_of_two(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def test_what_waits_when_the_connection_is_lost_comes_again_and_counts_once(tmp_path: Path, small: None) -> None:
    setting = Setting(tmp_path, quorum=1000)
    transport = stuck(setting)
    setting.service._answers.unsettled = 30
    devices = [Device(setting.network, f"d{i}") for i in range(10)]
    for device in devices:
        device.send(update_of())
    setting.run(turns=2)
    assert len(setting.service._intake) == 10
    setting.network.cut("aggregator")
    setting.run(turns=1)
    assert len(setting.service._intake) == 0
    transport.is_stuck = False
    setting.service._answers.unsettled = 0
    setting.run(*devices, turns=60)
    assert len(setting.state.updates) == 10
    assert all(device.codes == [Refusal.ACCEPTED] for device in devices)


def test_long_updates_that_wait_are_bounded_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = encode(update_of())
    monkeypatch.setattr(intake, "MAX_WAITING_BYTES", 5 * len(payload))
    setting = Setting(tmp_path)
    queue = intake.Intake(setting.service._answers)
    message = Received("kseed/night/update/a", payload, False)
    assert [queue.offer(message) for _ in range(7)] == ["waits"] * 5 + ["busy"] * 2
    assert queue.take(0) is not None
    assert [queue.offer(message) for _ in range(2)] == ["waits", "busy"]
    queue.clear()
    assert queue.offer(message) == "waits"


def test_answers_in_flight_go_by_the_smaller_of_what_we_want_and_what_the_broker_names() -> None:
    from shared.outgoing import MOST_IN_FLIGHT, Outgoing, Publication

    for wanted, named, expected in ((500, 1000, 500), (500, 50, 50), (500, None, MOST_IN_FLIGHT), (20, 1000, 20)):
        outgoing = Outgoing(wanted)
        for token in range(600):
            outgoing.add(Publication(token, "t", b"", False))
        outgoing.connected(named, None)
        taken = 0
        while outgoing.take() is not None:
            taken += 1
        assert taken == expected


# --- memory of the round


def test_late_updates_cannot_fill_a_round() -> None:
    state = opened(late="fold", quorum=2, rounds=9)
    state = after(state, arrival("a", update_of()), arrival("b", update_of())).state
    assert state.progress.round == 1
    codes = []
    for number in range(12):
        before = state
        state, actions = step(state, arrival(f"d{number}", update_of(0)))
        codes += [action.receipt.code for action in actions if isinstance(action, SendReceipt)]
        assert (state is before) == (codes[-1] == Refusal.BUSY)
    assert codes == [0] * (2 * admission.FULL_ROUND) + [Refusal.BUSY] * (12 - 2 * admission.FULL_ROUND)
    state = after(state, arrival("a", update_of(1)), arrival("b", update_of(1))).state  # those it waits for get in
    assert state.progress.round == 2
    assert step(state, arrival("d11", update_of(0))).state is not state  # and the others may try again
