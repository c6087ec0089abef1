"""The state of a run in the aggregator, and what it says to the devices: plan and snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from aggregator import algorithms, schedule
from aggregator.accepted import AcceptedUpdates
from aggregator.algorithms import Algorithm
from aggregator.config import RunConfig
from aggregator.schedule import Fleet
from aggregator.spec import Spec, nonce, participation
from shared.messages import Change, Plan, Snapshot
from shared.wire import coefficients_to_bytes

Phase = Literal["created", "open", "paused", "finished"]


class Exclusion(msgspec.Struct, frozen=True):
    """A device whose rebuilt model differed from the fleet's, and has not agreed since."""

    device: str
    round: int  # of its latest differing update
    digest: str  # of its model then, hex


class Progress(msgspec.Struct, frozen=True):
    """Where a run stands. `round` is also the version of the coefficients that the round trains from."""

    round: int = 0
    phase: Phase = "created"
    reason: str = ""  # why paused or finished
    opened_at_ms: int = 0  # the round's first plan, unix milliseconds
    published_at_ms: int = 0  # its current plan
    deadline_at_ms: int = 0
    extensions: int = 0  # deadlines of this round that passed with too few updates
    part: float = 1.0  # of the fleet that the round selects before any extension
    online: int = 0  # devices, by their presence; 0: not known
    excluded: tuple[Exclusion, ...] = ()  # in device order

    @property
    def excluded_devices(self) -> frozenset[str]:
        """Their ids."""
        return frozenset(exclusion.device for exclusion in self.excluded)


@dataclass(frozen=True)
class PastRound:
    """A closed round whose updates may still come: again, because a receipt was lost, or late."""

    plan: Plan  # as it stood at the end
    model_digest: bytes | None  # of the fleet's model in it; None: no majority
    accepted: Mapping[str, bytes]  # device -> fingerprint of its accepted update


@dataclass(frozen=True)
class State:
    """Everything the round logic knows. `coefficients` are K little-endian float32, so that states compare."""

    spec: Spec
    progress: Progress
    coefficients: bytes
    carried: bytes  # what changes left over so far, K little-endian float32
    algorithm_state: algorithms.State
    fleet: Fleet
    updates: AcceptedUpdates[str] = field(default_factory=AcceptedUpdates)  # of this round, by device
    late: AcceptedUpdates[tuple[str, int]] = field(default_factory=AcceptedUpdates)  # by device and its earlier round
    change: Change | None = None  # what led from the version before to this one; None: a snapshot is no longer
    past: tuple[PastRound, ...] = ()  # the last `remembered` rounds, oldest first


def remembered(config: RunConfig) -> int:
    """How many closed rounds a state remembers."""
    return config.max_staleness if config.late == "fold" else 1


def algorithm_of(spec: Spec) -> Algorithm:
    """The run's algorithm."""
    config = spec.config
    weighs_samples = config.weighting == "samples"
    return algorithms.choose(config.algorithm, weighs_samples=weighs_samples, server_scale=config.server_scale)


def new_state(spec: Spec) -> State:
    """A run that nobody has served yet: version 0, all coefficients zero."""
    seeds = spec.facts.seeds
    return State(
        spec=spec,
        progress=Progress(),
        coefficients=coefficients_to_bytes(np.zeros(seeds, np.float32)),
        carried=coefficients_to_bytes(np.zeros(seeds, np.float32)),
        algorithm_state=algorithm_of(spec).init(seeds),
        fleet=schedule.start(spec.config),
    )


def coefficients_of(data: bytes) -> NDArray[np.float32]:
    """Coefficients (K,) float32 from the state's bytes, read-only."""
    return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)


def counting(state: State) -> int:
    """How many updates of the round count towards `min_updates`: those of devices that are not excluded."""
    return len(state.updates) - sum(device in state.updates for device in state.progress.excluded_devices)


def past_round(state: State, number: int) -> PastRound | None:
    """The closed round of that number, if it is remembered."""
    return next((past for past in state.past if past.plan.round == number), None)


def plan_of(state: State) -> Plan:
    """The plan that the state stands for. A function of the state: publishing it again changes nothing."""
    progress, config = state.progress, state.spec.config
    assert progress.phase != "created"
    is_evaluated = progress.phase == "finished" or progress.round % max(config.evaluate_every, 1) == 0
    return Plan(
        round=progress.round,
        phase=progress.phase,
        nonce=nonce(state.spec, progress.round),
        local_steps=config.local_steps,
        one_sided=config.one_sided,
        batch_size=config.batch_size,
        eps=config.eps,
        step=schedule.step_rule(config, state.fleet),
        participation=participation(config, progress.part, progress.extensions),
        common_seeds=config.common_seeds,
        levels=algorithm_of(state.spec).levels(state.algorithm_state),
        evaluate=config.evaluate_every > 0 and is_evaluated,
        published_at_ms=progress.published_at_ms,
        deadline_s=config.deadline_s,
        reason=progress.reason,
        change=state.change,
    )


def snapshot_of(state: State) -> Snapshot:
    """The coefficients of the state's version."""
    return Snapshot(version=state.progress.round, coefficients=state.coefficients)
