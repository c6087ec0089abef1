"""What the store holds, row by row, for those who read it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from aggregator.attendance import Seen
from aggregator.database import clear_errors
from aggregator.reports import RoundReport, Traffic
from aggregator.schedule import Fleet
from aggregator.spec import Spec
from aggregator.state import Progress
from shared.errors import UserError

Verb = Literal["pause", "resume", "stop"]


@dataclass(frozen=True)
class Command:
    """What the operator asked of a run, from another process."""

    id: int
    verb: Verb
    reason: str


@dataclass(frozen=True)
class RunRow:
    """A run at a glance."""

    spec: Spec
    progress: Progress
    created_at_ms: int


@dataclass(frozen=True)
class DeviceRow:
    """What a device has contributed."""

    device: str
    updates: int
    last_round: int
    last_received_at_ms: int
    update_bytes: int


@dataclass(frozen=True)
class VersionRow:
    """A version as it is stored, and how the round before closed into it."""

    version: int
    coefficients: bytes
    carried: bytes
    change: bytes | None  # msgpack; None: there was none, or it was no shorter than a snapshot
    algorithm_state: bytes
    fleet: Fleet
    plan: bytes | None  # encoded; None: version 0
    report: RoundReport | None


class Records:
    """An open store, to read. Not thread-safe. Every method raises UnavailableError or UserError, naming the file."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    def runs(self) -> list[RunRow]:
        """Every run, by name."""
        rows = self._rows("SELECT spec, progress, created_at_ms FROM runs ORDER BY run")
        return [self._run_row(row) for row in rows]

    def run(self, name: str) -> RunRow:
        """One run. Raises UserError, naming those there are, for an unknown one."""
        row = self._row("SELECT spec, progress, created_at_ms FROM runs WHERE run = ?", name)
        if row is None:
            known = ", ".join(one for (one,) in self._rows("SELECT run FROM runs ORDER BY run LIMIT 20")) or "none"
            raise UserError(f"{self.path}: there is no run {name!r}; there are: {known}.")
        return self._run_row(row)

    def coefficients(self, run: str, version: int) -> bytes:
        """K little-endian float32. Raises UserError for a version that is not there."""
        row = self._row("SELECT coefficients FROM versions WHERE run = ? AND version = ?", run, version)
        if row is None:
            latest = self.run(run).progress.round
            raise UserError(f"{self.path}: run {run!r} has no version {version}; it has 0 to {latest}.")
        return bytes(row[0])

    def reports(self, run: str) -> list[tuple[RoundReport, Traffic | None]]:
        """Every closed round, first to last."""
        rows = self._rows(
            "SELECT report, traffic FROM versions WHERE run = ? AND report IS NOT NULL ORDER BY version", run
        )
        return [
            (self._json(report, RoundReport), self._json(traffic, Traffic) if traffic is not None else None)
            for report, traffic in rows
        ]

    def devices(self, run: str) -> list[DeviceRow]:
        """What each device has contributed, by id."""
        rows = self._rows(
            "SELECT device, COUNT(*), MAX(round), MAX(received_at_ms), SUM(LENGTH(payload)) "
            "FROM updates WHERE run = ? GROUP BY device ORDER BY device",
            run,
        )
        return [DeviceRow(*row) for row in rows]

    def presences(self, run: str) -> dict[str, Seen]:
        """The last presence of each device that ever was there."""
        rows = self._rows("SELECT device, online, note, agent, heard_at_ms FROM presences WHERE run = ?", run)
        return {row[0]: Seen(row[0], bool(row[1]), *row[2:]) for row in rows}

    def commands(self, run: str) -> list[Command]:
        """What the operator asked for and nobody has obeyed yet, in order."""
        rows = self._rows("SELECT id, verb, reason FROM commands WHERE run = ? AND done_at_ms IS NULL ORDER BY id", run)
        return [Command(*row) for row in rows]

    def notes(self, run: str, last: int) -> list[tuple[int, str]]:
        """The last notes of a run: (unix milliseconds, text), oldest first."""
        rows = self._rows("SELECT at_ms, text FROM events WHERE run = ? ORDER BY id DESC LIMIT ?", run, last)
        return [(at_ms, text) for at_ms, text in reversed(rows)]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """What is read inside is one state of the store, whatever another process writes meanwhile."""
        self._do("BEGIN")
        try:
            yield
        finally:
            if self._connection.in_transaction:
                self._connection.rollback()

    def check(self) -> None:
        """Read every page of the file and compare it with the indexes. Raises UserError for a damaged one."""
        (found,) = self._row("PRAGMA integrity_check(1)") or ("nothing",)
        if found != "ok":
            raise self._damaged(found)

    def folds(self, run: str) -> Iterator[VersionRow]:
        """Every version as it is stored, first to last, one at a time."""
        number = -1
        while True:
            row = self._row(
                "SELECT version, coefficients, carried, change, algorithm_state, fleet, plan, report FROM versions "
                "WHERE run = ? AND version > ? ORDER BY version LIMIT 1",
                run,
                number,
            )
            if row is None:
                return
            number = row[0]
            report = self._json(row[7], RoundReport) if row[7] is not None else None
            yield VersionRow(number, row[1], row[2], row[3], row[4], self._json(row[5], Fleet), row[6], report)

    def journal(self, run: str, counted_in: int) -> Iterator[tuple[str, int, bytes]]:
        """The accepted updates that a round counts, one at a time: (device, the round it was made for, payload).

        In the order of devices, and of rounds for one device.
        """
        with clear_errors(self.path):
            cursor = self._connection.execute(
                "SELECT device, round, payload FROM updates WHERE run = ? AND counted_in = ? ORDER BY device, round",
                (run, counted_in),
            )
        while True:
            with clear_errors(self.path):
                row = cursor.fetchone()
            if row is None:
                return
            yield row[0], row[1], bytes(row[2])

    # --- what the methods are made of

    def _run_row(self, row: tuple[Any, ...]) -> RunRow:
        return RunRow(self._json(row[0], Spec), self._json(row[1], Progress), row[2])

    def _json(self, data: bytes, kind: type[Any]) -> Any:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise self._damaged(f"a {kind.__name__} does not read: {error}") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: the store is damaged: {what}. Restore it from a copy.")

    def _do(self, statement: str, *values: object) -> None:
        with clear_errors(self.path):
            self._connection.execute(statement, values)

    def _rows(self, statement: str, *values: object) -> list[Any]:
        with clear_errors(self.path):
            return self._connection.execute(statement, values).fetchall()

    def _row(self, statement: str, *values: object) -> Any | None:
        with clear_errors(self.path):
            return self._connection.execute(statement, values).fetchone()
