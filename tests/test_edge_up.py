"""`kseed-edge up` and its owner's commands, as real processes over a real broker."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from aggregator.config import RunConfig
from edge_client import cli
from edge_client.board import Board
from tests.brokers import needs_mosquitto
from tests.programs import created, ended, read_until, started, tiny_folder, write_settings
from tools.broker import RunningBroker

pytestmark = [pytest.mark.broker, needs_mosquitto]
PATIENCE_S = 60.0


class Device:
    """The owner of one device: a configuration file, and the commands that take it."""

    def __init__(self, folder: Path, call: Any, **settings: Any) -> None:
        self._call = call
        self.file = folder / "kseed.toml"
        self.state_dir = folder / "state"
        tables: dict[str, dict[str, Any]] = {
            "agent": {"run": "spring", "device": "ann", "state_dir": "state"},
            "data": {"source": str(folder / "reviews.jsonl"), "max_length": 40},
            **settings,
        }
        write_settings(self.file, tables)

    def __call__(self, *words: object) -> tuple[int, str]:
        """Run a command in this process: its exit code and what it said."""
        code, out, err = self._call(cli, *words, "--config", self.file)
        return code, out + err

    def up(self) -> subprocess.Popen[str]:
        return started("up", "--config", self.file, KSEED_AGENT_STATE_DIR=str(self.state_dir))

    def until(self, text: str, code: int) -> dict[str, Any]:
        """Ask for the status until it says `text` and ends with `code`."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            found, said = self("status", "--json")
            if found == code and text in said:
                return dict(json.loads(said))
            time.sleep(0.1)  # between two questions
        raise AssertionError(f"never: {text!r} with {code}; last: {found}, {said}")


@pytest.fixture
def device(tmp_path: Path, data: Path, mosquitto: RunningBroker, call: Any, monkeypatch: Any) -> Device:
    # The tests' own state folder is another one, and would win over the file.
    monkeypatch.delenv("KSEED_AGENT_STATE_DIR")
    return Device(tmp_path, call, broker={"host": mosquitto.host, "port": mosquitto.port})


def serving(tmp_path: Path, broker: RunningBroker, model: Path, **config: Any) -> subprocess.Popen[str]:
    settings = {"seeds": 256, "rounds": 2, "local_steps": 3, "batch_size": 2, "quorum": 1, "min_updates": 1, **config}
    store = created(tmp_path / "store.sqlite", model, RunConfig(**settings))
    where = f"{broker.host}:{broker.port}"
    return started("serve", "spring", "--store", store, "--broker", where, program="aggregator.cli")


def test_an_agent_that_is_up_waits_works_pauses_stays_and_finishes(device, tmp_path, mosquitto):
    agent = device.up()
    waiting = device.until("waiting for the run", 0)
    assert (waiting["state"], waiting["is_running"], waiting["run"]) == ("waiting", True, "spring")

    code, said = device("pause", "--for", "2h")
    assert (code, said.startswith("paused until 2")) == (0, True)
    served = serving(tmp_path, mosquitto, tiny_folder(tmp_path / "tiny"))
    paused = device.until("Its owner paused it at", 1)
    assert (paused["state"], paused["round_trip_s"] > 0) == ("paused", True)
    assert (
        paused["bytes_today"]["ip_sent"]
        > paused["bytes_today"]["mqtt_sent"]
        > paused["bytes_today"]["payload_sent"]
        > 0
    )
    read_until(agent, "paused: Its owner paused it at")

    agent.kill()
    ended(agent)
    code, said = device("status")
    assert code == 5
    assert "not running: it ended without a word while it was paused" in said
    agent = device.up()  # and what the owner wanted still holds
    device.until("Its owner paused it at", 1)

    assert device("resume") == (0, "resumed.\n")
    over = device.until("the run is finished; waiting for it to go on", 0)
    assert (over["last_accepted"]["round"], over["state"]) == (1, "waiting")
    assert ended(served)[0] == 0
    assert agent.poll() is None

    assert device("finish")[0] == 0
    code, out, err = ended(agent)
    assert (code, err) == (0, "")
    assert out.endswith("left run 'spring'\n")
    assert device("finish") == (2, "error: no agent runs here, so there is nothing to finish.\n")
    code, said = device("logs", "-n", "2")
    assert (code, said.splitlines()[-1].split(" ", 2)[2]) == (0, "left run 'spring'")
    assert Board(next(device.state_dir.iterdir())).wish() is None


def test_an_agent_that_is_up_comes_back_after_a_failure_and_leaves_when_told(device, tmp_path, mosquitto):
    served = serving(tmp_path, mosquitto, tiny_folder(tmp_path / "tiny"))
    wrong = tiny_folder(tmp_path / "wrong", seed=1)
    device.file.write_text(device.file.read_text() + f'[model]\nsource = "{wrong}"\n')
    agent = device.up()
    failed = device.until("Trying again in 1 min.", 4)
    assert failed["state"] == "failed"
    assert failed["text"].startswith("this model is not the one of run 'spring'")
    agent.send_signal(signal.SIGTERM)
    code, out, err = ended(agent)
    assert (code, err) == (0, "")
    assert out.endswith("left run 'spring'\n")
    served.send_signal(signal.SIGTERM)
    ended(served)


def test_up_needs_to_know_its_run(device):
    device.file.write_text(device.file.read_text().replace('run = "spring"\n', ""))
    code, said = device("up")
    assert code == 2
    assert said.startswith("error: agent.run is missing; give the run's name as KSEED_AGENT_RUN")
    assert said.count("\n") == 1


def test_a_second_agent_beside_the_first_is_refused(device):
    agent = device.up()
    device.until("waiting for the run", 0)
    code, said = device("up")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("error: an agent of this device and run is at work here already")
    agent.send_signal(signal.SIGINT)
    assert ended(agent)[0] == 0


def test_a_broker_that_goes_away_shows_in_the_status(device, mosquitto):
    agent = device.up()
    device.until("waiting for the run", 0)
    mosquitto.stop()
    lost = device.until("unconnected", 4)
    assert lost["connected_since_ms"] is None
    mosquitto.restart()
    device.until("waiting for the run", 0)
    agent.send_signal(signal.SIGTERM)
    assert ended(agent)[0] == 0
