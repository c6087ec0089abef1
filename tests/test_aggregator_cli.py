"""The aggregator's commands: what they print, and one line and an exit code for each mistake."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aggregator import cli
from aggregator.attendance import Seen
from aggregator.events import Begin
from aggregator.lock import RunLock
from aggregator.operations import steady_clock, unix_ms
from aggregator.state import coefficients_of
from aggregator.store import Store
from shared.delta import read_delta
from shared.wire import scalars_to_bytes
from tests.brokers import needs_mosquitto
from tests.programs import ROOT, ended, read_until, started
from tests.runs import BASE, START_MS, arrival, update_of
from tests.test_store import played
from tools.broker import RunningBroker


class Shell:
    """Runs commands in this process, with a store in a folder of its own."""

    def __init__(self, folder: Path, call: Any) -> None:
        self.folder = folder
        self.store = folder / "kseed.sqlite3"
        self.base = folder / "base.json"
        BASE.write(self.base)
        self._call = call

    def __call__(self, *words: Any, store: bool = True) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        done: tuple[int, str, str] = self._call(cli, *words, *(["--store", self.store] if store else []))
        return done

    def create(self, name: str = "night", *words: Any) -> str:
        code, out, err = self("create", name, "--base", self.base, "--seeds", 256, *words)
        assert (code, err) == (0, "")
        return out

    def settings(self, name: str = "night") -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self("show", name, "--json")[1])["settings"]
        return settings


@pytest.fixture
def shell(tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    return Shell(tmp_path, call)


def serve_two_rounds(shell: Shell) -> None:
    """Play two rounds into the store, as a serving process would."""
    with Store.open(shell.store) as store:
        scalars = scalars_to_bytes([1, 2, 3], "f16")
        events = [arrival(device, update_of(number, scalars=scalars)) for number in (0, 1) for device in "ab"]
        played(store, store.state("night"), Begin(START_MS), *events)


# --- create


def test_create_says_what_it_made_and_what_comes_next(shell: Shell) -> None:
    out = shell.create()
    assert "run night: tiny/model in bf16, hadamard directions, K = 256, 50 rounds of 20 steps" in out
    assert "serve it: kseed-aggregator serve night --broker HOST" in out
    with Store.open(shell.store) as store:
        spec = store.run("night").spec
    assert spec.facts.manifest_digest == BASE.manifest.digest()
    assert spec.facts.base_digest == BASE.base_digest
    assert spec.nonce_key != bytes(32)


def test_every_run_has_keys_of_its_own_unless_one_is_given(shell: Shell) -> None:
    for name in ("one", "two"):
        shell.create(name)
    shell.create("three", "--pool-key", 2**64 - 1)
    with Store.open(shell.store) as store:
        specs = [row.spec for row in store.runs()]
    assert len({spec.facts.pool_key for spec in specs}) == len({spec.nonce_key for spec in specs}) == 3
    assert 2**64 - 1 in {spec.facts.pool_key for spec in specs}


def test_the_papers_settings_are_one_flag_away(shell: Shell) -> None:
    BASE.__class__(BASE.model, "fp16", BASE.manifest, BASE.base_digest).write(shell.base)
    code, out, err = shell("create", "paper", "--base", shell.base, "--preset", "paper")
    assert (code, err) == (0, "")
    paper = shell.settings("paper")
    assert (paper["seeds"], paper["local_steps"], paper["batch_size"]) == (4096, 200, 1)
    assert (paper["eps"], paper["lr"], paper["step"]) == (5e-4, 3e-7, "plain")
    assert (paper["directions"], paper["participation"], paper["dtype"]) == ("gaussian", 0.05, "fp16")
    assert "gaussian directions" in out


def test_the_preset_for_the_upper_third_measures_on_one_side(shell: Shell) -> None:
    shell.create("upper", "--preset", "upper")
    upper = shell.settings("upper")
    assert (upper["one_sided"], upper["local_steps"], upper["step_rms"]) == (8, 40, 4e-3)
    shell.create("both", "--preset", "upper", "--one-sided", 0, "--local-steps", 20)
    assert shell.settings("both")["one_sided"] == 0


def test_flags_win_over_environment_over_file_over_preset(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shell.folder / "kseed.toml"
    file.write_text('[run]\nlr = 0.1\neps = 0.1\nrounds = 1\n[broker]\nhost = "h"\n[data]\nanything = 1\n')
    monkeypatch.setenv("KSEED_RUN_LR", "0.2")
    monkeypatch.setenv("KSEED_RUN_EPS", "0.2")
    shell.create("night", "--preset", "paper", "--dtype", "bf16", "--config", file, "--lr", 0.3)
    settings = shell.settings()
    assert (settings["lr"], settings["eps"], settings["rounds"], settings["local_steps"]) == (0.3, 0.2, 1, 200)


def test_every_create_flag_is_a_setting() -> None:
    import inspect

    from aggregator.config import RunConfig

    flags = set(inspect.signature(cli.create).parameters) - cli._NOT_SETTINGS - {"context"}
    assert flags <= set(RunConfig.__struct_fields__)
    assert len(flags) == 23


def test_the_store_is_found_through_the_environment(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(shell.folder / "data"))
    assert shell("create", "night", "--base", shell.base, store=False)[0] == 0
    assert (shell.folder / "data" / "kseed" / "aggregator.sqlite3").exists()
    monkeypatch.setenv("KSEED_AGGREGATOR_STORE", str(shell.store))
    assert "there is no store here" in shell("list", store=False)[2]


# --- looking


def test_list_and_show_print_what_is_in_the_store(shell: Shell) -> None:
    shell.create("night", "--local-steps", 3, "--deadline", 60)
    shell.create("day")
    serve_two_rounds(shell)
    code, out, _ = shell("list")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["RUN", "PHASE", "ROUND"]
    assert lines[1][:3] == ["day", "created", "0/50"]
    assert lines[2][:3] == ["night", "open", "2/50"]
    _, out, _ = shell("show", "night")
    assert "run night: open, round 2 of 50, nobody serves it now" in out
    assert [line.split()[:4] for line in out.splitlines() if line[:1] in ("0", "1")] == [
        ["0", "2/2", "2.0000", "3.0000"],
        ["1", "2/2", "2.0000", "3.0000"],
    ]
    assert "DEVICE  UPDATES  LAST ROUND" in out


def test_show_prints_json_for_programs(shell: Shell) -> None:
    shell.create("night", "--local-steps", 3)
    serve_two_rounds(shell)
    facts = json.loads(shell("show", "night", "--json")[1])
    assert [report["round"] for report in facts["reports"]] == [0, 1]
    assert [device["device"] for device in facts["devices"]] == ["a", "b"]
    assert facts["update_bytes"] == sum(device["update_bytes"] for device in facts["devices"]) > 0
    assert json.loads(shell("list", "--json")[1])[0]["run"] == "night"


def test_who_is_online_is_known_only_while_somebody_listens(shell: Shell) -> None:
    shell.create("night")
    with Store.open(shell.store, may_write=True) as store:
        store.keep_presences("night", [Seen("ann", True, "", "kseed", 1_700_000_000_000)])
    lock = RunLock.take(shell.store, "night")
    out = shell("show", "night")[1]
    assert "devices online: 1, at work: 1" in out
    lock.release()
    out = shell("show", "night")[1]
    assert "nobody listens, so who is online is not known" in out
    assert re.search(r"^ann .*online when last heard, 2023-11-1", out, re.MULTILINE)


def test_an_empty_store_is_said_to_be_empty(shell: Shell) -> None:
    Store.open(shell.store, may_create=True).close()
    assert shell("list") == (0, f"no runs in {shell.store}\n", "")
    assert shell("list", "--json")[1] == "[]\n"


def test_coefficients_writes_a_delta_of_any_version(shell: Shell) -> None:
    shell.create("night", "--local-steps", 3)
    serve_two_rounds(shell)
    with Store.open(shell.store) as store:
        wanted = [coefficients_of(store.coefficients("night", version)).tolist() for version in range(3)]
    for version, words in ((0, ("--version", 0)), (1, ("--version", 1)), (2, ())):
        code, out, _ = shell("coefficients", "night", "-o", shell.folder / "delta", *words)
        assert (code, f"run night, version {version}" in out) == (0, True)
        delta = read_delta(shell.folder / "delta")
        assert (delta.run, delta.version, delta.base_digest) == ("night", version, BASE.base_digest)
        assert delta.coefficients.tolist() == wanted[version]


def test_commands_say_when_they_take_effect(shell: Shell) -> None:
    shell.create()
    assert "pause takes effect when it is served again: nobody serves it now" in shell("pause", "night")[1]
    lock = RunLock.take(shell.store, "night")
    assert "stop takes effect within a second" in shell("stop", "night", "--reason", "enough")[1]
    assert "served now" in shell("show", "night")[1]
    lock.release()
    assert "asked for and not yet obeyed: pause, stop" in shell("show", "night")[1]


# --- mistakes


def mistakes() -> dict[str, tuple[tuple[Any, ...], int, str]]:
    return {
        "no store": (("list",), 2, "there is no store here; `kseed-aggregator create` makes one"),
        "no base": (("create", "n", "--base", "none.json"), 2, "none.json"),
        "bad name": (("create", "Big+Run", "--base", "BASE"), 2, "the run's name is 'Big+Run'"),
        "bad seeds": (("create", "n", "--base", "BASE", "--seeds", 1000), 2, "seeds is 1000; allowed are the powers"),
        "bad preset": (("create", "n", "--base", "BASE", "--preset", "best"), 2, "--preset is 'best'; allowed are"),
        "bad group": (
            ("create", "n", "--base", "BASE", "--preset", "upper", "--local-steps", 20),
            2,
            "one_sided is 8, local_steps 20; allowed are 0, and 2 to 64 where local_steps is a multiple of it",
        ),
        "bad choice": (("create", "n", "--base", "BASE", "--directions", "up"), 2, "run.directions is 'up'"),
        "bad dtype": (("create", "n", "--base", "BASE", "--dtype", "fp32"), 2, "the base file was made for bf16"),
        "bad key": (("create", "n", "--base", "BASE", "--pool-key", -1), 2, "--pool-key is -1; allowed: 0 to 2^64"),
        "bad file": (("create", "n", "--base", "BASE", "--config", "TOML"), 2, "unknown key 'run.sedes'"),
        "paper on bf16": (("create", "n", "--base", "BASE", "--preset", "paper"), 2, "kseed manifest --dtype fp16"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_is_one_line_and_an_exit_code_and_leaves_no_store(shell: Shell, name: str) -> None:
    words, code, message = mistakes()[name]
    toml = shell.folder / "kseed.toml"
    toml.write_text("[run]\nsedes = 4096\n")
    places = {"BASE": shell.base, "TOML": toml}
    got, out, err = shell(*(places.get(str(word), word) for word in words))
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not shell.store.exists()


@pytest.mark.parametrize("verb", ["show", "stop", "pause", "resume", "serve", "coefficients"])
def test_an_unknown_run_is_named(shell: Shell, verb: str) -> None:
    shell.create()
    extra = ("-o", shell.folder / "x") if verb == "coefficients" else ()
    code, out, err = shell(verb, "day", *extra)
    assert (code, out) == (2, "")
    assert err == f"error: {shell.store}: there is no run 'day'; there are: night.\n"


def test_a_name_is_taken_once(shell: Shell) -> None:
    shell.create()
    code, _, err = shell("create", "night", "--base", shell.base)
    assert code == 2
    assert "there is a run 'night' already; choose another name" in err


def test_an_unknown_version_is_named(shell: Shell) -> None:
    shell.create()
    _, _, err = shell("coefficients", "night", "--version", 7, "-o", shell.folder / "x")
    assert "run 'night' has no version 7; it has 0 to 0" in err
    assert not (shell.folder / "x").exists()


def test_a_finished_run_takes_no_commands(shell: Shell) -> None:
    shell.create("night", "--local-steps", 3, "--rounds", 2)
    serve_two_rounds(shell)
    code, _, err = shell("pause", "night")
    assert (code, err) == (2, "error: run 'night' is finished (all 2 rounds are done); nothing can be done with it.\n")


def test_two_serve_of_one_run_are_refused(shell: Shell) -> None:
    shell.create()
    lock = RunLock.take(shell.store, "night")
    code, _, err = shell("serve", "night")
    lock.release()
    assert code == 2
    assert "run 'night' is being served by another process; stop that one first" in err


def test_a_broker_that_is_down_is_exit_code_4(shell: Shell) -> None:
    shell.create()
    code, out, err = shell("serve", "night", "--broker", "localhost:1", "--wait", 0.5)
    assert code == 4
    assert err.startswith("error: the broker could not be reached within 0.5 s: ")
    assert "Traceback" not in out + err
    assert err.count("\n") == 1


# --- the process


def test_the_aggregator_never_imports_a_learning_framework() -> None:
    code = (
        "import sys, aggregator.cli, aggregator.operations, aggregator.listing, shared.mqtt;"
        "print([m for m in ('torch', 'numba', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['kseed-aggregator', '--help']\n"
        "from aggregator.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([m for m in ('torch', 'numba', 'transformers', 'numpy', 'paho', 'sqlite3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_the_steady_clock_starts_at_the_systems_and_does_not_go_back() -> None:
    clock = steady_clock()
    assert abs(clock() - unix_ms()) < 60_000
    times = [clock() for _ in range(1000)]
    assert times == sorted(times)


@needs_mosquitto
@pytest.mark.broker
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_serve_leaves_cleanly_on_sigterm_and_obeys_stop(shell: Shell, mosquitto: RunningBroker) -> None:
    shell.create()
    words = ("serve", "night", "--broker", f"{mosquitto.host}:{mosquitto.port}", "--store", shell.store)

    def serve() -> subprocess.Popen[str]:
        process = started(*words, program="aggregator.cli", PYTHONUNBUFFERED="1")
        read_until(process, "connected to the broker")
        return process

    first = serve()
    first.send_signal(signal.SIGTERM)
    code, out, _ = ended(first)
    assert code == 0
    assert "leaving; run night is open in round 0; serve it again to go on" in out

    second = serve()
    assert "within a second" in shell("stop", "night", "--reason", "enough")[1]
    code, out, _ = ended(second)
    assert code == 0
    assert "run night is finished: enough; version 0" in out
