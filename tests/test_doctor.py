"""`kseed-edge doctor` where no broker answers, and its checks one by one."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import msgspec
import pytest

from edge_client.board import Board, Life
from edge_client.doctor import here
from edge_client.doctor.check import Check, Seen, Trouble, examine, lines, summary
from edge_client.doctor.link import Way
from shared.config import BrokerConfig
from shared.errors import UserError
from tests.disks import fill
from tests.driven_session import PLAN
from tests.patient import skipped
from tests.test_owner import status_of


def test_nothing_that_listens_is_told_and_the_rest_is_checked_all_the_same(patient):
    patient.at_no_broker()
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
    patient.at_no_broker()
    (tmp_path / "reviews.jsonl").unlink()
    assert "no data at" in patient.findings()["data"].text


def test_a_state_folder_that_cannot_be_written_is_told(patient, tmp_path):
    patient.at_no_broker()
    patient.tables["agent"]["state_dir"] = tmp_path / "reviews.jsonl" / "state"
    disk = patient.findings()["disk"]
    assert disk.verdict == "failed"
    assert "or set state_dir under [agent]" in disk.remedy


def test_a_full_disk_is_told(patient, tiny_disk):
    patient.at_no_broker()
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


def test_a_pause_that_would_come_is_a_warning_with_its_sentence(patient, monkeypatch):
    patient.at_no_broker()
    patient.tables["gate"] = {"enabled": True, "disk_floor_mb": 1e12}
    monkeypatch.delenv("KSEED_GATE_ENABLED")
    sensors = patient.findings()["sensors"]
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
    (tmp_path / "edge_client" / "__init__.py").touch()  # without it, an installed edge_client goes first
    (tmp_path / "edge_client" / "smoke.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.chdir(tmp_path)
    config = patient.config()
    with pytest.raises(Trouble, match="it died of SIGILL") as trouble:
        here.kernel(config)
    assert "was built for another machine" in trouble.value.remedy


def test_a_device_that_torch_cannot_use_is_told(patient) -> None:
    patient.tables["model"] = {"device": "cuda:99"}
    with pytest.raises(Trouble, match="torch cannot use 'cuda:99' here"):
        here.kernel(patient.config())


def test_a_model_is_compared_with_the_memory_that_is_free(patient, tmp_path, monkeypatch) -> None:
    from tests.tiny_models import save_tiny

    patient.tables["model"] = {"source": save_tiny(tmp_path / "tiny")}
    assert "sequences of 1024 tokens at once: " in here.model(patient.config(), None).text
    monkeypatch.setattr("edge_client.fit.free_on", lambda device: (1e6, "system"))
    with pytest.raises(UserError, match=r"the model does not fit: .* 1 MB are free"):
        here.model(patient.config(), None)
    patient.tables["model"] = {"source": tmp_path / "none.gguf"}
    assert "its files are not here yet" in here.model(patient.config(), None).text


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
