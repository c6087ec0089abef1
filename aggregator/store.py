"""The store: one sqlite file with every run, every version of its coefficients and every accepted update.

It is the truth: what is acknowledged or published stands in it first, with full sync, and a state is rebuilt from
nothing else. `show` and `list` read while `serve` writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import msgspec

from aggregator import algorithms
from aggregator.accepted import Accepted, AcceptedUpdates, fingerprint
from aggregator.attendance import Seen
from aggregator.database import connect
from aggregator.events import Keep, KeepProgress, KeepUpdate, KeepVersion
from aggregator.records import Records, Verb
from aggregator.reports import RoundReport, Traffic
from aggregator.schedule import Fleet
from aggregator.spec import Spec
from aggregator.state import PastRound, State, new_state, remembered
from shared.errors import PeerError, UserError
from shared.messages import Change, Plan, Update
from shared.wire import decode, encode


class Store(Records):
    """An open store, to read and to write. Not thread-safe.

    Every method raises UnavailableError or UserError, naming the file.
    """

    @classmethod
    def open(cls, path: Path, *, may_create: bool = False, may_write: bool = True) -> Store:
        """Open the file; `may_create` makes it, and its folder, where there is none.

        Raises UserError for a missing, foreign, newer or damaged file, UnavailableError for one that cannot be used.
        """
        if not may_create and not path.exists():
            raise UserError(f"{path}: there is no store here; `kseed-aggregator create` makes one, --store names one.")
        connection = connect(path, may_create=may_create, may_write=may_write)
        return cls(path, connection)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- writing

    def create(self, spec: Spec, now_ms: int) -> None:
        """Add a run with version 0. Raises UserError where the name is taken."""
        state = new_state(spec)
        with self._transaction():
            if self._row("SELECT 1 FROM runs WHERE run = ?", spec.name):
                raise UserError(f"{self.path}: there is a run {spec.name!r} already; choose another name.")
            self._do(
                "INSERT INTO runs VALUES (?, ?, ?, ?)",
                spec.name,
                msgspec.json.encode(spec),
                msgspec.json.encode(state.progress),
                now_ms,
            )
            row = (algorithms.pack(state.algorithm_state), msgspec.json.encode(state.fleet))
            self._do(
                "INSERT INTO versions VALUES (?, 0, ?, ?, NULL, ?, ?, NULL, NULL, NULL)",
                spec.name,
                state.coefficients,
                state.carried,
                *row,
            )

    def commit(
        self, run: str, keeps: Sequence[Keep], now_ms: int, *, traffic: Traffic | None = None, done: Sequence[int] = ()
    ) -> None:
        """Keep everything, durably, or nothing. `traffic` goes with the last version; `done` are commands obeyed."""
        with self._transaction():
            for keep in keeps:
                if isinstance(keep, KeepUpdate):
                    row = (run, keep.round, keep.device, keep.payload, keep.received_at_ms, keep.counted_in)
                    self._do("INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?)", *row)
                elif isinstance(keep, KeepVersion):
                    self._keep_version(run, keep, traffic)
                elif isinstance(keep, KeepProgress):
                    self._do("UPDATE runs SET progress = ? WHERE run = ?", msgspec.json.encode(keep.progress), run)
                else:
                    self._do("INSERT INTO events (run, at_ms, text) VALUES (?, ?, ?)", run, now_ms, keep.text)
            for command in done:
                self._do("UPDATE commands SET done_at_ms = ? WHERE id = ?", now_ms, command)

    def keep_presences(self, run: str, seen: Sequence[Seen]) -> None:
        """Keep who is there, for `show`."""
        with self._transaction():
            for one in seen:
                row = (run, one.device, one.is_online, one.note, one.agent, one.heard_at_ms)
                self._do("INSERT OR REPLACE INTO presences VALUES (?, ?, ?, ?, ?, ?)", *row)

    def command(self, run: str, verb: Verb, reason: str, now_ms: int) -> None:
        """Ask the process that serves the run, now or later, to pause, resume or stop it."""
        self.run(run)
        with self._transaction():
            self._do(
                "INSERT INTO commands (run, verb, reason, given_at_ms) VALUES (?, ?, ?, ?)", run, verb, reason, now_ms
            )

    # --- rebuilding

    def state(self, name: str) -> State:
        """The state of a run exactly as it was when it was last committed."""
        row = self.run(name)
        spec, progress = row.spec, row.progress
        version = self._row(
            "SELECT coefficients, carried, change, algorithm_state, fleet FROM versions WHERE run = ? AND version = ?",
            name,
            progress.round,
        )
        if version is None or {len(version[0]), len(version[1])} != {4 * spec.facts.seeds}:
            raise self._damaged(f"version {progress.round} of run {name!r} is missing or cut")
        try:
            change = None if version[2] is None else msgspec.msgpack.decode(version[2], type=Change)
            algorithm_state = algorithms.unpack(version[3], spec.facts.seeds)
        except (ValueError, msgspec.MsgspecError) as error:
            raise self._damaged(str(error)) from error
        updates, late = self._open_updates(name, progress.round)
        return State(
            spec=spec,
            progress=progress,
            coefficients=bytes(version[0]),
            carried=bytes(version[1]),
            change=change,
            algorithm_state=algorithm_state,
            fleet=self._json(version[4], Fleet),
            updates=updates,
            late=late,
            past=self._past(spec, progress.round),
        )

    # --- what the methods are made of

    def _open_updates(self, run: str, number: int) -> tuple[AcceptedUpdates[str], AcceptedUpdates[tuple[str, int]]]:
        """The updates that the open round counts: its own, and the late ones."""
        updates: AcceptedUpdates[str] = AcceptedUpdates()
        late: AcceptedUpdates[tuple[str, int]] = AcceptedUpdates()
        for device, made_for, payload in self.journal(run, number):
            try:
                update = decode("update", payload)
            except PeerError as error:
                raise self._damaged(f"the update of {device} in round {made_for}: {error}") from error
            assert isinstance(update, Update)
            if made_for == number:
                updates = updates.with_one(device, Accepted(payload, update))
            else:
                late = late.with_one((device, made_for), Accepted(payload, update))
        return updates, late

    def _past(self, spec: Spec, number: int) -> tuple[PastRound, ...]:
        """The rounds before round `number` that its state remembers."""
        past = []
        for closed in range(max(0, number - remembered(spec.config)), number):
            row = self._row("SELECT plan, report FROM versions WHERE run = ? AND version = ?", spec.name, closed + 1)
            if row is None or row[0] is None or row[1] is None:
                raise self._damaged(f"version {closed + 1} of run {spec.name!r} is missing or cut")
            try:
                plan = decode("plan", bytes(row[0]))
            except PeerError as error:
                raise self._damaged(f"the plan of round {closed}: {error}") from error
            assert isinstance(plan, Plan)
            digest = self._json(row[1], RoundReport).model_digest
            rows = self._rows(
                "SELECT device, payload FROM updates WHERE run = ? AND round = ? AND counted_in < ?",
                spec.name,
                closed,
                number,
            )
            accepted = {device: fingerprint(payload) for device, payload in rows}
            past.append(PastRound(plan, bytes.fromhex(digest) if digest is not None else None, accepted))
        return tuple(past)

    def _keep_version(self, run: str, keep: KeepVersion, traffic: Traffic | None) -> None:
        self._do(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            run,
            keep.version,
            keep.coefficients,
            keep.carried,
            msgspec.msgpack.encode(keep.change) if keep.change is not None else None,
            algorithms.pack(keep.algorithm_state),
            msgspec.json.encode(keep.fleet),
            encode(keep.plan),
            msgspec.json.encode(keep.report),
            msgspec.json.encode(traffic) if traffic is not None else None,
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._do("BEGIN IMMEDIATE")
        try:
            yield
            self._do("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.rollback()
            raise
