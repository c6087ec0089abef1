"""Closing a round: who rebuilt the fleet's model, what their updates make together, what is told to whom.

The divergence check. Every update carries the digest of the model that its device rebuilt for the round's version.
Each device that is not excluded has one vote, whatever its weight. A digest with more than half of the votes is the
fleet's: updates with it are combined, also those of excluded devices, which are thereby back; all others are left
out, told so, and excluded. Updates of excluded devices are taken and count towards the quorum (nobody waits for
them), but neither vote nor count towards `min_updates`.
Without such a majority nobody can say who is right: nothing is combined, everyone is told, nobody is excluded, and
the version advances with the same coefficients, so that the next round is a fresh try.

Late updates (`late = "fold"`) agreed with the majority of their own round before they were accepted: they have no vote
here, and are combined with the others, for less, in the order (device, round).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from aggregator import algorithms, schedule
from aggregator.accepted import fingerprint
from aggregator.algorithms import Contribution, Contributions, Total
from aggregator.events import SendReceipt
from aggregator.next_version import NextVersion, next_version, same_version
from aggregator.replay import Work, replayed
from aggregator.reports import Outcome, RoundReport
from aggregator.schedule import Fleet, Magnitude
from aggregator.state import Exclusion, PastRound, State, algorithm_of, coefficients_of, plan_of, remembered
from shared.changes import drawn_seeds
from shared.errors import UserError
from shared.messages import Change, PlainStep, Plan, Receipt, Update
from shared.refusals import Refusal
from shared.wire import coefficients_to_bytes

_DIGESTS_NAMED = 4  # in a receipt


@dataclass(frozen=True)
class Verdict:
    """Whose model is the fleet's. Devices in id order."""

    reference: bytes | None  # digest, 16 bytes; None: no majority
    counted: tuple[str, ...]
    left_out: tuple[str, ...]
    votes: tuple[tuple[bytes, int], ...]  # digest, how many; most votes first


@dataclass(frozen=True)
class Closing:
    """A closed round: what the next one starts from, and what to say."""

    coefficients: bytes
    carried: bytes
    change: Change | None
    algorithm_state: algorithms.State
    fleet: Fleet
    excluded: tuple[Exclusion, ...]
    report: RoundReport
    past: tuple[PastRound, ...]
    receipts: tuple[SendReceipt, ...]
    notes: tuple[str, ...]


def vote(digests: dict[str, bytes], excluded: frozenset[str]) -> Verdict:
    """The verdict on the digests of a round's updates (see the module)."""
    counter = Counter(digest for device, digest in digests.items() if device not in excluded)
    votes = tuple(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
    devices = tuple(sorted(digests))
    if not votes or 2 * votes[0][1] <= counter.total():
        return Verdict(None, (), devices, votes)
    reference = votes[0][0]
    counted = tuple(device for device in devices if digests[device] == reference)
    return Verdict(reference, counted, tuple(d for d in devices if digests[d] != reference), votes)


def close(state: State, now_ms: int) -> Closing:
    """Close the state's round with the updates that it has. Pure, and a function of the updates, not of their order."""
    verdict = vote(
        {device: entry.update.model_digest for device, entry in state.updates.items()},
        state.progress.excluded_devices,
    )
    updates = {device: state.updates[device].update for device in verdict.counted}
    plan = plan_of(state)
    watched = _Watched(state, plan, updates)
    combined = _Combined(
        same_version(coefficients_of(state.coefficients), coefficients_of(state.carried)),
        state.algorithm_state,
        state.fleet,
    )
    outcome: Outcome = "combined"
    detail = ""
    if verdict.reference is None:
        outcome, detail = "no majority", f"the devices' models differ: {_votes(verdict)}"
    else:
        try:
            combined = _combine(state, plan, watched)
        except UserError as error:
            outcome, detail = "not finite", str(error)
    report = _report(state, now_ms, outcome, detail, updates, watched.magnitudes, combined, verdict)
    return Closing(
        coefficients=coefficients_to_bytes(combined.version.coefficients),
        carried=coefficients_to_bytes(combined.version.carried),
        change=combined.version.change,
        algorithm_state=combined.algorithm_state,
        fleet=combined.fleet,
        excluded=_excluded(state, verdict),
        report=report,
        past=_past(state, plan, verdict.reference),
        receipts=tuple(_diverged(state, verdict, device) for device in verdict.left_out),
        notes=_notes(state, verdict, outcome, detail),
    )


@dataclass(frozen=True)
class _Combined:
    """What a round's updates made, and what the algorithm and the schedule remember of them."""

    version: NextVersion
    algorithm_state: algorithms.State
    fleet: Fleet
    devices: int = 0
    first_order: int = 0
    steps: int = 0


def _combine(state: State, plan: Plan, watched: _Watched) -> _Combined:
    """Raises CombinationError where float32 cannot hold the result."""
    facts, contributions = state.spec.facts, watched.contributions()
    algorithm_state, combined, steps = algorithm_of(state.spec).apply(state.algorithm_state, contributions, facts.seeds)
    first_order = contributions.first_order.devices
    length, fleet = schedule.after_round(
        state.spec.config,
        state.fleet,
        watched.magnitudes,
        _mean(watched.updates, "held_out_loss"),
        has_first_order=first_order > 0,
    )
    version = next_version(
        coefficients_of(state.coefficients),
        coefficients_of(state.carried),
        length * combined,
        facts.change_format,
        drawn_seeds(plan, facts.seeds),
    )
    return _Combined(version, algorithm_state, fleet, contributions.devices, first_order, steps)


@dataclass
class _Watched:
    """A round's contributions for the algorithm, and what the schedule wants to know of the scalars on their way."""

    state: State
    plan: Plan
    updates: dict[str, Update]  # of this round, in device order
    magnitudes: list[Magnitude] = field(default_factory=list)  # of the scalars, per update

    def contributions(self) -> Contributions:
        """In device order."""
        late = self.state.late.values()
        updates = [*self.updates.values(), *(one.update for one in late)]
        forward = Total.of([one.samples for one in updates if one.change is None])
        first_order = Total.of([one.samples for one in updates if one.change is not None])
        return Contributions(forward, first_order, self._read)

    def _read(self) -> Iterator[Contribution]:
        self.magnitudes.clear()
        for contribution in replayed(self._works(), self.state.spec.facts):
            if not contribution.staleness and not contribution.is_first_order:  # late ones measured an older model
                self.magnitudes.append(Magnitude.of(contribution.scalars))
            yield contribution

    def _works(self) -> Iterator[Work]:
        """By device, and by round for one device."""
        number = self.plan.round
        plans = {past.plan.round: past.plan for past in self.state.past} | {number: self.plan}
        for device, made_for in sorted([(device, number) for device in self.updates] + list(self.state.late)):
            is_late = made_for != number
            update = self.state.late[device, made_for].update if is_late else self.updates[device]
            yield Work(device, update, plans[made_for], number - made_for)


def _mean(updates: dict[str, Update], name: str) -> float | None:
    """The mean of a field, weighted by samples, over the updates that have it. Exactly rounded, so order-free."""
    pairs = [(update.samples, getattr(update, name)) for update in updates.values()]
    known = [(samples, value) for samples, value in pairs if value is not None]
    if not known:
        return None
    try:
        mean = math.fsum(samples * value for samples, value in known) / sum(samples for samples, _ in known)
    except (OverflowError, ValueError):  # each loss is finite, their sum is not: no peer may end the loop by it
        return None
    return mean if math.isfinite(mean) else None


def _report(
    state: State,
    now_ms: int,
    outcome: Outcome,
    detail: str,
    updates: dict[str, Update],
    magnitudes: list[Magnitude],
    combined: _Combined,
    verdict: Verdict,
) -> RoundReport:
    scalars = sum(one.count for one in magnitudes)
    rule = plan_of(state).step
    return RoundReport(
        round=state.progress.round,
        outcome=outcome,
        detail=detail,
        opened_at_ms=state.progress.opened_at_ms,
        closed_at_ms=now_ms,
        accepted=len(state.updates) + len(state.late),
        counted=combined.devices,
        late=len(state.late),
        first_order=combined.first_order,
        model_digest=verdict.reference.hex() if verdict.reference is not None else None,
        left_out=len(verdict.left_out),
        samples=sum(update.samples for update in updates.values()),
        steps=combined.steps,
        train_loss=_mean(updates, "train_loss"),
        held_out_loss=_mean(updates, "held_out_loss"),
        held_out_accuracy=_mean(updates, "held_out_accuracy"),
        step=rule.lr if isinstance(rule, PlainStep) else rule.step_rms,
        scalar_rms=math.sqrt(math.fsum(one.square_sum for one in magnitudes) / scalars) if scalars else None,
        change_rms=combined.version.rms,
        update_bytes=sum(len(entry.payload) for entry in (*state.updates.values(), *state.late.values())),
    )


def _past(state: State, plan: Plan, reference: bytes | None) -> tuple[PastRound, ...]:
    """The rounds that the next state remembers: this one, and those before with the late updates counted now."""
    late: dict[int, dict[str, bytes]] = {}
    for (device, made_for), entry in state.late.items():
        late.setdefault(made_for, {})[device] = fingerprint(entry.payload)
    before = [
        replace(past, accepted={**past.accepted, **late[past.plan.round]}) if past.plan.round in late else past
        for past in state.past
    ]
    now = PastRound(plan, reference, {device: fingerprint(entry.payload) for device, entry in state.updates.items()})
    return (*before, now)[-remembered(state.spec.config) :]


def _excluded(state: State, verdict: Verdict) -> tuple[Exclusion, ...]:
    if verdict.reference is None:
        return state.progress.excluded
    kept = {one.device: one for one in state.progress.excluded if one.device not in verdict.counted}
    for device in verdict.left_out:
        digest = state.updates[device].update.model_digest.hex()
        kept[device] = Exclusion(device, state.progress.round, digest)
    return tuple(kept[device] for device in sorted(kept))


def _diverged(state: State, verdict: Verdict, device: str) -> SendReceipt:
    own = state.updates[device].update.model_digest.hex()
    if verdict.reference is None:
        detail = f"your model is {own}, and no model has a majority: {_votes(verdict)}; nothing was combined"
    else:
        detail = (
            f"your model is {own}, the fleet's {verdict.reference.hex()} ({verdict.votes[0][1]} devices); "
            "an update with the fleet's digest brings this device back"
        )
    return SendReceipt(device, Receipt(state.progress.round, int(Refusal.DIVERGED), detail))


def _late_lost(state: State) -> str:
    """Late updates that the round took in: their devices were told ACCEPTED, and have nothing to mend."""
    lost = ", ".join(f"{device} (round {made_for})" for device, made_for in sorted(state.late))
    return f"; nor do the late updates count of {lost}" if lost else ""


def _notes(state: State, verdict: Verdict, outcome: Outcome, detail: str) -> tuple[str, ...]:
    number = state.progress.round
    if outcome != "combined":
        return (f"round {number}: nothing combined: {detail}{_late_lost(state)}",)
    assert verdict.reference is not None
    before = state.progress.excluded_devices
    notes = [
        f"round {number}: device {device} DIVERGED, its model is {state.updates[device].update.model_digest.hex()}, "
        f"the fleet's {verdict.reference.hex()}; left out until it agrees"
        for device in verdict.left_out
        if device not in before
    ]
    back = [
        f"round {number}: device {device} agrees with the fleet again"
        for device in sorted(before)
        if device in verdict.counted
    ]
    return tuple(notes + back)


def _votes(verdict: Verdict) -> str:
    named = [f"{digest.hex()} ({count})" for digest, count in verdict.votes[:_DIGESTS_NAMED]]
    rest = len(verdict.votes) - len(named)
    return ", ".join(named) + (f" and {rest} more" if rest else "")
