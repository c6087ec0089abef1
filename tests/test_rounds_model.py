"""The round logic under random interleavings, against `naive_rounds`: a hypothesis state machine.

Every state is committed to a real store; now and then the aggregator dies, before or after its commit, and goes on
from what the store has. Over-selection, which goes by presence, is left to `test_policies`.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import second_changes
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive_rounds import CODES, NaiveRun
from round_events import (
    DEVICES,
    configurations,
    fields,
    frozen,
    good,
    groups,
    leasts,
    rounds_of_updates,
    selections,
    steps_and_kinds,
)
from runs import BASE, START_MS
from second_maths import draw

from aggregator import rounds, verification
from aggregator.config import RunConfig
from aggregator.events import (
    BadUplink,
    Begin,
    KeepProgress,
    KeepUpdate,
    KeepVersion,
    Note,
    Pause,
    Publish,
    Resume,
    SendReceipt,
    Stop,
    Tick,
    UpdateArrived,
)
from aggregator.spec import new_spec
from aggregator.state import plan_of
from aggregator.store import Store
from shared.errors import UserError
from shared.messages import Change, Plan, Snapshot, Update
from shared.refusals import Refusal
from shared.wire import encode
from tools.vectors_wire import plain

KEY = bytes(range(32))
FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a sync costs nothing
passing_ms = st.sampled_from([0, 1, 900, 30_000, 61_000])


class Rounds(RuleBasedStateMachine):
    """One run. `model` is the naive one, `state` and `store` are the aggregator's."""

    @initialize(config=configurations, group=groups, kinds=steps_and_kinds, least=leasts, who=selections)
    def create(self, config, group, kinds, least, who):
        config = {**config, **group, **kinds, **least, **who}
        self.folder = tempfile.TemporaryDirectory(dir=FAST)
        self.path = Path(self.folder.name) / "store.sqlite"
        self.store = Store.open(self.path, may_create=True)
        run = RunConfig(**config)
        self.spec = new_spec("night", BASE, run, pool_key=7, nonce_key=KEY)
        self.store.create(self.spec, START_MS)
        self.state = self.store.state("night")
        self.model = NaiveRun(msgspec.structs.asdict(run), KEY)
        self.now_ms = START_MS
        self.sent: list[dict] = []
        self.follower = bytes(1024)  # the coefficients of a device
        self.plan = None  # the latest that it heard
        self.turn([(Begin(START_MS), self.model.begin)])

    # --- what the aggregator's loop does with events: decide, commit, send

    def turn(self, happenings):
        """Decide every (event, the model's answer) and commit them together, as `aggregator.service` does."""
        actions = []
        for event, expect in happenings:
            before = frozen(self.state)
            self.state, more = rounds.step(self.state, event)
            now = () if isinstance(event, BadUplink) else (self.now_ms,)
            receipts = [(a.device, a.receipt.round, a.receipt.code) for a in more if isinstance(a, SendReceipt)]
            assert receipts == expect(*now)
            if isinstance(event, UpdateArrived) and receipts[0][2] != CODES["ACCEPTED"]:
                assert frozen(self.state) == before
                assert all(isinstance(action, SendReceipt) for action in more)
            self.check_order(more)
            actions += more
        self.commit(actions)
        for action in actions:
            if isinstance(action, Publish):
                self.hear(action.message)
            elif isinstance(action, SendReceipt):
                encode(action.receipt)

    def commit(self, actions):
        keeps = [a for a in actions if isinstance(a, (KeepUpdate, KeepVersion, KeepProgress, Note))]
        if keeps:
            self.store.commit("night", keeps, self.now_ms)

    def check_order(self, actions):
        """A version is published as snapshot and plan; and only together with what keeps it."""
        names = [type(action.message).__name__ for action in actions if isinstance(action, Publish)]
        assert names in ([], ["Plan"], ["Run", "Snapshot", "Plan"], ["Snapshot", "Plan"])
        is_new = "Snapshot" in names and "Run" not in names
        assert is_new == any(isinstance(action, KeepVersion) for action in actions)
        if names == ["Plan"]:
            assert any(isinstance(action, KeepProgress) for action in actions)

    def hear(self, message):
        """What a device makes of a publication: a change and a snapshot lead to the same bits."""
        encode(message)
        if isinstance(message, Snapshot):
            self.before, self.follower, self.heard = self.follower, message.coefficients, message.version
        if not isinstance(message, Plan):
            return
        last, self.plan = self.plan, message
        assert message.round == self.heard
        if last is None or message.round != last.round + 1 or message.change is None:
            return
        known = None
        if last.common_seeds:
            known = sorted(set(draw(last.nonce, None, last.local_steps, 256, last.levels)[1]))
        change = second_changes.read(msgspec.structs.asdict(message.change), self.spec.facts.change_format, 256, known)
        moved = second_changes.added(struct.unpack("<256f", self.before), *change)
        assert struct.pack("<256f", *moved) == self.follower

    # --- what happens

    def arrival(self, update):
        """The event of an update's arrival. What the wire would refuse comes as well: `step` must not rely on it."""
        message = Update(
            update["round"],
            update["samples"],
            update["train_loss"],
            update["held_out_loss"],
            update["held_out_accuracy"],
            update["digest"],
            update["scalars"],
            None if update["change"] is None else Change(**update["change"]),
        )
        return UpdateArrived(update["device"], message, update["payload"], self.now_ms)

    def made(self, fields, offset=0, extra=b""):
        form, config = self.spec.facts.scalar_format, self.spec.config
        steps = config.local_steps if fields.get("is_good") else 9
        update = {**fields, "round": max(0, self.model.round + offset), "change": None}
        update["scalars"] = b"".join(second_changes.write(x, form) for x in fields["numbers"][:steps]) + extra
        if fields["moves"] and not extra and (config.first_order == "accept" or not fields.get("is_good")):
            seeds, exponent, values = fields["moves"]
            named = None if seeds is None else struct.pack(f"<{len(seeds)}H", *seeds)
            data = b"".join(second_changes.write(x, form) for x in values)
            update |= {"scalars": b"", "change": {"seeds": named, "exponent": exponent, "values": data}}
        try:
            update["payload"] = encode(self.arrival({**update, "payload": b""}).update)
        except UserError:
            update["payload"] = hashlib.sha256(repr(update).encode()).digest()
        self.sent.append(update)
        return update

    def send(self, *updates):
        """They arrive together."""
        self.turn([(self.arrival(one), lambda now, one=one: self.model.arrive(one, now)) for one in updates])

    @rule(fields=good)
    def update(self, fields):
        self.send(self.made(fields))

    @rule(many=rounds_of_updates, late=st.lists(st.tuples(good, st.integers(1, 4)), max_size=3), is_lossy=st.booleans())
    def whole_round(self, many, late, is_lossy):
        """From wherever the run stands past the deadline, mostly with enough updates; then receipts may get lost."""
        self.turn([(Resume(self.now_ms), self.model.resume)])
        for one, rounds_late in late:
            self.late_update(one, rounds_late)
        for one in many:
            self.update(one)
        self.now_ms = max(self.now_ms, self.model.deadline_at)
        self.turn([(Tick(self.now_ms), self.model.tick)])
        for update in self.recent() if is_lossy else ():
            self.send(update)

    def recent(self):
        """What was accepted lately, newest first."""
        rows = {(number, device, payload) for number, device, payload, _ in self.model.journal[-6:]}
        return [one for one in reversed(self.sent) if (one["round"], one["device"], one["payload"]) in rows]

    @rule(fields=good, rounds_late=st.integers(1, 4))
    def late_update(self, fields, rounds_late):
        self.send(self.made(fields, -rounds_late))

    @rule(
        fields=fields,
        offset=st.sampled_from([0, 0, -1, 1, 7]),
        extra=st.sampled_from([b"", b"\0", b"\0\0\xc0\x7f" * 4]),
    )
    def odd_update(self, fields, offset, extra):
        self.send(self.made(fields, offset, extra))

    @rule(bad=st.sampled_from([b"", b"\0\0\xc0\x7f", b"\0\x7c\0\x7c", bytes(16), b"\0\0\xc0\x7f" * 4]), fields=good)
    def update_with_these_scalars(self, bad, fields):
        self.send(self.made({**fields, "numbers": []}, 0, bad))

    @precondition(lambda self: self.sent)
    @rule(pick=st.integers(0, 1 << 30))
    def sent_again(self, pick):
        """Mostly what has been accepted, in this round or the one before."""
        choice = self.recent() + self.sent[-4:]
        self.send(choice[pick % len(choice)])

    @rule(many=st.lists(good, min_size=2, max_size=4), is_stored=st.booleans())
    def updates_that_wait_together(self, many, is_stored):
        """One transaction. If it fails, nothing has happened, and they come again: in another order, not all."""
        updates = [self.made(fields) for fields in many]
        if not is_stored:
            before, state = frozen(self.state), self.state
            for update in updates:
                state, _ = rounds.step(state, self.arrival(update))
            assert frozen(self.state) == before
            updates = updates[:0:-1]
        self.send(*updates)

    @rule(
        refusal=st.sampled_from([Refusal.MALFORMED, Refusal.OVERSIZED, Refusal.RETAINED]),
        device=st.sampled_from(DEVICES),
    )
    def bad_uplink(self, refusal, device):
        before = self.state
        self.turn([(BadUplink(device, refusal, "x" * 600), lambda: [(device, self.model.round, int(refusal))])])
        assert self.state is before

    @rule(ms=passing_ms)
    def time_passes(self, ms):
        self.now_ms += ms
        self.turn([(Tick(self.now_ms), self.model.tick)])

    @rule(ms=st.sampled_from([0, 1000, 100_000, -1000, -100_000]))
    def broker_is_back(self, ms):
        self.now_ms += ms
        self.turn([(Begin(self.now_ms), self.model.begin)])

    @rule(verb=st.sampled_from(["resume", "pause"]), reason=st.sampled_from(["", "enough"]))
    def operator(self, verb, reason):
        if verb == "pause":
            self.turn([(Pause(self.now_ms, reason), lambda now: self.model.pause(now, reason))])
        else:
            self.turn([(Resume(self.now_ms), self.model.resume)])

    @precondition(lambda self: self.model.round >= 2)
    @rule(many=rounds_of_updates, reason=st.sampled_from(["", "enough"]), is_meant=st.integers(0, 3))
    def stop(self, many, reason, is_meant):
        """For good, so not too often."""
        for one in many[:2] if not is_meant else ():
            self.update(one)
        if not is_meant:
            self.turn([(Stop(self.now_ms, reason), lambda now: self.model.stop(now, reason))])

    @rule(fields=good, is_late=st.booleans())
    def kill(self, fields, is_late):
        """The process dies, perhaps with an update that is decided and not yet committed; the next one goes on."""
        if is_late:
            rounds.step(self.state, self.arrival(self.made(fields)))
        self.store.close()
        self.store = Store.open(self.path)
        restored = self.store.state("night")
        assert frozen(restored) == frozen(self.state)
        assert restored == self.state
        self.state = restored
        self.turn([(Begin(self.now_ms), self.model.begin)])

    # --- what always holds

    @invariant()
    def the_state_is_the_fold_of_the_accepted_updates(self):
        if not hasattr(self, "model"):
            return
        state, model, progress = self.state, self.model, self.state.progress
        assert state.coefficients == model.coefficient_bytes() == self.follower
        assert (progress.round, progress.phase, progress.reason) == (model.round, model.phase, model.reason)
        assert (progress.opened_at_ms, progress.extensions) == (model.opened_at, model.extensions)
        assert (progress.published_at_ms, progress.deadline_at_ms) == (model.published_at, model.deadline_at)
        assert {one.device: one.round for one in progress.excluded} == model.excluded
        for ours, theirs in ((state.updates, model.accepted), (state.late, model.late)):
            assert {name: ours[name].payload for name in ours} == {name: theirs[name]["payload"] for name in theirs}
        for past, one in zip(state.past, model.past, strict=True):
            assert (past.plan.round, past.model_digest) == (one["round"], one["digest"])
            assert set(past.accepted) == set(one["accepted"])
        assert plain(plan_of(state)) == model.plan()

    def teardown(self):
        if not hasattr(self, "model"):
            return
        found = verification.verify(self.store, "night")
        assert (found.difference, found.updates) == (None, sum(row[3] < self.model.round for row in self.model.journal))
        self.store.close()
        with sqlite3.connect(self.path) as connection:
            rows = connection.execute("SELECT round, device, payload, counted_in FROM updates").fetchall()
            versions = dict(connection.execute("SELECT version, coefficients FROM versions"))
        assert sorted(rows) == sorted(self.model.journal)
        assert len({(number, device) for number, device, *_ in rows}) == len(rows)
        assert sorted(versions) == list(range(self.model.round + 1))
        assert versions[self.model.round] == self.model.coefficient_bytes()
        connection.close()
        self.folder.cleanup()


TestRounds = Rounds.TestCase
TestRounds.settings = settings(
    max_examples=80, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
