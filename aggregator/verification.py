"""Folding the journal once more, from version 0, to see that every stored version is what its updates make.

This is evidence about `closing`, `replay` and `algorithms`, so it shares no arithmetic with them: plain Python
numbers, one device after the other, one step after the other, as PROTOCOL.md section 9.9 says it, on the definitions
of `shared`. Of the stored versions it takes nothing but what it compares with. Slow, and of bounded memory: one update
and some numbers per device at a time.
"""

from __future__ import annotations

import hashlib
import struct

import msgspec
import numpy as np

from aggregator.records import VersionRow
from aggregator.spec import nonce
from aggregator.store import Store
from aggregator.verified_fold import Fold
from shared.errors import PeerError
from shared.messages import Plan
from shared.wire import decode


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
