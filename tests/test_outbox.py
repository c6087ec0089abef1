"""The outbox's file: read by the next process, set aside where it is damaged, written later where the disk was full."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from edge_client.events import Kept
from edge_client.outbox import RETRY_S
from edge_client.state_files import MAX_FILE_BYTES, default_folder
from shared.messages import Update
from shared.wire import decode, encode
from tests.driven_session import NEXT, UPDATE
from tests.outboxes import KEPT, OWNER, DiskThatIsFullFor, FullDisk, file_in, outbox_in


def test_what_is_kept_is_read_by_the_next_process_until_it_is_forgotten(tmp_path):
    outbox, lines = outbox_in(tmp_path)
    assert outbox.read() is None
    outbox.keep(KEPT)
    again, _ = outbox_in(tmp_path)
    assert again.read() == KEPT
    again.keep(Kept(NEXT.nonce, UPDATE))
    assert outbox.read() == Kept(NEXT.nonce, UPDATE)
    outbox.forget()
    outbox.forget()
    assert again.read() is None
    assert lines == []
    if sys.platform != "win32":
        outbox.keep(KEPT)
        assert file_in(tmp_path).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", [replace(OWNER, broker="b"), replace(OWNER, run="x"), replace(OWNER, device="bob")])
def test_another_broker_run_or_device_has_an_outbox_of_its_own(tmp_path, other):
    outbox_in(tmp_path)[0].keep(KEPT)
    stranger, lines = outbox_in(tmp_path, owner=other)
    assert stranger.read() is None
    file_in(tmp_path).parent.rename(tmp_path / other.folder_name)
    assert stranger.read() is None
    assert "; set aside as update.set-aside" in lines[0]


def test_a_file_cut_or_changed_anywhere_is_set_aside_in_a_line(tmp_path):
    outbox, lines = outbox_in(tmp_path)
    outbox.keep(KEPT)
    whole = file_in(tmp_path).read_bytes()
    damaged = [whole[:size] for size in range(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    listed = b"[1]\n" + hashlib.sha256(b"[1]\n").hexdigest().encode() + b"\n"
    for data in (*damaged, whole + b"x", b"\x00" * 99, b"[1, 2]\n", listed):
        lines.clear()
        file_in(tmp_path).write_bytes(data)
        assert outbox.read() is None
        (line,) = lines
        assert line.startswith(f"warning: ignored the outbox {file_in(tmp_path)}: it")
        assert file_in(tmp_path).with_name("update.set-aside").read_bytes() == data
    file_in(tmp_path).write_bytes(whole)
    assert outbox.read() == KEPT


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    outbox, lines = outbox_in(tmp_path)
    outbox.keep(KEPT)
    with file_in(tmp_path).open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert outbox.read() is None
    assert f"it has {MAX_FILE_BYTES + 1} bytes; set aside" in lines[0]


def test_a_folder_in_the_files_place_stops_nothing(tmp_path):
    outbox, lines = outbox_in(tmp_path)
    (file_in(tmp_path) / "deep").mkdir(parents=True)
    assert outbox.read() is None
    outbox.keep(KEPT)
    outbox.forget()
    assert [line.split(str(tmp_path))[0] for line in lines] == [
        "warning: the outbox ",
        "warning: the update of round 3 cannot be written to ",
        "warning: the outbox ",
    ]


def test_on_a_full_disk_the_file_before_stays_whole_and_the_agent_says_what_it_does(tmp_path):
    outbox_in(tmp_path)[0].keep(KEPT)
    outbox, lines = outbox_in(tmp_path, FullDisk())
    outbox.keep(Kept(NEXT.nonce, UPDATE))
    assert lines == [
        f"warning: the update of round 3 cannot be written to {file_in(tmp_path)}: No space left on device. "
        "It is sent from memory, and lost if this agent ends before its receipt."
    ]
    assert outbox.read() == KEPT


def test_what_the_disk_refused_is_written_once_it_has_room_again(tmp_path):
    outbox, lines = outbox_in(tmp_path, DiskThatIsFullFor(2))
    outbox.keep(KEPT)
    outbox.retry(0.0)  # still full
    outbox.retry(RETRY_S - 0.1)  # not yet again
    assert outbox.read() is None
    outbox.retry(RETRY_S)
    assert outbox.read() == KEPT
    assert lines[1:] == [f"the update of round 3 is written to {file_in(tmp_path)} now"]


def test_what_is_settled_is_not_written_later(tmp_path):
    outbox, _ = outbox_in(tmp_path, DiskThatIsFullFor(1))
    outbox.keep(KEPT)
    outbox.forget()
    outbox.retry(RETRY_S)
    assert outbox.read() is None


def test_each_platform_has_its_own_place(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    assert default_folder({}, "linux") == Path("/home/ann/.local/state/kseed")
    assert default_folder({"XDG_STATE_HOME": "/var/ann"}, "linux") == Path("/var/ann/kseed")
    assert default_folder({}, "darwin") == Path("/home/ann/Library/Application Support/kseed")
    assert default_folder({"LOCALAPPDATA": "/local"}, "win32") == Path("/local/kseed")


def test_a_user_without_a_home_keeps_it_beside_the_work(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert default_folder({}, "linux") == Path(".kseed")


def test_bytes_are_the_same_after_the_way_over_the_disk(tmp_path):
    update: Update = msgspec.structs.replace(UPDATE, held_out_loss=0.1, held_out_accuracy=1 / 3, train_loss=1e-300)
    outbox, _ = outbox_in(tmp_path)
    outbox.keep(replace(KEPT, update=update))
    read = outbox.read()
    assert read is not None
    assert encode(read.update) == encode(update)
    assert decode("update", encode(update)) == update
