"""The aggregator's commands as a test gives them: a store in a folder of its own, and a run of two rounds in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aggregator import cli
from aggregator.events import Begin
from aggregator.store import Store
from shared.wire import scalars_to_bytes
from tests.runs import BASE, START_MS, arrival, played, update_of


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
