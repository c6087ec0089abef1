"""The board between agent and owner: the lock, the wish and the status, as files."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from edge_client.board import LOCK, STATUS, WISH, Board, Life
from edge_client.policy import Wish
from edge_client.state_files import Disk
from shared.errors import UnavailableError, UserError

ROOT = Path(__file__).parent.parent
HOLD = """
import pathlib, sys
from edge_client.board import Life
life = Life(pathlib.Path(sys.argv[1]))
print("held", flush=True)
input()
"""


class FullDisk(Disk):
    def write(self, file: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")


def test_an_agent_is_alive_while_its_process_holds_the_lock_and_not_after_a_kill(tmp_path: Path) -> None:
    board = Board(tmp_path / "agent")
    assert not board.is_alive()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(board.folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert board.is_alive()
    holder.kill()
    holder.communicate()
    assert not board.is_alive()


def test_a_second_agent_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    life = Life(tmp_path)
    with pytest.raises(UserError, match="an agent of this device and run is at work here already") as refused:
        Life(tmp_path, wait_s=0.0)
    assert not isinstance(refused.value, UnavailableError)
    life.end()
    Life(tmp_path, wait_s=0.0).end()


def test_asking_who_lives_does_not_take_the_place(tmp_path: Path) -> None:
    board = Board(tmp_path)
    Life(tmp_path).end()
    assert not board.is_alive()
    Life(tmp_path, wait_s=0.0).end()


def test_two_who_ask_at_once_do_not_take_each_other_for_the_agent(tmp_path: Path) -> None:
    Life(tmp_path).end()
    with closing(sqlite3.connect(tmp_path / LOCK, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT 1 FROM sqlite_master")  # as `is_alive` of another process, in the midst of it
        assert not Board(tmp_path).is_alive()


def test_a_folder_that_cannot_be_locked_is_told_from_one_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot be opened"):
        Life(tmp_path / "file" / "agent")


@pytest.mark.parametrize("wish", [Wish("pause", 10.0), Wish("pause", 10.0, 20.0), Wish("finish", 10.0)])
def test_a_wish_is_read_as_it_was_left_and_goes_when_taken_back(tmp_path: Path, wish: Wish) -> None:
    board = Board(tmp_path / "agent")
    assert board.wish() is None
    board.want(wish)
    assert board.wish() == wish
    assert board.is_finish_asked() is (wish.kind == "finish")
    board.want(None)
    assert board.wish() is None
    board.want(None)


@pytest.mark.parametrize("data", [b"", b"{", b'{"kind":"dance","asked_at_s":1}', b"\xff"])
def test_a_wish_that_cannot_be_read_is_a_pause(tmp_path: Path, data: bytes) -> None:
    (tmp_path / WISH).write_bytes(data)
    wish = Board(tmp_path).wish()
    assert wish is not None and wish.kind == "pause" and wish.until_s is None


def test_a_full_disk_refuses_the_wish_and_leaves_the_old_one(tmp_path: Path) -> None:
    Board(tmp_path).want(Wish("pause", 1.0))
    with pytest.raises(UnavailableError, match="No space left on device"):
        Board(tmp_path, FullDisk()).want(Wish("finish", 2.0))
    assert Board(tmp_path).wish() == Wish("pause", 1.0)


def test_the_status_is_whole_while_it_is_replaced(tmp_path: Path) -> None:
    class Torn(Disk):
        def replace(self, source: Path, target: Path) -> None:
            raise KeyboardInterrupt

    Board(tmp_path).post(b"old")
    with pytest.raises(KeyboardInterrupt):
        Board(tmp_path, Torn()).post(b"new")
    assert Board(tmp_path).status() == (tmp_path / STATUS).read_bytes() == b"old"
