"""`kseed-aggregator create`: where a run's settings come from, what it prints, and where the store is."""

from __future__ import annotations

import pytest

from aggregator import cli
from aggregator.store import Store
from tests.aggregator_shell import Shell, shell
from tests.runs import BASE

__all__ = ["shell"]  # fixture


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
