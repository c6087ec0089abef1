"""The store's sqlite file: schema, opening, and what each of sqlite's errors means for people."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import UnavailableError, UserError

SCHEMA_VERSION = 4
APPLICATION_ID = 0x6B73_6564  # "ksed"
BUSY_TIMEOUT_S = 5.0

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, spec BLOB NOT NULL, progress BLOB NOT NULL, created_at_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (
    run TEXT NOT NULL REFERENCES runs, version INTEGER NOT NULL, coefficients BLOB NOT NULL,
    carried BLOB NOT NULL, change BLOB, algorithm_state BLOB NOT NULL, fleet BLOB NOT NULL, plan BLOB, report BLOB,
    traffic BLOB,
    PRIMARY KEY (run, version)
);
CREATE TABLE IF NOT EXISTS updates (
    run TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL, device TEXT NOT NULL,
    payload BLOB NOT NULL, received_at_ms INTEGER NOT NULL, counted_in INTEGER NOT NULL,
    PRIMARY KEY (run, round, device)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS updates_by_use ON updates (run, counted_in, device, round);
CREATE TABLE IF NOT EXISTS presences (
    run TEXT NOT NULL REFERENCES runs, device TEXT NOT NULL, online INTEGER NOT NULL, note TEXT NOT NULL,
    agent TEXT NOT NULL, heard_at_ms INTEGER NOT NULL, PRIMARY KEY (run, device)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS commands (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES runs, verb TEXT NOT NULL, reason TEXT NOT NULL,
    given_at_ms INTEGER NOT NULL, done_at_ms INTEGER
);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES runs, at_ms INTEGER NOT NULL, text TEXT NOT NULL
);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


def connect(path: Path, *, may_create: bool, may_write: bool) -> sqlite3.Connection:
    """A connection to the store's file, checked, in write-ahead mode with full sync, transactions by hand.

    Raises UserError for a foreign, newer or damaged file, UnavailableError for one that cannot be used now.
    """
    with clear_errors(path):
        if may_create:
            path.parent.mkdir(parents=True, exist_ok=True)
        mode = ("rwc" if may_create else "rw") if may_write else "ro"
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
        )
        try:
            _prepare(path, connection, may_create)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(path: Path, connection: sqlite3.Connection, may_create: bool) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if may_create and tables == 0 and application == 0:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
        version, application = SCHEMA_VERSION, APPLICATION_ID
    if application != APPLICATION_ID:
        raise UserError(f"{path}: this sqlite file is not a kseed store; choose another one with --store.")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: the store has schema {version}, this kseed reads {SCHEMA_VERSION}; "
            "use the kseed that wrote it, or another file with --store."
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """sqlite's errors, and the system's, in our words. sqlite gives texts only on Python 3.10."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if "not a database" in text or "malformed" in text or "no such table" in text or "decode" in text:
            raise UserError(
                f"{path}: the store is damaged or no sqlite file ({text}). Restore it from a copy."
            ) from error
        if "readonly" in text or "unable to open" in text:
            raise UnavailableError(
                f"{path}: the store cannot be written or opened ({text}). Check its rights."
            ) from error
        if "full" in text:
            raise UnavailableError(f"{path}: the disk is full ({text}). Make room.") from error
        if "locked" in text or "busy" in text:
            raise UnavailableError(f"{path}: another process holds the store ({text}). Try again.") from error
        raise UnavailableError(f"{path}: the store does not work ({text}). Check the disk.") from error
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}. Check the path and its rights.") from error
