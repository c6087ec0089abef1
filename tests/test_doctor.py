"""`kseed-edge doctor` against a real broker with TLS and logins: healthy, and broken in every way it knows."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_client import cli
from edge_client.board import Board, Life
from edge_client.doctor import here
from edge_client.doctor.check import Check, Finding, Seen, Trouble, examine, lines, summary
from edge_client.doctor.link import Way
from shared.config import BrokerConfig
from shared.errors import UserError
from shared.mqtt import MqttTransport
from shared.transport import Connected, Received
from tests.driven_session import PLAN
from tests.secure_broker import SecureBroker, needs_tools, running
from tests.test_edge_cli import data, ended, started
from tests.test_machine_faults import fill, tiny_disk
from tests.test_owner import status_of
from tools.broker import free_port

__all__ = ["data", "tiny_disk"]  # fixtures


class Patient:
    """One device's configuration file, and the doctor that is asked about it."""

    def __init__(self, folder: Path, capsys: Any, monkeypatch: Any) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.file = folder / "kseed.toml"
        self.tables: dict[str, dict[str, Any]] = {
            "agent": {"run": "spring", "device": "ann", "state_dir": folder / "state"},
            "data": {"source": folder / "reviews.jsonl"},
            "broker": {},
        }

    @contextmanager
    def at_a_broker(self, **made: Any) -> Iterator[None]:
        """With a broker of its own, made as `running` takes it."""
        with running(self.file.parent / "mosquitto", "ann", **made) as broker:
            self.tables["broker"] = broker.settings("ann")
            yield

    def write(self) -> None:
        def text(value: object) -> str:
            return json.dumps(value if isinstance(value, (bool, int, float)) else str(value))

        tables = (
            f"[{name}]\n" + "".join(f"{key} = {text(value)}\n" for key, value in table.items())
            for name, table in self.tables.items()
        )
        self.file.write_text("\n".join(tables))

    def say(self, *words: str) -> tuple[int, str]:
        self.write()
        self._monkeypatch.setattr(sys, "argv", ["kseed-edge", "doctor", "--config", str(self.file), *words])
        self._monkeypatch.delenv("KSEED_AGENT_STATE_DIR", raising=False)
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self._capsys.readouterr()
        assert err == ""
        return code, out

    def findings(self) -> dict[str, Finding]:
        """What it found, by the name of the check, with its exit code checked."""
        code, out = self.say("--quick", "--json")
        told = json.loads(out)
        found = {one["name"]: msgspec.convert(one, Finding) for one in told["findings"]}
        assert told["failed"] == sum(one.verdict == "failed" for one in found.values())
        assert code == (told["failed"] > 0)
        return found

    def failed(self, name: str) -> Finding:
        """The one check that failed; each that did has to say what to do."""
        found = self.findings()
        failures = [one for one in found.values() if one.verdict == "failed"]
        assert [one.name for one in failures] == [name], failures
        assert failures[0].remedy
        return failures[0]


@pytest.fixture
def patient(tmp_path: Path, data: Path, capsys: Any, monkeypatch: Any) -> Patient:
    return Patient(tmp_path, capsys, monkeypatch)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    with running(tmp_path_factory.mktemp("broker") / "mosquitto", "ann", "bob") as found:
        yield found


def skipped(found: dict[str, Finding]) -> set[str]:
    return {name for name, one in found.items() if one.verdict == "skipped"}


# With a broker.


@needs_tools
@pytest.mark.broker
def test_a_healthy_set_up_passes_with_kernels_and_leaves_no_trace_at_the_broker(patient, broker):
    patient.tables["broker"] = broker.settings("ann")
    code, out = patient.say()
    assert code == 0, out
    assert "ok       TLS            TLSv1.3, certificate for localhost, 127.0.0.1, valid until " in out
    assert "ok       login          MQTT 5, client id ann, login ann; " in out
    assert "ok       own topics     kseed/spring/presence/ann: taken after " in out
    assert "ok       data           " in out
    assert "20 records of a known shape" in out
    assert "on cpu gives the bits of the definition" in out
    assert "warning  run            the broker has no run 'spring'" in out
    assert "warning  model          which one is not known before the run is" in out
    assert out.endswith("2 warning, 12 ok\n")
    watcher = MqttTransport(broker.config("ann"), "ann")
    watcher.start()
    assert isinstance(watcher.poll(10), Connected)
    watcher.subscribe("kseed/spring/presence/ann")
    events = [watcher.poll(1.0)]
    watcher.close(0.0)
    assert not any(isinstance(event, Received) and event.is_retained for event in events)


@needs_tools
@pytest.mark.broker
def test_wrong_password_is_told_with_its_file(patient, broker, tmp_path):
    (tmp_path / "password").write_text("guess\n")
    patient.tables["broker"] = broker.settings("ann") | {"password_file": tmp_path / "password"}
    login = patient.failed("login")
    assert f"localhost:{broker.port} refused ann: " in login.text
    assert f"Check username (ann) and password_file ({tmp_path}/password) under [broker]." in login.remedy
    assert skipped(patient.findings()) == {"limits", "own topics", "run"}


@needs_tools
@pytest.mark.broker
def test_no_login_where_one_is_wanted_is_told(patient, broker):
    settings = broker.settings("ann")
    patient.tables["broker"] = {name: settings[name] for name in ("host", "port", "tls", "ca_file")}
    assert patient.failed("login").remedy == "Give username and password_file under [broker]."


@needs_tools
@pytest.mark.broker
def test_topics_that_the_access_rules_forbid_are_told(patient, broker):
    patient.tables["broker"] = broker.settings("bob")  # whose topics are not those of the device ann
    topics = patient.failed("own topics")
    assert topics.text.startswith("kseed/spring/presence/ann: ")
    assert "kseed-aggregator broker-config" in topics.remedy


@needs_tools
@pytest.mark.broker
def test_a_signer_that_is_not_known_is_told(patient, broker):
    settings = broker.settings("ann")
    del settings["ca_file"]
    patient.tables["broker"] = settings
    tls = patient.failed("TLS")
    assert "is not trusted: " in tls.text
    assert "ca_file is not given" in tls.remedy
    assert skipped(patient.findings()) == {"login", "limits", "own topics", "run"}


@needs_tools
@pytest.mark.broker
def test_a_certificate_for_another_name_is_told_with_the_names_in_it(patient):
    with patient.at_a_broker(names="DNS:broker.example.org"):
        tls = patient.failed("TLS")
    assert "Hostname mismatch" in tls.text
    assert "under a name that is in it (broker.example.org), or have one made for localhost" in tls.remedy


@needs_tools
@pytest.mark.broker
def test_an_expired_certificate_is_told_with_this_machines_time(patient):
    with patient.at_a_broker(days=-1):
        tls = patient.failed("TLS")
    assert tls.text.endswith("is not trusted: certificate has expired")
    assert tls.remedy.startswith("Have it renewed; or set this machine's clock, which says 2")


@needs_tools
@pytest.mark.broker
def test_a_certificate_that_ends_soon_is_a_warning(patient):
    with patient.at_a_broker(days=3):
        tls = patient.findings()["TLS"]
    assert (tls.verdict, tls.remedy) == ("warning", "Have the broker's certificate renewed.")


@needs_tools
@pytest.mark.broker
def test_a_broker_that_takes_short_packets_only_is_told(patient):
    with patient.at_a_broker(extra="max_packet_size 4000"):
        limits = patient.failed("limits")
    assert limits.text.startswith("packets up to 4000 bytes, ")
    assert limits.remedy.startswith("mosquitto: max_packet_size 1")


@needs_tools
@pytest.mark.broker
def test_a_broker_that_speaks_no_tls_is_told(patient, broker):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        patient.tables["broker"] = broker.settings("ann") | {"port": deaf.getsockname()[1], "host": "127.0.0.1"}
        deaf.close()
        assert patient.failed("connection").text.startswith("nothing listens on 127.0.0.1:")
    patient.tables["broker"] = {"host": "127.0.0.1", "port": broker.port}
    login = patient.failed("login")
    assert "closed the connection before it answered" in login.text
    assert "whether it wants TLS" in login.remedy


@needs_tools
@pytest.mark.broker
def test_an_agent_that_runs_is_asked_and_not_disturbed(patient, broker):
    patient.tables["broker"] = broker.settings("ann")
    patient.write()
    agent = started("up", "--config", patient.file, KSEED_AGENT_STATE_DIR=str(patient.tables["agent"]["state_dir"]))
    folder = None
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        folder = next(iter(Path(patient.tables["agent"]["state_dir"]).glob("*/status.json")), None)
        if folder and json.loads(folder.read_text())["round_trip_s"]:
            break
        time.sleep(0.05)  # between two looks
    found = patient.findings()
    assert found["agent"].verdict == "ok"
    assert found["agent"].text.startswith("it runs and has been connected for ")
    assert "and the broker answers in " in found["agent"].text
    assert not {"login", "limits", "own topics", "run"} & set(found)
    agent.send_signal(signal.SIGTERM)
    code, out, err = ended(agent)
    assert (code, err) == (0, "")
    assert "lost the connection" not in out


# Without one.


def nowhere(patient: Patient) -> None:
    patient.tables["broker"] = {"host": "127.0.0.1", "port": free_port()}


def test_nothing_that_listens_is_told_and_the_rest_is_checked_all_the_same(patient):
    nowhere(patient)
    assert "Start the broker there" in patient.failed("connection").remedy
    found = patient.findings()
    assert skipped(found) == {"TLS", "login", "limits", "own topics", "run"}
    assert found["login"].text == "it needs what failed above: TLS"
    assert {found[name].verdict for name in ("name", "data", "disk")} == {"ok"}


def test_an_unknown_name_is_told(patient):
    patient.tables["broker"] = {"host": "broker.invalid"}
    name = patient.failed("name")
    assert name.text.startswith("the name broker.invalid is not known here: ")


def test_a_mistake_in_the_configuration_is_a_finding(patient):
    patient.tables["broker"] = {"hots": "localhost"}
    found = patient.findings()
    assert list(found) == ["configuration"]
    assert "did you mean 'broker.host'?" in found["configuration"].text
    del patient.tables["agent"]["run"], patient.tables["broker"]["hots"]
    assert patient.findings()["configuration"].text.startswith("agent.run is missing")


def test_missing_data_is_told(patient, tmp_path):
    nowhere(patient)
    (tmp_path / "reviews.jsonl").unlink()
    assert "no data at" in patient.findings()["data"].text


def test_a_state_folder_that_cannot_be_written_is_told(patient, tmp_path):
    nowhere(patient)
    patient.tables["agent"]["state_dir"] = tmp_path / "reviews.jsonl" / "state"
    disk = patient.findings()["disk"]
    assert disk.verdict == "failed"
    assert "or set state_dir under [agent]" in disk.remedy


def test_a_full_disk_is_told(patient, tiny_disk):
    nowhere(patient)
    patient.tables["agent"]["state_dir"] = tiny_disk / "state"
    fill(tiny_disk)
    disk = patient.findings()["disk"]
    assert disk.verdict == "failed"
    assert "No space left on device" in disk.text
    assert disk.remedy.startswith("Free some space there")
    assert list((tiny_disk / "state").glob("*/doctor")) == []


def test_an_agent_that_has_no_connection_says_why(patient, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        patient.tables["broker"] = {"host": "127.0.0.1", "port": listening.getsockname()[1]}
        patient.findings()  # makes the folder
        board = Board(next((tmp_path / "state").iterdir()))
        status = msgspec.structs.replace(status_of(state="unconnected"), trouble="the host name is not known here")
        board.post(msgspec.json.encode(status))
        life = Life(board.folder)
        assert "not connected: the host name is not known here" in patient.failed("agent").text
        life.end()


def test_a_pause_that_would_come_is_a_warning_with_its_sentence(patient):
    nowhere(patient)
    patient.tables["gate"] = {"enabled": True, "disk_floor_mb": 1e12}
    os.environ.pop("KSEED_GATE_ENABLED")
    try:
        sensors = patient.findings()["sensors"]
    finally:
        os.environ["KSEED_GATE_ENABLED"] = "false"
    assert sensors.verdict == "warning"
    assert "An agent would pause now: Free disk space is " in sensors.text
    assert any(line.startswith("disk free: ") for line in sensors.details)


# Single checks.


def test_a_clock_that_is_behind_the_last_plan_is_told() -> None:
    published_s = PLAN.published_at_ms / 1000
    assert here.clock(PLAN, published_s + 5).text.startswith("1970-01-01 00:16:45 UTC")
    with pytest.raises(Trouble, match="the plan of round 3 was published 100 s later than that"):
        here.clock(PLAN, published_s - 100)
    assert here.clock(PLAN, published_s - 50).text


def test_a_kernel_that_dies_does_not_take_the_doctor_along(patient, monkeypatch, tmp_path) -> None:
    (tmp_path / "edge_client").mkdir()
    (tmp_path / "edge_client" / "smoke.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.chdir(tmp_path)
    config = read(patient)
    with pytest.raises(Trouble, match="it died of SIGILL") as trouble:
        here.kernel(config)
    assert "was built for another machine" in trouble.value.remedy


def test_a_device_that_torch_cannot_use_is_told(patient) -> None:
    patient.tables["model"] = {"device": "cuda:99"}
    with pytest.raises(Trouble, match="torch cannot use 'cuda:99' here"):
        here.kernel(read(patient))


def read(patient: Patient) -> Any:
    from edge_client.operations import read_config

    patient.write()
    return read_config(patient.file, {}, {})


def test_a_model_is_compared_with_the_memory_that_is_free(patient, tmp_path, monkeypatch) -> None:
    from tests.tiny_models import save_tiny

    patient.tables["model"] = {"source": save_tiny(tmp_path / "tiny")}
    assert "sequences of 1024 tokens at once: " in here.model(read(patient), None).text
    monkeypatch.setattr("edge_client.fit.free_on", lambda device: (1e6, "system"))
    with pytest.raises(UserError, match=r"the model does not fit: .* 1 MB are free"):
        here.model(read(patient), None)
    patient.tables["model"] = {"source": tmp_path / "none.gguf"}
    assert "its files are not here yet" in here.model(read(patient), None).text


def test_a_certificate_of_the_future_blames_the_clock(tmp_path: Path) -> None:
    """OpenSSL's code for it; a certificate like that cannot be made with `openssl x509`."""
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = 9, "certificate is not yet valid"
    way = Way(BrokerConfig("b.example.org", tls=True), lambda: 0.0)
    trouble = way._mistrust(error)
    assert str(trouble) == "the certificate of b.example.org:8883 is not trusted: certificate is not yet valid"
    assert trouble.remedy.startswith("Set this machine's clock, which says 1970-01-01 00:00 UTC;")


def test_checks_are_independent_and_a_broken_one_says_so() -> None:
    def fails() -> Seen:
        raise Trouble("no", "do something")

    def breaks() -> Seen:
        raise ZeroDivisionError("in the check")

    def refuses() -> Seen:
        raise UserError("wrong; do it right.")

    found = list(
        examine(
            [
                Check("a", fails),
                Check("b", lambda: Seen("fine"), ("a",)),
                Check("c", lambda: Seen("fine"), ("b",)),
                Check("d", breaks),
                Check("e", refuses),
                Check("f", lambda: Seen("fine", details=("more",))),
            ]
        )
    )
    assert [one.verdict for one in found] == ["failed", "skipped", "skipped", "failed", "failed", "ok"]
    assert found[3].text == "the check itself broke: ZeroDivisionError: in the check"
    assert summary(found) == "3 failed, 2 skipped, 1 ok"
    assert lines(found[0], 3) == ["failed   a  no", "            -> do something"]
    assert lines(found[5], 3) == ["ok       f  fine", "              more"]
