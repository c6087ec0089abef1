"""The state of a run folded from its journal, for `verification`: vote, sum, add, round after round."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from aggregator import schedule
from aggregator.schedule import Fleet, Magnitude
from aggregator.spec import Spec, nonce
from aggregator.store import Store
from aggregator.verified_change import Version, published
from aggregator.verified_sums import Kind, Known
from shared.changes import NOTHING, read_change
from shared.messages import Change, StepRule, Update
from shared.seeds import draw, significance_levels
from shared.steprule import deltas
from shared.wire import decode, scalars_from_bytes

SCALAR_CLIP = 1000.0  # FedKSeed-Pro, as the authors' code


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
        known, config = self.known.after(forward, first_order), self.spec.config
        has_first_order = first_order.devices > 0
        length, fleet = schedule.after_round(config, self.fleet, magnitudes, losses, has_first_order=has_first_order)
        added = [length * value for value in known.added(config, forward, first_order)]
        following = self._published(number, added)
        if following is None:
            return  # the round closed without a combination
        self.coefficients, self.carried, self.change = following
        self.sums, self.counts, self.known, self.fleet = sums, counts, known, fleet
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


def _mean(losses: list[tuple[int, float]]) -> float | None:
    if not losses:
        return None
    try:
        mean = math.fsum(samples * loss for samples, loss in losses) / sum(samples for samples, _ in losses)
    except (OverflowError, ValueError):  # each is finite, their sum is not
        return None
    return mean if math.isfinite(mean) else None
