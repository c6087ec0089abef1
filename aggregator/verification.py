"""Folding the journal once more, from version 0, to see that every stored version is what its updates make.

This is evidence about `closing`, `replay` and `algorithms`, so it shares no arithmetic with them: plain Python
numbers, one device after the other, one step after the other, as PROTOCOL.md section 9.9 says it, on the definitions
of `shared`. Of the stored versions it takes nothing but what it compares with. Slow, and of bounded memory: one update
and some numbers per device at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from aggregator import schedule
from aggregator.records import VersionRow
from aggregator.schedule import Fleet, Magnitude
from aggregator.spec import Spec, nonce
from aggregator.store import Store
from aggregator.verified_change import Version, published
from aggregator.verified_sums import Kind, Known
from shared.changes import NOTHING, read_change
from shared.errors import PeerError
from shared.messages import Change, Plan, StepRule, Update
from shared.seeds import draw, significance_levels
from shared.steprule import deltas
from shared.wire import decode, scalars_from_bytes

SCALAR_CLIP = 1000.0  # FedKSeed-Pro, as the authors' code


class Verification(msgspec.Struct, frozen=True):
    """What the fold found. `difference` is the first, and the end of the comparison; None: there is none."""

    run: str
    versions: int  # stored
    compared: int  # equal to the fold
    rounds: int  # folded
    updates: int  # read from the journal
    counted: int
    late: int  # of the counted ones
    steps: int
    latest: int  # the latest version that was compared
    sha256: str  # of its coefficients by the fold
    difference: str | None


class Terms(NamedTuple):
    """What a round's plan says about its scalars."""

    rule: StepRule
    levels: bytes | None


@dataclass
class Fold:
    """The state of a run by its updates alone."""

    spec: Spec
    coefficients: list[float]  # K, each a float32
    carried: list[float]  # K, likewise
    fleet: Fleet
    sums: list[float]  # FedKSeed-Pro: per seed, of |scalar|
    counts: list[int]  # FedKSeed-Pro: observations per seed
    change: Change | None = None  # from the version before
    known: Known = field(default_factory=Known)
    digests: dict[int, bytes | None] = field(default_factory=dict)  # of the fleet's model, per round
    terms: dict[int, Terms] = field(default_factory=dict)  # per round
    excluded: set[str] = field(default_factory=set)
    updates: int = 0
    counted: int = 0
    late: int = 0
    steps: int = 0

    @classmethod
    def start(cls, spec: Spec) -> Fold:
        """Version 0."""
        seeds = spec.facts.seeds
        return cls(spec, [0.0] * seeds, [0.0] * seeds, schedule.start(spec.config), [0.0] * seeds, [1] * seeds)

    def close(self, number: int, store: Store) -> None:
        """Round `number`: vote, sum, add."""
        self.terms[number] = Terms(schedule.step_rule(self.spec.config, self.fleet), self._levels())
        self.change = NOTHING
        right, losses = self._vote(number, store)
        self.digests[number] = right
        if right is None:
            return
        forward, first_order = self._kinds(number, right, store)
        sums, counts, magnitudes, steps, late = list(self.sums), list(self.counts), [], 0, 0
        for device, made_for, update in self._counted(number, right, store):
            change: dict[int, float] = {}
            for seed, delta, scalar in self._steps(device, made_for, update):
                change[seed] = change.get(seed, 0.0) + delta
                if scalar is not None:
                    sums[seed] += min(abs(scalar), SCALAR_CLIP)
                    counts[seed] += 1
                    steps += 1
            kind = forward if update.change is None else first_order
            kind.add(self.spec.config, update.samples, number - made_for, change)
            if made_for == number and update.change is None:
                magnitudes.append(Magnitude.of(scalars_from_bytes(update.scalars, self.spec.facts.scalar_format)))
            late += made_for != number
        known = self.known.after(forward, first_order)
        following = self._published(number, known.added(self.spec.config, forward, first_order))
        if following is None:
            return  # the round closed without a combination
        self.coefficients, self.carried, self.change = following
        self.sums, self.counts, self.known = sums, counts, known
        has_first_order = first_order.devices > 0
        config = self.spec.config
        self.fleet = schedule.after_round(config, self.fleet, magnitudes, losses, has_first_order=has_first_order)
        self.counted += forward.devices + first_order.devices
        self.late, self.steps = self.late + late, self.steps + steps

    def _published(self, number: int, added: list[float]) -> Version | None:
        config, facts = self.spec.config, self.spec.facts
        drawn = None
        if config.common_seeds:
            levels = self.terms[number].levels
            seeds = draw(nonce(self.spec, number), None, config.local_steps, facts.seeds, levels)
            drawn = sorted(set(seeds.tolist()))
        return published(self.coefficients, self.carried, added, facts.change_format, drawn)

    def _levels(self) -> bytes | None:
        if self.spec.config.algorithm != "fedkseed-pro" or all(count == 1 for count in self.counts):
            return None
        return significance_levels(np.array([a / b for a, b in zip(self.sums, self.counts, strict=True)]))

    def _vote(self, number: int, store: Store) -> tuple[bytes | None, float | None]:
        """The digest that more than half of the devices with a vote have, and its devices' mean held-out loss."""
        votes: Counter[bytes] = Counter()
        owners: dict[str, bytes] = {}
        for device, made_for, update in self._journal(number, store):
            self.updates += 1
            if made_for == number:
                owners[device] = update.model_digest
                if device not in self.excluded:
                    votes[update.model_digest] += 1
        right = next((digest for digest, count in votes.items() if 2 * count > votes.total()), None)
        if right is None:
            return None, None
        self.excluded -= {device for device, digest in owners.items() if digest == right}
        self.excluded |= {device for device, digest in owners.items() if digest != right}
        losses = []
        for _, made_for, update in self._counted(number, right, store):
            if made_for == number and update.held_out_loss is not None:
                losses.append((update.samples, update.held_out_loss))
        return right, _mean(losses)

    def _kinds(self, number: int, right: bytes, store: Store) -> tuple[Kind, Kind]:
        """Forward-only and first-order: how many count, and their samples."""
        forward, first_order = Kind(len(self.coefficients)), Kind(len(self.coefficients))
        for _, _, update in self._counted(number, right, store):
            kind = forward if update.change is None else first_order
            kind.samples, kind.devices = kind.samples + update.samples, kind.devices + 1
        return forward, first_order

    def _counted(self, number: int, right: bytes, store: Store) -> Iterator[tuple[str, int, Update]]:
        """What is combined in a round: its own updates with the right digest, late ones with that of their round."""
        for device, made_for, update in self._journal(number, store):
            if update.model_digest == (right if made_for == number else self.digests.get(made_for)):
                yield device, made_for, update

    def _journal(self, number: int, store: Store) -> Iterator[tuple[str, int, Update]]:
        for device, made_for, payload in store.journal(self.spec.name, number):
            update = decode("update", payload)
            assert isinstance(update, Update)
            yield device, made_for, update

    def _steps(self, device: str, made_for: int, update: Update) -> Iterator[tuple[int, float, float | None]]:
        """Seed, delta and scalar of every step, drawn and stepped as in the round that the update was made for.

        Of a change: its seeds and values, and no scalar.
        """
        facts, terms = self.spec.facts, self.terms[made_for]
        if update.change is not None:
            named, values = read_change(update.change, facts.scalar_format, facts.seeds)
            return zip(named.tolist(), values.tolist(), itertools.repeat(None))
        scalars = scalars_from_bytes(update.scalars, facts.scalar_format)
        name = None if self.spec.config.common_seeds else device
        seeds = draw(nonce(self.spec, made_for), name, scalars.size, facts.seeds, terms.levels)
        return zip(seeds.tolist(), deltas(terms.rule, scalars).tolist(), scalars.tolist(), strict=True)


def verify(store: Store, run: str) -> Verification:
    """Fold the run's journal and compare every version, to the first difference.

    The run may be served meanwhile: what is verified is the store as it was at the beginning. Raises UserError for an
    unknown run or a damaged store.
    """
    with store.frozen():
        return _verified(store, run)


def _verified(store: Store, run: str) -> Verification:
    store.check()
    row = store.run(run)
    fold = Fold.start(row.spec)
    versions = compared = rounds = 0
    difference: str | None = None
    digest = ""
    for stored in store.folds(run):
        versions += 1
        if difference is not None:
            continue
        if stored.version != compared:
            difference = f"version {compared} is missing in the store"
            continue
        try:
            if stored.version:
                fold.close(stored.version - 1, store)
                rounds += 1
            difference = _difference(stored, fold)
        except PeerError as error:
            difference = f"version {stored.version}: what it was made from does not read: {error}"
        digest = hashlib.sha256(np.array(fold.coefficients, dtype="<f4").tobytes()).hexdigest()
        compared += difference is None
    if difference is None and row.progress.round != versions - 1:
        difference = f"the run stands at version {row.progress.round}, but the store has versions 0 to {versions - 1}"
    return Verification(
        run=run,
        versions=versions,
        compared=compared,
        rounds=rounds,
        updates=fold.updates,
        counted=fold.counted,
        late=fold.late,
        steps=fold.steps,
        latest=compared - 1,
        sha256=digest,
        difference=difference,
    )


def text(found: Verification) -> str:
    """For people."""
    late = f", {found.late} of them late" if found.late else ""
    lines = [
        f"run {found.run}: {found.rounds} rounds folded from {found.updates} accepted updates "
        f"({found.counted} counted{late}; {found.steps} steps)"
    ]
    if found.difference is None:
        lines.append(f"all {found.versions} versions in the store are the fold of the journal, bit for bit")
        lines.append(f"version {found.latest}: coefficients with SHA-256 {found.sha256}")
    else:
        lines.append(f"DIFFERENT: {found.difference}")
        lines.append(f"equal before it: {found.compared} of {found.versions} versions")
    return "\n".join(lines)


def _difference(stored: VersionRow, fold: Fold) -> str | None:
    """How a stored version differs from the fold, for people."""
    ours = np.array(fold.coefficients, dtype="<f4")
    if stored.coefficients != ours.tobytes():
        if len(stored.coefficients) != 4 * ours.size:
            return f"version {stored.version} has {len(stored.coefficients)} bytes of coefficients, not {4 * ours.size}"
        theirs = np.frombuffer(stored.coefficients, dtype="<f4")
        places = np.flatnonzero(theirs.view(np.uint32) != ours.view(np.uint32))
        k = int(places[0])
        return (
            f"version {stored.version}: coefficient {k} is {float(theirs[k])!r} in the store, the journal gives "
            f"{float(ours[k])!r}; {len(places)} of {ours.size} differ"
        )
    if stored.carried != np.array(fold.carried, dtype="<f4").tobytes():
        return f"version {stored.version}: what its changes left over is not what the journal gives"
    change = None if fold.change is None else msgspec.msgpack.encode(fold.change)
    if stored.change != change:
        return f"version {stored.version}: the change that leads to it is not what the journal gives"
    if stored.fleet != fold.fleet:
        return f"version {stored.version}: the fleet is {stored.fleet} in the store, the journal gives {fold.fleet}"
    if stored.algorithm_state != _packed(fold):
        return f"version {stored.version}: what the algorithm remembers is not what the journal gives"
    return _round_difference(stored, fold) if stored.version else None


def _round_difference(stored: VersionRow, fold: Fold) -> str | None:
    """How the stored facts of the round that made the version differ from the fold; late updates are judged by them."""
    number = stored.version - 1
    if stored.report is None or stored.plan is None:
        return f"version {stored.version}: the report or the plan of round {number} is missing"
    told, right = stored.report.model_digest, fold.digests[number]
    if told != (right.hex() if right is not None else None):
        votes = right.hex() if right is not None else "no majority"
        return f"version {stored.version}: round {number} took {told} for the fleet's model, the votes give {votes}"
    plan = decode("plan", stored.plan)
    assert isinstance(plan, Plan)
    if (plan.round, plan.nonce, plan.step, plan.levels) != (number, nonce(fold.spec, number), *fold.terms[number]):
        return f"version {stored.version}: the plan of round {number} is not the one that the journal gives"
    return None


def _packed(fold: Fold) -> bytes:
    known = fold.known
    head = struct.pack("<dqdq", known.noise, known.noise_rounds, known.agreement, known.agreement_rounds)
    if fold.spec.config.algorithm == "fedkseed":
        return head
    return head + np.array(fold.sums, dtype="<f8").tobytes() + np.array(fold.counts, dtype="<i8").tobytes()


def _mean(losses: list[tuple[int, float]]) -> float | None:
    if not losses:
        return None
    try:
        mean = math.fsum(samples * loss for samples, loss in losses) / sum(samples for samples, _ in losses)
    except (OverflowError, ValueError):  # each is finite, their sum is not
        return None
    return mean if math.isfinite(mean) else None
