"""Commit, then send, then acknowledge: what the aggregator keeps over kills, lost messages and a store that fails."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.state import coefficients_of
from aggregator.store import Store
from shared.faults import Fault, Faults, Strike
from shared.messages import Plan, Snapshot
from shared.refusals import Refusal
from shared.transport import Received, Transport
from shared.wire import scalars_to_bytes
from tests.aggregator_setting import Device, Setting, setting
from tests.runs import update_of

__all__ = ["setting"]  # fixture


class Mute:
    """A transport from which nothing gets out."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        return 0

    def poll(self, timeout_s: float) -> Any:
        event = self._inner.poll(timeout_s)
        return Received(event.topic, event.payload, event.is_retained) if isinstance(event, Received) else event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_killed_aggregator_goes_on_exactly_where_it_was(setting: Setting) -> None:
    a, b = Device(setting.network, "a"), Device(setting.network, "b")
    setting.run(a, b)
    a.send(update_of())
    setting.run(a, b)
    before = setting.state
    setting.restart()
    assert setting.state == before
    b.send(update_of())
    a.send(update_of())  # its receipt may have been lost
    setting.run(a, b)
    assert a.codes == [Refusal.ACCEPTED, Refusal.DUPLICATE]
    assert setting.state.progress.round == 1


def test_killed_between_commit_and_publish_the_plan_still_comes_out(setting: Setting) -> None:
    a, b = Device(setting.network, "a"), Device(setting.network, "b")
    setting.run(a, b)
    a.send(update_of())
    b.send(update_of())
    dead = setting.service
    dead._transport = dead._answers._transport = Mute(dead._transport)  # type: ignore[assignment]
    dead.turn(0)  # commits, but nothing gets out
    assert setting.store.state("night").progress.round == 1
    a.listen()
    assert not a.codes
    setting.restart()
    setting.run(a, b)
    assert [m.round for m in a.heard if isinstance(m, Plan)] == [0, 1]
    assert [coefficients_of(m.coefficients).any() for m in a.heard if isinstance(m, Snapshot)] == [False, True]
    assert set(a.codes) <= {Refusal.DUPLICATE}  # its update was not acknowledged, so the broker brought it again


def test_an_update_is_acknowledged_only_after_it_is_stored(setting: Setting) -> None:
    setting.run()
    seen: list[bool] = []
    inner = setting.service._transport

    class Watching(Mute):
        def poll(self, timeout_s: float) -> Any:
            event = inner.poll(timeout_s)
            if isinstance(event, Received):
                return Received(event.topic, event.payload, False, lambda: seen.append(is_stored()))
            return event

        def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
            seen.append(is_stored())
            return 0

    def is_stored() -> bool:
        with Store.open(setting.path, may_write=False) as reader:
            return "a" in reader.state("night").updates

    setting.service._transport = setting.service._answers._transport = Watching(inner)  # type: ignore[assignment]
    Device(setting.network, "a").send(update_of())
    setting.run()
    assert seen == [True, True]  # the receipt, then the acknowledgement


PAIRS = list(
    itertools.combinations([Fault.DROP, Fault.DUPLICATE, Fault.REORDER, Fault.DELAY, Fault.VANISH, Fault.CUT], 2)
)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_any_two_faults_leave_the_fold_of_the_accepted_updates(tmp_path: Path, one: Fault, other: Fault) -> None:
    strikes = (Strike(one, 1, "update/"), Strike(other, 2, "update/"), Strike(other, 1, "plan"))
    setting = Setting(tmp_path, Faults(strikes), rounds=6, quorum=2)
    calm = Setting(tmp_path / "calm", rounds=6, quorum=2)
    for here in (setting, calm):
        devices = [Device(here.network, name) for name in "ab"]
        here.run(*devices)
        for _ in range(200):
            if here.state.progress.phase == "finished":
                break
            for number, device in enumerate(devices):
                scalars = scalars_to_bytes(np.array([here.state.progress.round, number + 1.5], np.float32), "f32")
                device.send(update_of(here.state.progress.round, scalars=scalars))  # a device resends till it is told
            here.run(*devices)
    assert setting.network.struck
    assert setting.state.progress.phase == "finished"
    assert setting.state.coefficients == calm.state.coefficients


def test_a_hundred_updates_that_wait_share_a_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, quorum=100)
    setting.run()
    devices = [Device(setting.network, f"d{i}") for i in range(100)]
    for device in devices:
        device.send(update_of())
    commits: list[int] = []
    real = setting.store.commit
    monkeypatch.setattr(
        setting.store, "commit", lambda run, keeps, *a, **k: (commits.append(len(keeps)), real(run, keeps, *a, **k))
    )
    setting.run(*devices, turns=1)
    assert commits == [102]  # the updates, the version and the progress
    assert all(device.codes == [Refusal.ACCEPTED] for device in devices)


def test_when_nothing_can_be_stored_devices_are_told_to_send_again(setting: Setting) -> None:
    a, b = Device(setting.network, "a"), Device(setting.network, "b")
    setting.run(a, b)
    before = setting.state
    setting.store._do("PRAGMA query_only = ON")
    for device in (a, b):
        device.send(update_of())
    setting.run(a, b)
    assert a.codes == b.codes == [Refusal.STORAGE]  # not STALE, though b came after the round would have closed
    assert setting.state is before
    assert setting.log.count("nothing can be stored") == 1
    setting.store._do("PRAGMA query_only = OFF")
    for device in (a, b):
        device.send(update_of())
    setting.run(a, b)
    assert a.codes == [Refusal.STORAGE, Refusal.ACCEPTED]
    assert setting.state.progress.round == 1
    assert "the store works again" in setting.log


def test_a_run_that_could_not_be_opened_opens_when_the_store_works_again(setting: Setting) -> None:
    setting.store._do("PRAGMA query_only = ON")
    setting.run()
    assert not setting.network.retained
    setting.store._do("PRAGMA query_only = OFF")
    setting.run()
    assert "kseed/night/plan" in setting.network.retained
