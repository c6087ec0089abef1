"""Agents in a small fleet: runs of a few short rounds, and what a test asks of an agent."""

from __future__ import annotations

from pathlib import Path

from aggregator.config import RunConfig
from edge_client.agent import Agent
from edge_client.jobs import Job, Report, StepReport
from shared.messages import Plan, Presence, Run
from shared.wire import decode
from tests.small_fleet import LinearTrainer, SmallFleet

CONFIG = RunConfig(
    seeds=256, rounds=4, local_steps=6, batch_size=1, step="plain", lr=0.02, quorum=1, deadline_s=30.0, evaluate_every=0
)
ONE_ROUND = {**{name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__}, "rounds": 2, "deadline_s": 1000.0}


def small(folder: Path, **settings: object) -> SmallFleet:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__}
    return SmallFleet(folder, RunConfig(**{**fields, **settings}))


def presence_of(fleet: SmallFleet, device: str) -> Presence:
    """What is retained about the device."""
    message = decode("presence", fleet.network.retained[f"kseed/demo/presence/{device}"])
    assert isinstance(message, Presence)
    return message


def steps_of(agent: Agent) -> int:
    return agent._jobs.report.step if isinstance(agent._jobs.report, StepReport) else 0


def said(fleet: SmallFleet, device: str = "ann") -> str:
    return fleet.screens[device].getvalue()


class BrokenTrainer(LinearTrainer):
    """Raises where it is told to."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__("ann")
        self._where, self._error = where, error

    def load(self, run: Run):  # type: ignore[no-untyped-def]
        if self._where == "load":
            raise self._error
        return super().load(run)

    def train(self, plan: Plan, model_digest: bytes, done: tuple[Report, ...] = ()) -> Job:
        if self._where == "train":
            raise self._error
        return (yield from super().train(plan, model_digest, done))
