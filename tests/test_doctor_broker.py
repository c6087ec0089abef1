"""`kseed-edge doctor` against a real broker with TLS and logins: healthy, and broken in every way it knows."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.mqtt import MqttTransport
from shared.transport import Connected, Received
from tests.patient import skipped
from tests.programs import ended, started
from tests.secure_broker import SecureBroker, needs_tools, running

pytestmark = [needs_tools, pytest.mark.broker]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    with running(tmp_path_factory.mktemp("broker") / "mosquitto", "ann", "bob") as found:
        yield found


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


def test_wrong_password_is_told_with_its_file(patient, broker, tmp_path):
    (tmp_path / "password").write_text("guess\n")
    patient.tables["broker"] = broker.settings("ann") | {"password_file": tmp_path / "password"}
    login = patient.failed("login")
    assert f"localhost:{broker.port} refused ann: " in login.text
    assert f"Check username (ann) and password_file ({tmp_path}/password) under [broker]." in login.remedy
    assert skipped(patient.findings()) == {"limits", "own topics", "run"}


def test_no_login_where_one_is_wanted_is_told(patient, broker):
    settings = broker.settings("ann")
    patient.tables["broker"] = {name: settings[name] for name in ("host", "port", "tls", "ca_file")}
    assert patient.failed("login").remedy == "Give username and password_file under [broker]."


def test_topics_that_the_access_rules_forbid_are_told(patient, broker):
    patient.tables["broker"] = broker.settings("bob")  # whose topics are not those of the device ann
    topics = patient.failed("own topics")
    assert topics.text.startswith("kseed/spring/presence/ann: ")
    assert "kseed-aggregator broker-config" in topics.remedy


def test_a_signer_that_is_not_known_is_told(patient, broker):
    settings = broker.settings("ann")
    del settings["ca_file"]
    patient.tables["broker"] = settings
    tls = patient.failed("TLS")
    assert "is not trusted: " in tls.text
    assert "ca_file is not given" in tls.remedy
    assert skipped(patient.findings()) == {"login", "limits", "own topics", "run"}


def test_a_certificate_for_another_name_is_told_with_the_names_in_it(patient):
    with patient.at_a_broker(names="DNS:broker.example.org"):
        tls = patient.failed("TLS")
    assert "Hostname mismatch" in tls.text
    assert "under a name that is in it (broker.example.org), or have one made for localhost" in tls.remedy


def test_an_expired_certificate_is_told_with_this_machines_time(patient):
    with patient.at_a_broker(days=-1):
        tls = patient.failed("TLS")
    assert tls.text.endswith("is not trusted: certificate has expired")
    assert tls.remedy.startswith("Have it renewed; or set this machine's clock, which says 2")


def test_a_certificate_that_ends_soon_is_a_warning(patient):
    with patient.at_a_broker(days=3):
        tls = patient.findings()["TLS"]
    assert (tls.verdict, tls.remedy) == ("warning", "Have the broker's certificate renewed.")


def test_a_broker_that_takes_short_packets_only_is_told(patient):
    with patient.at_a_broker(extra="max_packet_size 4000"):
        limits = patient.failed("limits")
    assert limits.text.startswith("packets up to 4000 bytes, ")
    assert limits.remedy.startswith("mosquitto: max_packet_size 1")


def test_a_broker_that_speaks_no_tls_is_told(patient, broker):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        patient.tables["broker"] = broker.settings("ann") | {"port": deaf.getsockname()[1], "host": "127.0.0.1"}
        deaf.close()
        assert patient.failed("connection").text.startswith("nothing listens on 127.0.0.1:")
    patient.tables["broker"] = {"host": "127.0.0.1", "port": broker.port}
    login = patient.failed("login")
    assert "closed the connection before it answered" in login.text
    assert "whether it wants TLS" in login.remedy


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
