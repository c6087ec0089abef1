"""A short soak, as `kseed soak` runs it, and that its checks can fail."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aggregator.store import Store
from shared.messages import Plan, Receipt, Snapshot
from shared.mqtt import MqttTransport
from shared.refusals import Refusal
from shared.topics import Kind, Topic
from shared.transport import Delivered, Received
from shared.wire import decode, encode
from tests.brokers import config_of
from tools.broker import RunningBroker, find_mosquitto, start_broker
from tools.processes import crew
from tools.soak import Violation, _Progress
from tools.soak_check import check_fold, read_journal, retained_violations, settled_rounds, violations
from tools.soak_crew import Died, SoakCrew
from tools.soak_packets import Published
from tools.soak_report import SoakReport, soak_text
from tools.soak_schedule import AGGREGATOR, BROKER
from tools.soak_witness import Witness
from tools.soak_world import AGENTS, RUN, World

KILLS = 30
ROOT = Path(__file__).parents[1]
TIMEOUT_S = 290.0


def run_kseed_soak(out: Path, *options: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr. Ends the soak, and with it its processes, if it takes too long."""
    command = [sys.executable, "-m", "tools.cli", "soak", "--out", str(out), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as soak:
        try:
            said, noted = soak.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            soak.send_signal(signal.SIGTERM)
            said, noted = soak.communicate()
    return soak.returncode, said, noted


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a soak that passed."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: no broker that keeps anything over a kill")
    out = tmp_path_factory.mktemp("soak") / "out"
    code, said, noted = run_kseed_soak(out, "--seed", "1", "--minutes", "1", "--kills", str(KILLS))
    print(said)
    assert code == 0, said + noted
    return out


def report_of(out: Path) -> SoakReport:
    return msgspec.json.decode((out / "report.json").read_bytes(), type=SoakReport)


@pytest.mark.soak
@pytest.mark.broker
def test_thirty_kills_cost_nothing(soaked: Path) -> None:
    report = report_of(soaked)
    assert report.violations == []
    assert sum(report.kills.values()) >= KILLS
    assert min(report.kills.values()) > 0
    assert report.rounds > 1
    assert report.counted > 1
    assert report.network["cuts"] > 0
    assert "PASSED" in soak_text(report)


@pytest.fixture
def copy(soaked: Path, tmp_path: Path) -> tuple[World, Witness]:
    """The soak's files, and a witness who saw every update of its journal, and no receipt."""
    shutil.copytree(soaked, tmp_path / "copy")
    world = World(tmp_path / "copy")
    witness = Witness()
    for key, payload in read_journal(world.store)[0].items():
        witness.updates[key].add(payload)
    return world, witness


def found(world: World, witness: Witness) -> list[str]:
    return list(violations(world, witness, check_fold(world)))


def change(world: World, statement: str, *values: Any) -> None:
    connection = sqlite3.connect(world.store)
    with connection:
        assert connection.execute(statement, values).rowcount == 1
    connection.close()


@pytest.mark.soak
@pytest.mark.broker
def test_the_soak_s_files_are_in_order_as_they_are(copy: tuple[World, Witness]) -> None:
    assert found(*copy) == []


@pytest.mark.soak
@pytest.mark.broker
def test_an_accepted_update_that_is_gone_is_found(copy: tuple[World, Witness]) -> None:
    world, witness = copy
    agent = next(agent for agent in AGENTS if settled_rounds(world.logs(agent)))
    number = min(settled_rounds(world.logs(agent)))
    change(world, "DELETE FROM updates WHERE run = ? AND round = ? AND device = ?", RUN, number, agent)
    wrong = found(world, witness)
    assert "the coefficients are not the fold of the accepted updates" in wrong[0]
    assert f"agent {agent} was told that its update of round {number} is accepted, but the journal lacks it" in wrong


@pytest.mark.soak
@pytest.mark.broker
def test_a_coefficient_of_another_value_is_found(copy: tuple[World, Witness]) -> None:
    world, witness = copy
    change(world, "UPDATE versions SET coefficients = zeroblob(1024) WHERE run = ? AND version = 1", RUN)
    assert "version 1: coefficient" in found(world, witness)[0]


@pytest.mark.soak
@pytest.mark.broker
def test_an_agent_with_another_model_is_found(copy: tuple[World, Witness]) -> None:
    world, witness = copy
    path = world.metrics(AGENTS[0])
    last = json.loads(path.read_text().splitlines()[-1])
    path.write_text(json.dumps({**last, "model_digest": "00" * 16}) + "\n")
    wrong = found(world, witness)
    assert any(f"version {last['version']} is another model on" in one for one in wrong)
    assert any(f"but {AGENTS[0]} did not end with it" in one for one in wrong)


@pytest.mark.soak
@pytest.mark.broker
def test_a_receipt_and_an_update_that_nobody_can_account_for_are_found(copy: tuple[World, Witness]) -> None:
    world, witness = copy
    witness.see(Published(f"kseed/{RUN}/receipt/ash", encode(Receipt(999_999, int(Refusal.ACCEPTED), "")), 1, False))
    (number, device), _ = min(witness.updates.items())
    del witness.updates[number, device]
    wrong = found(world, witness)
    assert "a receipt told ash that its update of round 999999 is accepted, but the journal lacks it" in wrong
    assert f"the journal has an update of {device} for round {number} that {device} never sent" in wrong


@pytest.mark.soak
@pytest.mark.broker
def test_reports_that_count_otherwise_than_the_journal_are_found(copy: tuple[World, Witness]) -> None:
    world, witness = copy
    with Store.open(world.store, may_write=False) as store:
        report = next(report for report, _ in store.reports(RUN) if report.counted)
    more = msgspec.structs.replace(report, accepted=report.accepted + 1, counted=report.counted - 1)
    data = msgspec.json.encode(more)
    change(world, "UPDATE versions SET report = ? WHERE run = ? AND version = ?", data, RUN, report.round + 1)
    wrong = "\n".join(found(world, witness))
    assert "accepted updates, the journal has" in wrong
    assert "counted updates, the fold counted" in wrong


@pytest.fixture
def broker_again(copy: tuple[World, Witness]) -> Iterator[RunningBroker]:
    """The soak's broker, started on what it kept."""
    broker = start_broker(copy[0].out / "broker", kind="mosquitto")
    yield broker
    broker.stop()


def retained_wrong(world: World, broker: RunningBroker) -> list[str]:
    with closing(MqttTransport(config_of(broker), "newcomer", session_expiry_s=0)) as transport:
        return list(retained_violations(world, transport))


def publish_retained(broker: RunningBroker, kind: Kind, payload: bytes) -> None:
    with closing(MqttTransport(config_of(broker), "meddler", session_expiry_s=0)) as transport:
        transport.start()
        token = transport.publish(str(Topic(RUN, kind)), payload, retain=True)
        while True:
            event = transport.poll(10.0)
            assert event is not None, "the broker does not answer"
            if isinstance(event, Delivered) and event.token == token:
                return


@pytest.mark.soak
@pytest.mark.broker
def test_a_broker_that_tells_newcomers_something_else_is_found(
    copy: tuple[World, Witness], broker_again: RunningBroker
) -> None:
    world, _ = copy
    assert retained_wrong(world, broker_again) == []
    with Store.open(world.store, may_write=False) as store:
        version = store.run(RUN).progress.round
        old = store.coefficients(RUN, version - 1)
    publish_retained(broker_again, "snapshot", encode(Snapshot(version, old)))
    assert retained_wrong(world, broker_again) == [
        f"the retained snapshot of version {version} is not version {version} of the store"
    ]
    publish_retained(broker_again, "snapshot", b"")
    assert retained_wrong(world, broker_again) == ["the broker has no retained snapshot"]
    plan = heard_plan(broker_again)
    publish_retained(broker_again, "plan", encode(msgspec.structs.replace(plan, phase="paused")))
    assert f"the retained plan is of round {version}, paused; the store is at {version}" in retained_wrong(
        world, broker_again
    )


def heard_plan(broker: RunningBroker) -> Plan:
    with closing(MqttTransport(config_of(broker), "listener", session_expiry_s=0)) as transport:
        transport.subscribe(str(Topic(RUN, "plan")))
        transport.start()
        while not isinstance(event := transport.poll(10.0), Received):
            assert event is not None, "the broker has no retained plan"
        plan = decode("plan", event.payload)
        assert isinstance(plan, Plan)
        return plan


@pytest.mark.broker
def test_whoever_ends_by_himself_is_found(tmp_path: Path) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    world = World(tmp_path)  # without a store, so that the aggregator cannot serve
    broker = start_broker(tmp_path / "broker", kind="mosquitto")
    try:
        with crew() as members:
            people = SoakCrew(world, members, broker, broker.port, Witness())
            people._start(AGGREGATOR)
            wrong = people.finish(AGGREGATOR, 60.0)
            assert wrong is not None
            assert "aggregator ended with exit code 2" in wrong
            with pytest.raises(Violation, match=r"aggregator ended by itself with exit code 2(?s:.)*there is no store"):
                _Progress(world).look(people)
            people.kill(AGGREGATOR, 0.0, 60.0)
            assert people.died() is None, "who was killed did not end by himself"
            broker.kill()
            assert people.died() == Died(BROKER, -9, broker.log_path.read_text()[-2000:])
    finally:
        broker.stop()


@pytest.mark.soak
@pytest.mark.broker
def test_rounds_that_do_not_close_are_found(
    copy: tuple[World, Witness], broker_again: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.soak.STALL_S", -1.0)
    monkeypatch.setattr("tools.soak.LOOK_S", 0.0)
    world, witness = copy
    with crew() as members:
        people = SoakCrew(world, members, broker_again, broker_again.port, witness)
        progress = _Progress(world)
        progress.look(people)
        with pytest.raises(Violation, match="no round was closed for"):
            progress.look(people)
