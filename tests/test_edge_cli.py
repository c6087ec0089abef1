"""`kseed-edge`: one line and an exit code for each mistake, and whole runs over a real broker as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from aggregator.config import RunConfig
from edge_client import cli
from edge_client.config import device_of
from edge_client.data.settings import DataConfig
from edge_client.operations import check_data, read_config
from shared.errors import UserError
from tests.brokers import needs_mosquitto
from tests.programs import ROOT, created, ended, read_until, started, tiny_folder
from tools.broker import free_port


@pytest.fixture
def join(call: Any) -> Any:
    """Runs `kseed-edge join` in this process; gives exit code, stdout, stderr."""
    return partial(call, cli, "join")


# Help.


@pytest.mark.parametrize("words", [("--help",), ("join", "--help")])
def test_help_answers_in_a_blink_without_torch(words):
    before = os.times()
    code, out, err = ended(started(*words))
    after = os.times()
    assert (code, err) == (0, "")
    assert "Usage" in out
    program = (
        "import sys, edge_client.cli; print(sorted({'torch', 'transformers', 'numba', 'paho'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
    worked_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert worked_s < 2.5  # processor time; half a second is usual


# Mistakes that need no network. Each is one line, names what was got, and comes before the broker is asked.


def fails(join: Any, *words: object) -> str:
    code, out, err = join("spring", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return str(err)


def test_missing_file_is_named(join, tmp_path):
    assert f"no data at '{tmp_path}/none.jsonl'" in fails(join, "--data", tmp_path / "none.jsonl")


def test_empty_data_is_named(join, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl holds no records" in fails(join, "--data", tmp_path / "empty.jsonl")


def test_wrong_field_is_named_with_file_and_line(join, tmp_path, data):
    data.write_text(data.read_text() + '{"text": "more", "mood": "+"}\n')
    assert "reviews.jsonl line 21 has no field 'label'; it has 'text', 'mood'" in fails(join, "--data", data)


def test_data_of_no_known_shape_is_named(join, tmp_path):
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    assert "has the fields 'a', 'b', which is none of the known shapes" in fails(join, "--data", tmp_path / "odd.csv")


def test_template_with_the_datas_own_fields_needs_no_field_of_ours(tmp_path):
    (tmp_path / "own.csv").write_text("sentence,label\nfine,+\n")
    check_data(DataConfig(str(tmp_path / "own.csv"), shape="label", template="{sentence}:"))
    with pytest.raises(UserError, match="no field 'text'"):
        check_data(DataConfig(str(tmp_path / "own.csv"), shape="label"))


def test_held_out_file_is_checked_too(join, tmp_path, data):
    (tmp_path / "kseed.toml").write_text('[data]\nheld_out_source = "later.csv"\n')
    assert "no data at 'later.csv'" in fails(join, "--data", data, "--config", tmp_path / "kseed.toml")


def test_missing_data_option_says_how_to_give_it(join):
    assert "data.source is missing" in fails(join)


def test_impossible_run_name_is_refused(join, data):
    code, _, err = join("Spring!", "--data", data)
    assert code == 2
    assert "the run's name is 'Spring!'" in err


def test_impossible_device_id_is_refused(join, data):
    assert "device is 'Ann'" in fails(join, "--data", data, "--device-id", "Ann")


def test_impossible_broker_is_refused(join, data):
    assert "--broker is 'host:mqtt'" in fails(join, "--data", data, "--broker", "host:mqtt")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--kernel", "fast", "kernel.name is 'fast'"),
        ("--threads", "-1", "threads is -1"),
        ("--shape", "poem", "data.shape is 'poem'"),
        ("--held-out", "1.5", "held_out_fraction is 1.5"),
        ("--battery-floor", "200", "battery_floor_percent is 200"),
        ("--memory-floor-mb", "-5", "memory_floor_mb is -5"),
        ("--hours", "22-7", "hours is '22-7'; give times of the day"),
        ("--nice", "20", "nice is 20"),
        ("--cpu-percent", "0", "cpu_percent is 0"),
        ("--memory-cap-mb", "5", "memory_mb is 5"),
        ("--template", "no field", "template is 'no field'"),
        ("--connect-timeout", "0", "connect_timeout_s is 0"),
        ("--ca-file", "none.pem", "ca_file is given but tls is off"),
    ],
)
def test_impossible_setting_is_refused(join, data, option, value, named):
    assert named in fails(join, "--data", data, option, value)


def test_unknown_key_in_the_file_names_the_nearest(join, data, tmp_path):
    (tmp_path / "kseed.toml").write_text('[agent]\ndevise = "ann"\n')
    error = fails(join, "--data", data, "--config", tmp_path / "kseed.toml")
    assert "unknown key 'agent.devise'; did you mean 'agent.device'?" in error


def test_unwritable_metrics_file_is_refused(join, data, tmp_path):
    assert "metrics file" in fails(join, "--data", data, "--metrics", data / "metrics.jsonl")


def test_settings_come_from_flags_over_environment_over_file(tmp_path, data):
    file = tmp_path / "kseed.toml"
    file.write_text(
        f'[data]\nsource = "{data.name}"\n[agent]\ndevice = "file"\n[kernel]\nthreads = 3\n[run]\nseeds = 4096\n'
        '[gate]\nmemory_floor_mb = 100\n[broker]\nhost = "b.example.org"\ntls = true\n'
    )
    config = read_config(file, {"agent.device": None, "kernel.threads": 1}, {"KSEED_AGENT_DEVICE": "env"})
    assert (config.agent.device, config.kernel.threads, config.gate.memory_floor_mb) == ("env", 1, 100)
    assert (config.data.source, config.broker.port) == (data.name, 8883)


@pytest.mark.parametrize(
    ("host", "device"),
    [
        ("Anns-MacBook.local", "anns-macbook"),
        ("jetson_orin.lan", "jetson-orin"),
        ("--", "device"),
        ("", "device"),
        ("ü", "device"),
        ("a" * 80, "a" * 64),
        ("a" * 63 + "--b", "a" * 63),
    ],
)
def test_device_id_is_made_from_the_hosts_name(host, device):
    assert device_of(host) == device


def test_option_that_is_no_setting_is_a_mistake_in_the_code(tmp_path, data):
    with pytest.raises(UserError, match="unknown key"):
        read_config(None, {"data.source": str(data), "agent.nonsense": 1}, {})


# The network.


def test_broker_that_is_down_is_named_and_given_up(join, data):
    port = free_port()
    code, out, err = join("spring", "--data", data, "--broker", f"127.0.0.1:{port}", "--connect-timeout", "1")
    assert code == 4
    assert out.count("\n") == 1
    assert f"cannot connect to broker 127.0.0.1:{port}: " in out
    assert f"error: no connection to broker 127.0.0.1:{port} in 1 s" in err
    assert err.count("\n") == 1


@needs_mosquitto
@pytest.mark.broker
def test_unknown_run_is_named_with_its_broker(join, data, mosquitto, monkeypatch):
    monkeypatch.setenv("KSEED_AGENT_RUN_TIMEOUT_S", "1")
    where = f"{mosquitto.host}:{mosquitto.port}"
    code, _, err = join("spring", "--data", data, "--broker", where)
    assert code == 2
    assert err == (
        f"error: broker {where} has no run 'spring' (waited 1 s). Check the name, or wait for it with --wait.\n"
    )


@needs_mosquitto
@pytest.mark.broker
def test_two_agents_with_one_id_end_with_a_clear_line_and_exit_code_3(data, mosquitto, tmp_path):
    words = ("join", "spring", "--data", data, "--broker", f"{mosquitto.host}:{mosquitto.port}", "--wait")
    first = started(*words, "--device", "ann")
    read_until(first, "connected to")
    code, out, err = ended(started(*words, "--device", "ann"))
    assert (code, out) == (2, "")
    assert err.startswith("error: an agent of this device and run is at work here already")
    second = started(*words, "--device", "ann", "--state-dir", tmp_path / "of another machine")
    read_until(second, "connected to")
    code, _, err = ended(first)
    assert code == 3
    assert err.startswith("error: another agent runs with the device id 'ann' in run 'spring'")
    assert err.count("\n") == 1
    assert second.poll() is None
    second.send_signal(signal.SIGTERM)
    code, out, err = ended(second)
    assert (code, err) == (0, "")
    assert out.endswith("left run 'spring'\n")


@needs_mosquitto
@pytest.mark.broker
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_leave_it_leaves_with_exit_code_0(data, mosquitto, number):
    words = ("join", "spring", "--data", data, "--broker", f"{mosquitto.host}:{mosquitto.port}", "--wait")
    process = started(*words)
    read_until(process, "connected to")
    process.send_signal(number)
    code, out, err = ended(process)
    assert (code, err) == (0, "")
    assert out == "left run 'spring'\n"


# A whole run, as people start it.


@needs_mosquitto
@pytest.mark.broker
def test_two_processes_finish_a_run_and_one_with_a_wrong_model_is_refused(tmp_path, data, mosquitto):
    model, wrong = tiny_folder(tmp_path / "tiny"), tiny_folder(tmp_path / "wrong", seed=1)
    config = RunConfig(seeds=256, rounds=3, local_steps=3, batch_size=2, quorum=2, min_updates=2)
    store = created(tmp_path / "store.sqlite", model, config)
    where = f"{mosquitto.host}:{mosquitto.port}"
    serving = started("serve", "spring", "--store", store, "--broker", where, program="aggregator.cli")
    words = ("join", "spring", "--broker", where, "--data", data, "--max-length", "40", "--wait")
    agents = [
        started(*words, "--device", name, "--kernel", kernel, "--metrics", tmp_path / f"{name}.jsonl")
        for name, kernel in (("ann", "numba"), ("bob", "torch"))
    ]
    refused = ended(started(*words, "--device", "cyd", "--model", wrong), 120.0)
    ends = [ended(agent, 120.0) for agent in agents]
    assert [(code, err) for code, _, err in ends] == [(0, ""), (0, "")]
    assert all(out.endswith("run 'spring' is finished at version 3: all 3 rounds are done\n") for _, out, _ in ends)
    assert ended(serving)[0] == 0
    assert refused[0] == 2
    assert "error: this model is not the one of run 'spring': the tensors are alike, but the weights" in refused[2]
    metrics = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("ann", "bob")]
    last = [json.loads(lines[-1]) for lines in metrics]
    assert last[0]["model_digest"] == last[1]["model_digest"]
    assert last[0]["held_out_loss"] > 0
    first = json.loads(metrics[0][0])
    assert first["receipt"] == "accepted"
    if sys.platform == "linux":
        assert first["socket_sent_bytes"] > first["payload_sent_bytes"] > 0
