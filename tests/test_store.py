"""The store: what comes back after a kill, and what each broken file prints."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator.events import Begin, Event, KeepProgress, KeepUpdate, KeepVersion, Note, Pause
from aggregator.lock import RunLock, is_served
from aggregator.reports import Traffic
from aggregator.rounds import step
from aggregator.state import new_state
from aggregator.store import Store
from shared.errors import UnavailableError, UserError
from tests.runs import START_MS, arrival, played, spec_of, update_of

OTHER_MODEL = b"o" * 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "kseed.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path, may_create=True) as opened:
        opened.create(spec_of(), START_MS)
        yield opened


STORY: tuple[Event, ...] = (
    Begin(START_MS),
    arrival("a", update_of()),
    arrival("b", update_of(model_digest=OTHER_MODEL)),
    arrival("c", update_of(samples=3)),
    arrival("a", update_of(1)),
    arrival("b", update_of(1)),
    Pause(START_MS + 9, "lunch"),
)


@pytest.mark.parametrize("settings", [{}, {"algorithm": "fedkseed-pro"}, {"step": "normalised", "quorum": 3}])
def test_the_state_is_rebuilt_exactly_after_every_step(path: Path, settings: dict[str, Any]) -> None:
    spec = spec_of(**settings)
    with Store.open(path, may_create=True) as store:
        store.create(spec, START_MS)
        state = new_state(spec)
        assert store.state("night") == state
        for event in STORY:
            state = played(store, state, event)
            with Store.open(path) as another:
                assert another.state("night") == state


def test_versions_reports_devices_and_notes_are_there_to_read(store: Store) -> None:
    state = played(store, store.state("night"), Begin(START_MS), arrival("a", update_of()), arrival("b", update_of()))
    assert store.coefficients("night", 0) == bytes(1024)
    assert store.coefficients("night", 1) == state.coefficients
    ((report, traffic),) = store.reports("night")
    assert (report.round, report.counted, traffic) == (0, 2, None)
    devices = store.devices("night")
    assert [(d.device, d.updates, d.last_round) for d in devices] == [("a", 1, 0), ("b", 1, 0)]
    played(store, state, Pause(START_MS, "lunch"))
    assert store.notes("night", 9) == [(START_MS, "round 1: paused: lunch")]


def test_traffic_is_kept_with_its_round(store: Store) -> None:
    state, actions = step(store.state("night"), Begin(START_MS))
    for device in "ab":
        state, actions = step(state, arrival(device, update_of()))
    traffic = Traffic(1, 2, 3, None)
    keeps = [a for a in actions if isinstance(a, (KeepVersion, KeepProgress))]
    store.commit("night", keeps, START_MS, traffic=traffic)
    assert [kept for _, kept in store.reports("night")] == [traffic]


def test_a_commit_is_whole_or_nothing(store: Store) -> None:
    before = store.state("night")
    update = arrival("a", update_of())
    keep = KeepUpdate(0, "a", update.payload, START_MS, 0)
    with pytest.raises(UnavailableError, match="UNIQUE"):
        store.commit("night", [keep, Note("one"), keep], START_MS)
    assert store.state("night") == before
    assert store.notes("night", 9) == []
    store.commit("night", [keep], START_MS)  # and the store still works


def test_commands_wait_until_they_are_obeyed(store: Store) -> None:
    store.command("night", "pause", "lunch", START_MS)
    store.command("night", "stop", "", START_MS)
    first, second = store.commands("night")
    assert (first.verb, first.reason, second.verb) == ("pause", "lunch", "stop")
    store.commit("night", [], START_MS, done=[first.id])
    assert store.commands("night") == [second]


def test_every_commit_reaches_the_disk(store: Store) -> None:
    assert store._rows("PRAGMA synchronous") == [(2,)]  # FULL
    assert store._rows("PRAGMA journal_mode") == [("wal",)]


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from aggregator.events import Begin
from aggregator.lock import RunLock
from aggregator.store import Store
from tests.runs import START_MS, arrival, played, spec_of, update_of
path = Path(sys.argv[1])
store = Store.open(path, may_create=True)
lock = RunLock.take(path, "night")
store.create(spec_of(), START_MS)
played(store, store.state("night"), Begin(START_MS), arrival("a", update_of()))
store._do("BEGIN IMMEDIATE")
store._do("DELETE FROM updates")
os.kill(os.getpid(), 9)
"""


def test_a_killed_process_leaves_what_it_committed_and_no_lock(path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    with Store.open(path, may_write=False) as store:
        assert list(store.state("night").updates) == ["a"]
    assert not is_served(path, "night")
    RunLock.take(path, "night").release()


# --- one writer


def test_a_run_is_served_by_one_process_only(store: Store, path: Path) -> None:
    lock = RunLock.take(path, "night", wait_s=0)
    assert is_served(path, "night")
    with pytest.raises(UserError, match="run 'night' is being served by another process; stop that one first"):
        RunLock.take(path, "night", wait_s=0)
    RunLock.take(path, "day", wait_s=0).release()  # another run of the same store
    lock.release()
    assert not is_served(path, "night")


def test_a_run_that_was_never_served_is_not(path: Path) -> None:
    assert not is_served(path, "night")
    assert not list(path.parent.glob("*.lock"))


# --- what is wrong with the file


def test_a_missing_store_is_named_and_not_made(path: Path) -> None:
    with pytest.raises(UserError, match=r"kseed\.sqlite3: there is no store here; `kseed-aggregator create` makes one"):
        Store.open(path)
    assert not path.exists()


def test_an_unknown_run_is_refused_with_those_there_are(store: Store) -> None:
    with pytest.raises(UserError, match="there is no run 'day'; there are: night"):
        store.state("day")
    with pytest.raises(UserError, match="no run 'day'"):
        store.command("day", "stop", "", START_MS)


def test_a_name_is_taken_once(store: Store) -> None:
    with pytest.raises(UserError, match="there is a run 'night' already; choose another name"):
        store.create(spec_of(), START_MS)


def test_an_unknown_version_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match="run 'night' has no version 3; it has 0 to 0"):
        store.coefficients("night", 3)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("Dear diary, " * 500)
    for may_create in (False, True):
        with pytest.raises(UserError, match="no sqlite file"):
            Store.open(path, may_create=may_create)
    assert path.read_text() == "Dear diary, " * 500


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite3"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE songs (name TEXT)")
    other.close()
    before = path.read_bytes()
    for may_create in (False, True):
        with pytest.raises(UserError, match="not a kseed store"):
            Store.open(path, may_create=may_create)
    assert path.read_bytes() == before


def test_an_empty_file_is_refused_unless_a_store_may_be_made(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(UserError, match="not a kseed store"):
        Store.open(path)
    Store.open(path, may_create=True).close()


def test_a_store_of_another_schema_is_refused(store: Store, path: Path) -> None:
    store._do("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="the store has schema 9, this kseed reads 4; use the kseed that wrote it"):
        Store.open(path)


def test_a_damaged_file_is_refused(path: Path) -> None:
    with Store.open(path, may_create=True) as store:
        store.create(spec_of(), START_MS)
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"), Store.open(path) as damaged:
        damaged.state("night")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE runs SET spec = 'x'", "damaged: a Spec does not read"),
        ("UPDATE runs SET progress = '[]'", "damaged: a Progress does not read"),
        ("DELETE FROM versions", "damaged: version 0 of run 'night' is missing or cut"),
        ("UPDATE versions SET coefficients = x'00'", "damaged: version 0 of run 'night' is missing or cut"),
        ("UPDATE versions SET algorithm_state = x'00'", "damaged: 1 bytes of algorithm state"),
        ("INSERT INTO updates VALUES ('night', 0, 'a', x'00', 1, 0)", "damaged: the update of a in round 0"),
    ],
)
def test_damaged_rows_are_refused(store: Store, statement: str, message: str) -> None:
    store._do(statement)
    with pytest.raises(UserError, match=message):
        store.state("night")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=r"kseed\.sqlite3: .*(File exists|Not a directory)"):
        Store.open(tmp_path / "file" / "kseed.sqlite3", may_create=True)


def test_a_store_that_may_only_be_read_is_not_written(store: Store, path: Path) -> None:
    with Store.open(path, may_write=False) as reader:
        assert [row.spec.name for row in reader.runs()] == ["night"]
        with pytest.raises(UnavailableError, match="cannot be written or opened"):
            reader.command("night", "stop", "", START_MS)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_named(store: Store, path: Path) -> None:
    path.chmod(0o400)
    with pytest.raises(UnavailableError, match="cannot be written"), Store.open(path) as opened:
        opened.command("night", "stop", "", START_MS)


def test_a_full_disk_keeps_what_was_there(store: Store) -> None:
    pages = store._rows("PRAGMA page_count")[0][0]
    store._do(f"PRAGMA max_page_count = {pages}")  # sqlite's own way to be full
    with pytest.raises(UnavailableError, match="the disk is full"):
        store.commit("night", [Note("x" * 100_000)], START_MS)
    assert store.state("night") == new_state(spec_of())
    store._do("PRAGMA max_page_count = 1000000")
    store.commit("night", [Note("x" * 100_000)], START_MS)
