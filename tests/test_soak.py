"""A short soak, as `kseed soak` runs it; that its checks can fail; and the parts that it is made of."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aggregator.store import Store
from shared.errors import UserError
from shared.messages import Plan, Receipt, Snapshot, Update
from shared.mqtt import MqttTransport
from shared.refusals import Refusal
from shared.topics import Kind, Topic
from shared.transport import Delivered, Received
from shared.wire import decode, encode
from tests.brokers import config_of
from tools.broker import RunningBroker, find_mosquitto, start_broker
from tools.certificates import make_certificates
from tools.processes import crew
from tools.soak import SoakSettings, Violation, _Progress, _server_side
from tools.soak_check import check_fold, read_journal, retained_violations, settled_rounds, violations
from tools.soak_crew import Died, SoakCrew
from tools.soak_packets import Packets, Published, doubled, kind_of, published, version_of
from tools.soak_proxy import Proxy
from tools.soak_report import SoakReport, soak_text
from tools.soak_schedule import AGGREGATOR, BROKER, Cut, Kill, Weather, schedule
from tools.soak_witness import Witness
from tools.soak_world import AGENTS, RUN, World

KILLS = 30
ROOT = Path(__file__).parents[1]
TIMEOUT_S = 290.0

# --- a soak


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


# --- what a person can say


def test_more_kills_than_seconds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--kills is 61; allowed: 0 to one a second, 60\."):
        SoakSettings(tmp_path, 1, 1.0, 61)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_minutes_are_refused(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(UserError, match="--minutes is"):
        SoakSettings(tmp_path, 1, minutes, 0)


def a_report(**changes: Any) -> SoakReport:
    network = dict.fromkeys(
        ("connections", "old_connections", "refused", "cuts", "torn", "doubled", "up_bytes", "down_bytes"), 7
    )
    return SoakReport(
        **{
            "seed": 5, "minutes": 1.0, "seconds": 80.0, "kills": {"aggregator": 2, "broker": 1, "agent": 3},
            "network": network, "messages": {"update": 4}, "rounds": 2, "accepted": 4, "counted": 4, "late": 0,
            "receipts": {"ACCEPTED": 4, "STALE_ROUND": 1}, "version": 2, "coefficients_sha256": "ab" * 32,
            "model_digest": "cd" * 16, "violations": [], **changes,
        }
    )  # fmt: skip


def test_the_summary_names_kills_receipts_and_digests() -> None:
    text = soak_text(a_report())
    assert "kills     6: aggregator 2, broker 1, agent 3\n" in text
    assert "receipts  accepted 4, stale_round 1\n" in text
    assert text.endswith(f"digest    equal on all agents: {'cd' * 16}\nPASSED")


def test_a_failure_names_the_seed_and_the_first_violation() -> None:
    report = a_report(violations=["the first\nand its log", "the second"])
    assert not report.is_well
    assert soak_text(report).endswith("FAILED with seed 5: the first")


# --- the schedule


def test_a_seed_makes_the_same_schedule_again_and_another_seed_another_one() -> None:
    first = schedule(7, 100.0, 30, AGENTS)
    assert schedule(7, 100.0, 30, AGENTS) == first
    assert schedule(8, 100.0, 30, AGENTS) != first


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_has_every_kill_in_order_and_within_its_time(seed: int) -> None:
    happenings = schedule(seed, 100.0, 30, AGENTS)
    kills = [happening for happening in happenings if isinstance(happening, Kill)]
    assert len(kills) == 30
    assert {kill.target for kill in kills} == {AGGREGATOR, BROKER, *AGENTS}
    assert any(isinstance(happening, Cut) for happening in happenings)
    times = [happening.at_s for happening in happenings]
    assert times == sorted(times)
    assert times[0] >= 0.0
    assert times[-1] <= 100.0


# --- packets

CONNECT_5 = bytes.fromhex("100f00044d5154540502003c0000026161")
CONNECT_311 = bytes.fromhex("100e00044d5154540402003c00026161")
PUBLISH_5 = bytes([0x33, 3 + 2 + 2 + 3 + 4]) + b"\0\3a/b" + b"\0\x09" + bytes([2, 1, 1]) + b"data"
PUBLISH_311 = bytes([0x32, 3 + 2 + 2 + 4]) + b"\0\3a/b" + b"\0\x09" + b"data"
LONG = bytes([0x30, 0xC8, 0x01]) + b"\0\1a" + b"x" * 197


@pytest.mark.parametrize("stride", [1, 2, 7, 1000])
def test_packets_are_cut_at_their_ends_however_the_bytes_come(stride: int) -> None:
    sent = [CONNECT_5, PUBLISH_5, LONG, bytes([0xC0, 0]), PUBLISH_311]
    stream, packets = b"".join(sent), Packets()
    got = [packet for at in range(0, len(stream), stride) for packet in packets.feed(stream[at : at + stride])]
    assert got == sent


def test_a_length_of_five_bytes_is_no_mqtt() -> None:
    with pytest.raises(ValueError, match="no MQTT"):
        Packets().feed(bytes([0x30, 0xFF, 0xFF, 0xFF, 0xFF, 1]))


def test_the_version_of_a_connection_is_read_from_its_first_packet() -> None:
    assert [version_of(CONNECT_5), version_of(CONNECT_311)] == [5, 4]


def test_a_publication_is_read_in_both_versions() -> None:
    assert published(PUBLISH_5, 5) == Published("a/b", b"data", 1, True)
    assert published(PUBLISH_311, 4) == Published("a/b", b"data", 1, False)
    assert published(LONG, 4) == Published("a", b"x" * 197, 0, False)


def test_a_double_differs_in_its_flag_alone() -> None:
    again = doubled(PUBLISH_311)
    assert kind_of(again) == kind_of(PUBLISH_311)
    assert again[0] == 0x3A
    assert again[1:] == PUBLISH_311[1:]


# --- the witness


def an_update(number: int) -> Update:
    return Update(number, 10, 1.0, None, None, b"\0" * 16, b"\0\0\0\0", None)


def test_the_witness_keeps_updates_and_receipts_and_names_what_does_not_decode() -> None:
    witness = Witness()
    payload = encode(an_update(3))
    for topic, sent in (
        ("kseed/soak/update/ash", payload),
        ("kseed/soak/receipt/ash", encode(Receipt(3, int(Refusal.ACCEPTED), ""))),
        ("kseed/soak/receipt/ash", encode(Receipt(2, int(Refusal.STALE_ROUND), ""))),
        ("kseed/soak/update/birch", b"\1"),
        ("elsewhere", b""),
    ):
        witness.see(Published(topic, sent, 1, False))
    assert dict(witness.updates) == {(3, "ash"): {payload}}
    assert witness.settled == {(3, "ash")}
    assert dict(witness.receipts) == {"ACCEPTED": 1, "STALE_ROUND": 1}
    assert len(witness.unreadable) == 1
    assert [witness.has_reached("birch", stage) for stage in ("started", "heard", "at work")] == [True, True, True]
    witness.forget("birch")
    assert [witness.has_reached("birch", stage) for stage in ("started", "heard", "at work")] == [True, False, False]
    assert witness.has_reached("aggregator", "at work")
    assert witness.passed() == {"receipt": 2, "update": 2}


# --- the proxy

CALM = Weather("calm", (0.0, 0.0))


class Line:
    """A client and a broker made of bare sockets, with the proxy between them."""

    def __init__(self, weather: Weather) -> None:
        self.witness = Witness()
        listener = socket.create_server(("127.0.0.1", 0))
        self.proxy = Proxy(listener.getsockname()[1], 1, weather, self.witness)
        self.proxy.start()
        self.client = socket.create_connection(("127.0.0.1", self.proxy.port), timeout=10.0)
        self.broker, _ = listener.accept()
        self.broker.settimeout(10.0)
        listener.close()

    def close(self) -> None:
        self.proxy.close()
        self.client.close()
        self.broker.close()


@pytest.fixture
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    made = Line(getattr(request, "param", CALM))
    yield made
    made.close()


def read(end: socket.socket, size: int) -> bytes:
    """`size` bytes, or those before the end of the connection."""
    got = b""
    while len(got) < size:
        try:
            data = end.recv(size - len(got))
        except ConnectionResetError:
            return got
        if not data:
            return got
        got += data
    return got


def test_the_proxy_passes_packets_on_in_both_directions(line: Line) -> None:
    line.client.sendall(CONNECT_311 + PUBLISH_311)
    assert read(line.broker, len(CONNECT_311 + PUBLISH_311)) == CONNECT_311 + PUBLISH_311
    line.broker.sendall(LONG)
    assert read(line.client, len(LONG)) == LONG
    assert line.proxy.count.old_connections == 1


@pytest.mark.parametrize("line", [Weather("double", (0.0, 0.0), doubled=1.0)], indirect=True)
def test_the_proxy_doubles_a_publication_with_its_flag(line: Line) -> None:
    line.client.sendall(CONNECT_5 + PUBLISH_5)
    expected = CONNECT_5 + PUBLISH_5 + doubled(PUBLISH_5)
    assert read(line.broker, len(expected)) == expected


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_proxy_can_speak_tls_to_clients_and_still_sees_what_passes(tmp_path: Path) -> None:
    files = make_certificates(tmp_path, ["127.0.0.1"])
    witness = Witness()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(listener.getsockname()[1], 1, CALM, witness, _server_side(files))
        proxy.start()
        try:
            bare = socket.create_connection(("127.0.0.1", proxy.port), timeout=10.0)
            trust = ssl.create_default_context(cafile=files.ca)
            with trust.wrap_socket(bare, server_hostname="127.0.0.1") as client:
                broker, _ = listener.accept()
                broker.settimeout(10.0)
                sent = encode(an_update(3))
                topic = b"kseed/soak/update/ash"
                packet = b"\0" + bytes([len(topic)]) + topic + b"\0\1" + sent
                client.sendall(CONNECT_311 + bytes([0x32, len(packet)]) + packet)
                size = len(CONNECT_311) + 2 + len(packet)
                assert read(broker, size).endswith(sent)
                broker.close()
        finally:
            proxy.close()
    assert dict(witness.updates) == {(3, "ash"): {sent}}


def test_a_cut_ends_both_sides(line: Line) -> None:
    line.client.sendall(CONNECT_311)
    assert read(line.broker, len(CONNECT_311)) == CONNECT_311
    line.proxy.cut(0.5, is_torn=False)
    assert read(line.broker, 1) == b""
    assert read(line.client, 1) == b""


def test_a_torn_packet_arrives_in_part_and_is_the_last(line: Line) -> None:
    line.client.sendall(CONNECT_311)
    assert read(line.broker, len(CONNECT_311)) == CONNECT_311
    line.proxy.cut(None, is_torn=True)
    line.client.sendall(LONG)
    got = read(line.broker, len(LONG))
    assert 0 < len(got) < len(LONG)
    assert LONG.startswith(got)
    assert line.proxy.count.torn == 1


def test_who_finds_no_broker_behind_the_proxy_is_turned_away(line: Line) -> None:
    with socket.create_connection(("127.0.0.1", line.proxy.port), timeout=10.0) as second:
        assert read(second, 1) == b""
    assert line.proxy.count.refused == 1


def test_a_moment_is_when_the_next_message_of_its_kind_passes(line: Line) -> None:
    assert not line.witness.wait_for("update", 0.0)
    waiting = threading.Event()
    seen: list[bool] = []

    def wait() -> None:
        waiting.set()
        seen.append(line.witness.wait_for("update", 10.0))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    while thread.is_alive():  # the first may pass before the thread waits
        line.witness.see(Published("kseed/soak/update/ash", encode(an_update(0)), 1, False))
        thread.join(0.01)
    assert seen == [True]
