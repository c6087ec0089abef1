"""The lives of an agent that is up: what ends one of them, and what its owner is told until the next begins."""

from __future__ import annotations

import gc
import weakref
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edge_client import lives
from edge_client.board import Board
from edge_client.config import EdgeConfig
from edge_client.data.settings import DataConfig
from edge_client.events import Finish
from edge_client.lives import Lives, Place
from edge_client.policy import Wish
from edge_client.progress import Screen
from edge_client.state import Identity, Limits
from edge_client.status import SILENT_S
from edge_client.telling import read_status
from shared.errors import UserError
from tests.test_owner import left

FAILED = Finish(4, "the hub does not answer.")


class Script(Lives):
    """Lives that end as written, on a clock that only `sleep` moves; after the last one the owner wants the end."""

    def __init__(self, board: Board, monkeypatch: pytest.MonkeyPatch, *endings: Finish | UserError) -> None:
        config = EdgeConfig(data=DataConfig("reviews.jsonl"))
        super().__init__(Place("spring", "ann", config, board), "kseed 0", Screen(StringIO(), is_terminal=False))
        self.endings = list(endings)
        self.now_s = 0.0
        self.silences_s: list[float] = []
        clock = SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._sleep, time_ns=lambda: int(self.now_s * 1e9))
        monkeypatch.setattr(lives, "time", clock)

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds
        status = read_status(self._place.board)
        assert status is not None
        self.silences_s.append(self.now_s - status.written_at_ms / 1000)

    def one(self, limits: Limits) -> Finish:
        ending = self.endings.pop(0)
        if not self.endings:
            self._place.board.want(Wish("finish", 0.0))
        if isinstance(ending, UserError):
            raise ending
        return ending


def test_an_agent_that_waits_long_after_a_failure_is_not_taken_for_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = left(tmp_path)
    script = Script(board, monkeypatch, *[FAILED] * 7, Finish(0, "left"))
    script.many()
    assert script.now_s == pytest.approx(60 + 120 + 240 + 480 + 960 + 1920 + 3600)
    assert max(script.silences_s) < SILENT_S / 2
    status = read_status(board)
    assert status is not None
    assert (status.state, status.text) == ("failed", "the hub does not answer. Trying again in 1 min.")


def test_settings_that_cannot_be_used_end_the_first_life_and_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = UserError("ca_file /etc/ca.pem is missing.")
    with pytest.raises(UserError, match=r"ca\.pem"):
        Script(left(tmp_path), monkeypatch, missing, FAILED).many()
    ending = Finish(0, "left run 'spring'")
    assert Script(left(tmp_path), monkeypatch, FAILED, missing, ending).many() == ending


class OneModel(Lives):
    """A life that loads a model, which refers to itself as real ones do."""

    def _make(self, identity: Identity) -> Any:
        model = torch.nn.Linear(2, 2)
        model.register_forward_hook(lambda *_: model.weight)
        self.weight = weakref.ref(model.weight)
        return SimpleNamespace(run=lambda: FAILED, model=model)


def test_no_model_stays_in_memory_after_a_life(tmp_path: Path) -> None:
    place = Place("spring", "ann", EdgeConfig(data=DataConfig("reviews.jsonl")), left(tmp_path))
    one = OneModel(place, "kseed 0", Screen(StringIO(), is_terminal=False))
    gc.disable()
    try:
        assert one.one(Limits()) == FAILED
        assert one.weight() is None
    finally:
        gc.enable()
