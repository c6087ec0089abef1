"""The aggregator's loop on the in-process network (and once on mosquitto): rounds, deadlines, broker and operator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aggregator.service import Service
from aggregator.state import coefficients_of, new_state
from aggregator.store import Store
from shared.errors import UnavailableError
from shared.messages import Plan, Receipt, Run, Snapshot
from shared.refusals import Refusal
from shared.transport import Received
from shared.wire import decode, encode
from tests.aggregator_setting import Clock, Device, Setting, setting
from tests.brokers import config_of, needs_mosquitto, running_mosquitto
from tests.runs import START_MS, spec_of, update_of

__all__ = ["setting"]  # fixture


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
