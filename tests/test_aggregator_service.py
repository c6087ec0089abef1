"""The aggregator's loop on the in-process network (and once on mosquitto): commit, then send, then acknowledge."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.service import Service
from aggregator.state import State, coefficients_of, new_state
from aggregator.store import Store
from shared.errors import UnavailableError
from shared.faults import Fault, Faults, Strike
from shared.loopback import LoopbackNetwork
from shared.messages import Plan, Receipt, Run, Snapshot, Update
from shared.refusals import Refusal
from shared.topics import parse_topic
from shared.transport import Received, Transport
from shared.wire import decode, encode, scalars_to_bytes
from tests.brokers import config_of, needs_mosquitto, running_mosquitto
from tests.runs import START_MS, spec_of, update_of


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_ms = START_MS

    def __call__(self) -> int:
        return self.now_ms


class Device:
    """A device that answers plans with scalars made of its name, and remembers what it was told."""

    def __init__(self, network: LoopbackNetwork, name: str) -> None:
        self.name = name
        self.transport = network.transport(name)
        for kind in ("run", "plan", "snapshot", f"receipt/{name}"):
            self.transport.subscribe(f"kseed/night/{kind}")
        self.transport.start()
        self.heard: list[Any] = []

    def listen(self) -> list[Any]:
        """Everything that waits."""
        heard = []
        while (event := self.transport.poll(0)) is not None:
            if isinstance(event, Received):
                topic = parse_topic(event.topic)
                assert topic is not None
                heard.append(decode(topic.kind, event.payload))
        self.heard += heard
        return heard

    def send(self, update: Update) -> None:
        self.send_bytes(encode(update))

    def send_bytes(self, payload: bytes, *, retain: bool = False) -> None:
        self.transport.publish(f"kseed/night/update/{self.name}", payload, retain=retain)

    @property
    def codes(self) -> list[Refusal]:
        return [Refusal(message.code) for message in self.heard if isinstance(message, Receipt)]


class Setting:
    """A store, a network, an aggregator and its clock."""

    def __init__(self, folder: Path, faults: Faults | None = None, **settings: Any) -> None:
        self.path = folder / "kseed.sqlite3"
        self.network = LoopbackNetwork(faults)
        self.clock = Clock()
        self.lines: list[str] = []
        self.metrics = folder / "metrics.jsonl"
        self.store = Store.open(self.path, may_create=True)
        self.store.create(spec_of(**settings), START_MS)
        self.service = self.start_service()

    def start_service(self) -> Service:
        transport = self.network.transport("aggregator", manual_acknowledge=True)
        service = Service(self.store, "night", transport, self.clock, self.lines.append, self.metrics)
        service.start()
        return service

    def restart(self) -> None:
        """Kill the aggregator and start it again on the same store."""
        self.network.kill("aggregator")
        self.store.close()
        self.store = Store.open(self.path)
        self.service = self.start_service()

    def run(self, *devices: Device, turns: int = 3) -> None:
        for _ in range(turns):
            self.service.turn(0)
            for device in devices:
                device.listen()

    @property
    def state(self) -> State:
        return self.service.state

    @property
    def log(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.store.close()


def test_a_device_that_connects_late_finds_run_snapshot_and_plan(setting: Setting) -> None:
    setting.run()
    device = Device(setting.network, "a")
    heard = device.listen()
    assert {type(message) for message in heard} == {Run, Snapshot, Plan}
    assert set(setting.network.retained) == {"kseed/night/run", "kseed/night/snapshot", "kseed/night/plan"}


def test_a_round_goes_from_plan_to_the_next_plan(setting: Setting) -> None:
    a, b = Device(setting.network, "a"), Device(setting.network, "b")
    setting.run(a, b)
    a.send(update_of())
    b.send(update_of())
    setting.run(a, b)
    assert a.codes == b.codes == [Refusal.ACCEPTED]
    heard = [type(message) for message in a.heard[3:]]
    assert heard == [Receipt, Snapshot, Plan]
    assert a.heard[-1].round == 1
    assert coefficients_of(a.heard[-2].coefficients).tolist() == coefficients_of(setting.state.coefficients).tolist()
    assert "round 0 of 4 closed: 2 of 2 updates, train loss 2.0000, held-out loss 3.0000" in setting.log
    (record,) = [json.loads(line) for line in setting.metrics.read_text().splitlines()]
    assert (record["run"], record["round"], record["counted"]) == ("night", 0, 2)
    assert record["traffic"]["payload_received_bytes"] == 2 * len(encode(update_of()))


def test_serving_ends_when_the_run_is_finished(tmp_path: Path) -> None:
    setting = Setting(tmp_path, rounds=1, quorum=1)
    setting.run()
    Device(setting.network, "a").send(update_of())
    assert setting.service.serve(lambda: False, wait_for_broker_s=1) == "finished"
    assert setting.state.progress.reason == "all 1 rounds are done"
    again = setting.start_service()
    assert again.serve(lambda: False, wait_for_broker_s=1) == "finished"


def test_serving_ends_when_asked_to_leave(setting: Setting) -> None:
    answers = iter([False, False, True])
    assert setting.service.serve(lambda: next(answers), wait_for_broker_s=1) == "asked to leave"
    assert setting.state.progress.phase == "open"


def test_a_broker_that_is_not_there_is_one_clear_error(setting: Setting) -> None:
    setting.network.kill("aggregator")
    setting.network.stop_broker()
    service = setting.start_service()

    def pass_time() -> bool:
        setting.clock.now_ms += 1000
        return False

    with pytest.raises(UnavailableError, match=r"could not be reached within 5 s: the broker is not there\. Check"):
        service.serve(pass_time, wait_for_broker_s=5)


def test_a_broker_that_was_there_is_waited_for_without_end(setting: Setting) -> None:
    setting.run()
    setting.network.stop_broker()
    setting.run()
    setting.clock.now_ms += 10**9  # the deadline passes many times over: nobody could answer, so nothing happens
    setting.run(turns=5)
    assert setting.state.progress.extensions == 0
    setting.network.start_broker()
    setting.run()
    assert setting.state.progress.published_at_ms == setting.clock.now_ms
    assert "starts anew" in setting.log


def test_another_aggregator_of_the_same_run_ends_this_one(setting: Setting) -> None:
    setting.run()
    setting.network.transport("aggregator").start()
    with pytest.raises(UnavailableError, match="gone for good: another client connected"):
        setting.run()


def test_deadlines_pass_by_the_clock(setting: Setting) -> None:
    a = Device(setting.network, "a")
    setting.run(a)
    a.send(update_of())
    setting.run(a)
    setting.clock.now_ms += 60_000
    setting.run(a)
    assert setting.state.progress.round == 1


# --- kills


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


# --- bad peers


BAD: dict[str, tuple[bytes, Refusal]] = {
    "one byte": (b"\x01", Refusal.MALFORMED),
    "noise": (b"\x01\x04\xff\xff", Refusal.MALFORMED),
    "another version": (b"\x09" + encode(update_of())[1:], Refusal.UNSUPPORTED_VERSION),
    "another kind": (encode(Receipt(0, 0, "")), Refusal.WRONG_KIND),
    "cut": (encode(update_of())[:-3], Refusal.MALFORMED),
    "longer than the run allows": (
        encode(update_of(scalars=scalars_to_bytes(np.ones(30, np.float32), "f32"))),
        Refusal.OVERSIZED,
    ),
    "many scalars": (
        encode(update_of(scalars=scalars_to_bytes(np.ones(4, np.float32), "f32"))),
        Refusal.SCALAR_COUNT,
    ),
    "nan": (
        encode(update_of()).replace(np.float32(2).tobytes(), np.float32("nan").tobytes()),
        Refusal.NON_FINITE,
    ),
    "weightless": (encode(update_of()).replace(b"\x0a", b"\x00", 1), Refusal.WEIGHT_OUT_OF_RANGE),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_payload_is_refused_changes_nothing_and_does_not_end_the_loop(setting: Setting, name: str) -> None:
    payload, code = BAD[name]
    a = Device(setting.network, "a")
    setting.run(a)
    before = setting.state
    a.send_bytes(payload)
    setting.run(a)
    assert a.codes == [code]
    assert setting.state is before
    assert setting.store.state("night") == before
    a.send(update_of())
    setting.run(a)
    assert a.codes[-1] == Refusal.ACCEPTED


def test_a_retained_uplink_is_refused(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    a = Device(setting.network, "a")
    setting.network.kill("aggregator")
    setting.network.expire_session("aggregator")
    a.send_bytes(encode(update_of()), retain=True)  # nobody is subscribed: the broker keeps it for who comes
    setting.restart()
    setting.run(a)
    assert a.codes == [Refusal.RETAINED]
    assert not setting.state.updates


def test_an_empty_payload_is_no_message(setting: Setting) -> None:
    a = Device(setting.network, "a")
    setting.run(a)
    a.send_bytes(b"")
    setting.run(a)
    assert a.codes == []


def test_a_foreign_topic_is_ignored_and_logged_once(setting: Setting) -> None:
    setting.run()
    setting.service._transport.subscribe("#")
    stranger = setting.network.transport("stranger")
    stranger.start()
    for topic in ("kseed/night/update/BAD+ID", "weather", "kseed/night/plan"):
        stranger.publish(topic, encode(update_of()))
    setting.run()
    assert setting.log.count("ignoring messages on foreign topics") == 1
    assert not setting.state.updates


def test_an_update_for_another_run_is_answered(setting: Setting) -> None:
    a = Device(setting.network, "a")
    setting.run(a)
    setting.service._transport.subscribe("kseed/day/update/+")
    a.transport.publish("kseed/day/update/a", encode(update_of()))
    setting.run(a)
    assert a.codes == [Refusal.UNKNOWN_RUN]


def test_our_own_bug_does_not_end_the_loop(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Device(setting.network, "a")
    setting.run(a)
    real = setting.service._event_of

    def broken(turn: Any, run: str, device: str, message: Received) -> Any:
        if len(message.payload) > 20:
            raise ZeroDivisionError("a bug")
        return real(turn, run, device, message)

    monkeypatch.setattr(setting.service, "_event_of", broken)
    a.send(update_of())
    setting.run(a)
    assert a.codes == [Refusal.MALFORMED]
    assert "BUG: an update of a raised ZeroDivisionError('a bug')" in setting.log


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


# --- a store that does not work


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


# --- the operator


def test_the_operator_pauses_resumes_and_stops_through_the_store(setting: Setting) -> None:
    a = Device(setting.network, "a")
    setting.run(a)
    phases = []
    for verb in ("pause", "resume", "stop"):
        with Store.open(setting.path) as other:
            other.command("night", verb, "lunch", START_MS)  # type: ignore[arg-type]
        setting.clock.now_ms += 1000
        setting.run(a)
        phases.append(a.heard[-1].phase)
    assert phases == ["paused", "open", "finished"]
    assert setting.store.commands("night") == []
    assert a.heard[-1].reason == "lunch"


def test_a_metrics_file_that_cannot_be_written_is_only_a_warning(setting: Setting) -> None:
    setting.metrics.mkdir()
    devices = [Device(setting.network, name) for name in "ab"]
    for device in devices:
        device.send(update_of())
    setting.run(*devices)
    for device in devices:
        device.send(update_of())
    setting.run(*devices)
    assert setting.state.progress.round == 1
    assert "WARNING: cannot write" in setting.log


# --- the real network


@needs_mosquitto
@pytest.mark.broker
def test_a_run_goes_through_on_mosquitto(tmp_path: Path) -> None:
    from shared.mqtt import MqttTransport

    with running_mosquitto(tmp_path) as broker, Store.open(tmp_path / "s", may_create=True) as store:
        store.create(spec_of(rounds=2, quorum=2), START_MS)
        lines: list[str] = []
        aggregator = MqttTransport(config_of(broker), "kseed-aggregator-night", manual_acknowledge=True)
        service = Service(store, "night", aggregator, Clock(), lines.append)
        devices = [MqttTransport(config_of(broker), name) for name in "ab"]
        answered: dict[str, list[int]] = {"a": [], "b": []}

        def play() -> bool:
            for name, device in zip("ab", devices, strict=True):
                event = device.poll(0.02)
                if isinstance(event, Received) and event.topic.endswith("/plan"):
                    plan = decode("plan", event.payload)
                    assert isinstance(plan, Plan)
                    if plan.phase == "open":
                        device.publish(f"kseed/night/update/{name}", encode(update_of(plan.round)))
                elif isinstance(event, Received):
                    answered[name].append(decode("receipt", event.payload).code)  # type: ignore[union-attr]
            return False

        try:
            for name, device in zip("ab", devices, strict=True):
                device.subscribe("kseed/night/plan")
                device.subscribe(f"kseed/night/receipt/{name}")
                device.start()
            assert service.serve(play, wait_for_broker_s=20) == "finished"
        finally:
            for transport in (aggregator, *devices):
                transport.close()
    assert service.state.progress.round == 2
    assert service.state.coefficients != new_state(service.state.spec).coefficients
    assert all(codes[:1] == [0] for codes in answered.values())
    assert "connected to the broker (MQTT 5)" in lines
