"""The aggregator's commands: what they print, and one line and an exit code for each mistake."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from aggregator.lock import RunLock
from aggregator.operations import steady_clock, unix_ms
from aggregator.state import coefficients_of
from aggregator.store import Store
from shared.delta import read_delta
from tests.aggregator_shell import Shell, serve_two_rounds, shell
from tests.brokers import needs_mosquitto
from tests.programs import ROOT, ended, read_until, started
from tests.runs import BASE
from tools.broker import RunningBroker

__all__ = ["shell"]  # fixture


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
