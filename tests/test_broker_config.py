"""The generated broker configuration: mosquitto starts with it, its limits carry a run, its access list refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aggregator import cli
from aggregator.broker_config import MAX_PACKET_BYTES, BrokerFiles, packet_limit_error, write_broker_config
from aggregator.service import Service
from aggregator.store import Store
from shared.config import BrokerConfig
from shared.errors import UserError
from shared.messages import Presence
from shared.mqtt import MqttTransport
from shared.transport import Connected, Delivered, Disconnected, Event, Received, Undelivered
from shared.wire import LIMIT_BYTES, encode
from tests.brokers import config_of, needs_mosquitto, running_mosquitto
from tests.runs import START_MS, spec_of, update_of
from tools.broker import find_mosquitto, free_port

ROOT = Path(__file__).parent.parent
needs_passwd = pytest.mark.skipif(shutil.which("mosquitto_passwd") is None, reason="mosquitto_passwd is not installed")


@contextmanager
def mosquitto(folder: Path) -> Iterator[None]:
    """mosquitto with the generated file, and nothing but who it runs as added."""
    conf = folder / "run.conf"
    user = "user root\n" if os.name == "posix" and os.geteuid() == 0 else ""
    conf.write_text(user + (folder / "kseed.conf").read_text())
    with (folder / "mosquitto.log").open("wb") as log:
        process = subprocess.Popen([str(find_mosquitto()), "-c", str(conf)], stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
        assert process.poll() is None, (folder / "mosquitto.log").read_text()
    finally:
        process.terminate()
        process.wait()


def wait_for(transport: MqttTransport, wanted: Callable[[Event], bool]) -> Any:
    """The first event that is wanted."""
    give_up_at_s = time.monotonic() + 20
    while time.monotonic() < give_up_at_s:
        event = transport.poll(1.0)
        if event is not None and wanted(event):
            return event
    raise AssertionError("it did not come")


def joined(broker: BrokerConfig, name: str) -> MqttTransport:
    transport = MqttTransport(broker, name)
    transport.start()
    wait_for(transport, lambda event: isinstance(event, Connected))
    return transport


@needs_mosquitto
@pytest.mark.broker
def test_mosquitto_starts_with_the_plain_configuration_and_its_limits_are_enough(tmp_path: Path) -> None:
    port = free_port()
    told = write_broker_config(BrokerFiles(tmp_path, port=port, data=tmp_path))
    assert "lets anyone on this machine in" in told
    assert not (tmp_path / "kseed.acl").exists()
    with mosquitto(tmp_path):
        transport = MqttTransport(BrokerConfig(host="127.0.0.1", port=port), "device")
        transport.start()
        connected = wait_for(transport, lambda event: isinstance(event, Connected))
        assert connected.largest_packet_bytes == MAX_PACKET_BYTES
        assert packet_limit_error(spec_of(seeds=65536), connected.largest_packet_bytes) is None
        longest = transport.publish("kseed/night/run", bytes(max(LIMIT_BYTES.values())))
        assert wait_for(transport, lambda event: not isinstance(event, Received)) == Delivered(longest)
        transport.close()


@needs_mosquitto
@needs_passwd
@pytest.mark.broker
def test_the_access_list_refuses_a_device_that_publishes_on_another_ones_topic(tmp_path: Path) -> None:
    port, passwords = free_port(), tmp_path / "passwords"
    passwords.touch(mode=0o600)
    for name in ("kseed-aggregator-night", "alice", "bob"):
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), name, f"secret of {name}"], check=True)
        (tmp_path / name).write_text(f"secret of {name}\n")
    write_broker_config(BrokerFiles(tmp_path, ("night",), passwords, port=port, data=tmp_path))

    def login(name: str) -> BrokerConfig:
        return BrokerConfig(host="127.0.0.1", port=port, username=name, password_file=tmp_path / name)

    update = encode(update_of())
    with mosquitto(tmp_path):
        aggregator = MqttTransport(login("kseed-aggregator-night"), "kseed-aggregator-night")
        aggregator.subscribe("kseed/night/update/+")
        aggregator.start()
        wait_for(aggregator, lambda event: isinstance(event, Connected))
        alice, mallory = joined(login("alice"), "alice"), joined(login("bob"), "alice")  # an id that is not his
        own = alice.publish("kseed/night/update/alice", update)
        assert wait_for(alice, lambda event: True) == Delivered(own)
        for topic in ("update/alice", "presence/alice", "plan", "receipt/bob", "run"):
            token = mallory.publish(f"kseed/night/{topic}", update)
            refused = wait_for(mallory, lambda event: not isinstance(event, Received))
            assert isinstance(refused, Undelivered), topic
            assert (refused.token, "Not authorized" in refused.reason) == (token, True)
        mallory.publish("kseed/night/update/bob", update)
        topics = [wait_for(aggregator, lambda event: isinstance(event, Received)).topic for _ in range(2)]
        assert topics == ["kseed/night/update/alice", "kseed/night/update/bob"]
        assert alice.poll(0.0) is None  # nobody took over her session
        presence = encode(Presence(True, 1, 1, 1, "kseed", ""))
        assert isinstance(published(alice, "kseed/night/presence/alice", presence), Delivered)
        assert isinstance(published(aggregator, "kseed/night/plan", update), Delivered)
        assert isinstance(published(aggregator, "kseed/day/plan", update), Undelivered)
        stranger = MqttTransport(BrokerConfig(host="127.0.0.1", port=port), "alice")
        stranger.start()
        assert "refused" in wait_for(stranger, lambda event: isinstance(event, Disconnected)).reason
        for transport in (aggregator, alice, mallory, stranger):
            transport.close()


def published(transport: MqttTransport, topic: str, payload: bytes) -> Event:
    transport.publish(topic, payload)
    return wait_for(transport, lambda event: isinstance(event, (Delivered, Undelivered)))  # type: ignore[no-any-return]


@needs_mosquitto
@pytest.mark.broker
def test_a_broker_whose_packets_are_too_short_for_the_run_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    with Store.open(path, may_create=True) as store:
        store.create(spec_of(seeds=4096), START_MS)
    with running_mosquitto(tmp_path, extra_config="max_packet_size 9000") as broker:
        command = [sys.executable, "-m", "aggregator.cli", "serve", "night", "--store", str(path)]
        where = ["--broker", f"{broker.host}:{broker.port}"]
        done = subprocess.run([*command, *where], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "error: the broker takes packets of up to 9000 bytes, run 'night' needs 22016. "
            f"Set max_packet_size {MAX_PACKET_BYTES} in mosquitto.conf (`kseed-aggregator broker-config` writes one)."
        ]
        with Store.open(path) as store:
            assert store.run("night").progress.phase == "created"
            transport = MqttTransport(config_of(broker), "kseed-aggregator-night")
            service = Service(store, "night", transport, lambda: START_MS, lambda _: None)
            with pytest.raises(UserError, match="takes packets of up to 9000 bytes"):
                service.serve(lambda: False, wait_for_broker_s=20)
            transport.close()


def test_a_broker_that_names_no_limit_is_taken_at_its_word() -> None:
    assert packet_limit_error(spec_of(), None) is None


def test_what_a_run_needs_goes_by_its_longest_message() -> None:
    error = packet_limit_error(spec_of(), 1)
    assert "needs 2816." in str(error)  # a plan of K = 256
    assert "needs 329216." in str(packet_limit_error(spec_of(seeds=65536), 1))  # a plan with levels and change
    assert packet_limit_error(spec_of(), 2816) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cert", "conf"], "TLS needs both --cert and --key"),
        (["--users", "conf"], "an access list needs the names of the runs"),
        (["--users", "nowhere", "night"], "nowhere: there is no such file"),
        (["NIGHT"], "a run is 'NIGHT'"),
        (["-o", "conf/below"], "conf/below: Not a directory"),
    ],
)
def test_settings_that_contradict_each_other_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "conf").touch()
    monkeypatch.chdir(tmp_path)
    code, _, err = call(cli, "broker-config", *words)
    (line,) = err.splitlines()
    assert code and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_the_command_writes_both_files_with_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    for name in ("passwords", "cert", "key"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    words = "broker-config night day --users passwords --cert cert --key key -o out"
    code, out, _ = call(cli, *words.split())
    assert code == 0
    assert "start it: mosquitto -c out/kseed.conf" in out
    conf = (tmp_path / "out" / "kseed.conf").read_text()
    lines = {"listener 8883", f"certfile {tmp_path}/cert", "allow_anonymous false", "use_username_as_clientid true"}
    assert lines <= set(conf.splitlines())
    acl = (tmp_path / "out" / "kseed.acl").read_text()
    assert "user kseed-aggregator-day\ntopic readwrite kseed/day/#\n" in acl
    assert "%c" not in "".join(line for line in acl.splitlines() if not line.startswith("#"))
