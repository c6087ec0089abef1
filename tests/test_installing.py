"""systemd units of agent and aggregator: what systemd says of them, and that nobody's changes are lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from aggregator import cli as aggregator_cli
from edge_client import cli as edge_cli
from shared.service_unit import Service, quoted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt-get install systemd)"
)
AGENT = '[agent]\nrun = "spring"\n'
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edge(tmp_path: Path) -> Path:
    """A configuration of an agent, with caps."""
    file = tmp_path / "my edge.toml"
    file.write_text(
        f'{AGENT}[data]\nsource = "owner/name"\n[caps]\ncpu_percent = 50\nmemory_mb = 4000\n[kernel]\nthreads = 2\n'
    )
    return file


@pytest.fixture(autouse=True)
def units_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's units are under `tmp_path`."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def kseed_edge(call: Call) -> Call:
    """Runs a command of the agent in this process; gives exit code, stdout, stderr."""
    return partial(call, edge_cli)


def unit_of(tmp_path: Path) -> Path:
    return tmp_path / "config" / "systemd" / "user" / "kseed-edge.service"


# --- what systemd says


def verified(text: str, folder: Path, *options: str) -> None:
    """systemd has no complaint about the unit, not even a warning."""
    file = folder / "kseed-test.service"
    file.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *options, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if file.name in line]  # not of other units
    assert (done.returncode, said) == (0, [])


def exposure(text: str, folder: Path) -> float:
    """The score of `systemd-analyze security`, 0 (closed) to 10."""
    file = folder / "kseed-test.service"
    file.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)], capture_output=True, text=True
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze cannot judge a file: {done.stderr.strip()}")
    return float(found[1])


@needs_systemd
def test_systemd_accepts_the_agent_s_units(tmp_path: Path, edge: Path, kseed_edge: Call) -> None:
    code, system, _ = kseed_edge("install-service", "--config", edge, "--system", "--print")
    assert code == 0
    verified(system, tmp_path)
    assert exposure(system, tmp_path) <= 3.0
    code, own, _ = kseed_edge("install-service", "--config", edge, "--print")
    assert code == 0
    verified(own, tmp_path, "--user")


@needs_systemd
def test_systemd_accepts_the_aggregator_s_units(tmp_path: Path, call: Call) -> None:
    config = tmp_path / "aggregator.toml"
    config.write_text("")
    words = ("install-service", "spring", "--config", config, "--print")
    system = call(aggregator_cli, *words, "--system")[1]
    verified(system, tmp_path)
    assert exposure(system, tmp_path) <= 2.0
    verified(call(aggregator_cli, *words)[1], tmp_path, "--user")


@needs_systemd
def test_a_setting_that_systemd_does_not_know_would_be_found(tmp_path: Path, edge: Path, kseed_edge: Call) -> None:
    text = kseed_edge("install-service", "--config", edge, "--system", "--print")[1].replace(
        "RestrictSUIDSGID", "RestrictX"
    )
    with pytest.raises(AssertionError, match=r"Unknown key.* 'RestrictX'"):
        verified(text, tmp_path)


# --- what the unit says


def test_the_unit_runs_this_interpreter_with_the_file_and_its_caps(edge: Path, kseed_edge: Call) -> None:
    text = kseed_edge("install-service", "--config", edge, "--print")[1]
    assert f'ExecStart={sys.executable} -m edge_client.cli up --config "{edge}"\n' in text
    for line in ("Nice=10", "Environment=KSEED_CAPS_NICE=0", "CPUQuota=100%", "MemoryHigh=5000000000"):
        assert f"\n{line}\n" in text
    assert "WorkingDirectory" not in text
    assert "Protect" not in text, "a user's manager cannot mount"


def test_home_is_closed_but_where_something_of_the_agent_lies_in_it() -> None:
    def home_of(*reads: str) -> str | None:
        text = Service(name="a", description="", command=["/bin/true"], user="kseed", reads=map_paths(reads)).text()
        return next((line for line in text.splitlines() if line.startswith("ProtectHome=")), None)

    assert home_of("/srv/data", "/opt/kseed") == "ProtectHome=yes"
    assert home_of("/srv/data", "/home/ann/kseed") == "ProtectHome=read-only"


def test_a_service_always_has_a_folder_for_temporary_files() -> None:
    def text(read: str) -> str:
        return Service(name="a", description="", command=["/bin/true"], user="kseed", reads=[Path(read)]).text()

    assert "\nPrivateTmp=yes\n" in text("/srv/data")
    assert "\nReadWritePaths=/tmp /var/tmp\n" in text("/tmp/data")
    assert "PrivateTmp" not in text("/tmp/data"), "it would hide the data"


def map_paths(texts: tuple[str, ...]) -> list[Path]:
    return [Path(text) for text in texts]


def test_data_given_relative_to_here_is_found_from_the_service(
    tmp_path: Path, edge: Path, kseed_edge: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "100% mine"
    folder.mkdir()
    (folder / "a.jsonl").touch()
    monkeypatch.chdir(folder)
    edge.write_text(f'{AGENT}[data]\nsource = "a.jsonl"\n')
    assert f"WorkingDirectory={tmp_path}/100%% mine\n" in kseed_edge("install-service", "--config", edge, "--print")[1]


@pytest.mark.parametrize(
    ("word", "written"),
    [("/opt/kseed", "/opt/kseed"), ("/a b", '"/a b"'), ('/a"b', '"/a\\"b"'), ("/50%", "/50%%"), ("/a\\b", '"/a\\\\b"')],
)
def test_words_reach_the_program_as_they_are(word: str, written: str) -> None:
    assert quoted(word) == written


# --- files


def test_a_service_is_written_told_and_removed(tmp_path: Path, edge: Path, kseed_edge: Call) -> None:
    code, out, _ = kseed_edge("install-service", "--config", edge)
    unit = unit_of(tmp_path)
    assert code == 0
    assert out.startswith(f"wrote {unit}\n")
    assert "systemctl --user enable --now kseed-edge\n" in out
    assert kseed_edge("install-service", "--config", edge)[1].startswith(f"unchanged: {unit}\n")
    wanted = unit.parent / "default.target.wants" / unit.name
    wanted.parent.mkdir()
    wanted.symlink_to(unit)  # what `systemctl enable` does
    code, out, _ = kseed_edge("uninstall-service")
    assert code == 0
    assert f"removed {unit}\n" in out
    assert "systemctl --user stop kseed-edge\n" in out
    assert not unit.exists()
    assert not wanted.is_symlink()


@pytest.mark.parametrize("name", ["*", "../other", "kseed-?dge"])
def test_no_name_removes_other_services(tmp_path: Path, kseed_edge: Call, name: str) -> None:
    wants = unit_of(tmp_path).parent / "default.target.wants"
    wants.mkdir(parents=True)
    (wants / "kseed-edge.service").symlink_to("/nowhere")
    code, _, err = kseed_edge("uninstall-service", "--name", name)
    assert (code, (wants / "kseed-edge.service").is_symlink()) == (2, True)
    assert err.startswith(f"error: --name is {name!r}; allowed are letters")


def test_a_unit_written_with_other_settings_is_replaced(tmp_path: Path, edge: Path, kseed_edge: Call) -> None:
    kseed_edge("install-service", "--config", edge)
    edge.write_text(f'{AGENT}[data]\nsource = "owner/name"\n[caps]\nnice = 5\n')
    assert kseed_edge("install-service", "--config", edge)[1].startswith("wrote again")
    assert "\nNice=5\n" in unit_of(tmp_path).read_text()


@pytest.mark.parametrize("command", [("install-service", "--config"), ("uninstall-service",)])
def test_a_unit_that_somebody_changed_stays_until_they_insist(
    tmp_path: Path, edge: Path, kseed_edge: Call, command: tuple[str, ...]
) -> None:
    kseed_edge("install-service", "--config", edge)
    unit = unit_of(tmp_path)
    changed = unit.read_text().replace("Nice=10", "Nice=1")
    unit.write_text(changed)
    words = (*command, edge) if len(command) == 2 else command
    code, _, err = kseed_edge(*words)
    assert (code, unit.read_text()) == (2, changed)
    assert "has been changed since kseed wrote it; move the changes to kseed-edge.service.d/own.conf" in err
    assert kseed_edge(*words, "--force")[0] == 0
    assert not unit.exists() or unit.read_text() != changed


def test_a_unit_of_somebody_else_is_left_alone(tmp_path: Path, edge: Path, kseed_edge: Call) -> None:
    unit = unit_of(tmp_path)
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    code, _, err = kseed_edge("install-service", "--config", edge)
    assert code == 2
    assert "was not written by kseed; choose another --name, or give --force" in err
    assert kseed_edge("uninstall-service")[0] == 2
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--user", "ann"), "only a --system service runs under another login"),
        (("--name", "../x"), "--name is '../x'; allowed are letters"),
        (("--system", "--user", "a b"), "--user is 'a b'; allowed are letters"),
    ],
)
def test_impossible_names_are_refused(
    tmp_path: Path, edge: Path, kseed_edge: Call, words: tuple[str, ...], said: str
) -> None:
    code, _, err = kseed_edge("install-service", "--config", edge, *words)
    assert (code, list(tmp_path.glob("config/**/*.service"))) == (2, [])
    assert said in err


def test_a_wrong_configuration_is_told_before_anything_is_written(tmp_path: Path, edge: Path, kseed_edge: Call) -> None:
    edge.write_text("[data]\nsource = 'a/b'\n[caps]\nnice = 40\n")
    code, _, err = kseed_edge("install-service", "--config", edge)
    assert (code, unit_of(tmp_path).exists()) == (2, False)
    assert "nice is 40" in err


def test_a_configuration_without_a_run_would_not_start(edge: Path, kseed_edge: Call) -> None:
    edge.write_text("[data]\nsource = 'a/b'\n")
    assert "agent.run is missing" in kseed_edge("install-service", "--config", edge)[2]


def test_there_is_nothing_to_remove(kseed_edge: Call) -> None:
    code, _, err = kseed_edge("uninstall-service")
    assert code == 2
    assert "there is no " in err
