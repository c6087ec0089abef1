"""What the agent wants of the model, and what it hears while a job runs. Values and an interface; no torch."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, Union

from edge_client.events import Evaluated, ModelReady, Trained, TrainingFailed
from shared.messages import Plan, Run


@dataclass(frozen=True)
class StepReport:
    """Local step `step` (from 1) of `steps` is done; `loss` is about that before it, nats per token."""

    step: int
    steps: int
    loss: float
    scalar: float | None  # as it travels; None of a step along the exact gradient


@dataclass(frozen=True)
class HeldOutReport:
    """`done` of `examples` held-out examples are evaluated. Loss (nats per token) and accuracy come with the last."""

    done: int
    examples: int
    loss: float | None = None
    accuracy: float | None = None


Report = Union[StepReport, HeldOutReport]
Outcome = Union[Trained, TrainingFailed, Evaluated]
# What is sent in is True to end the local steps with those that are done.
Job = Generator[Report, bool, Outcome]


class Trainer(Protocol):
    """The model, the overlay and the data (`edge_client.trainer`)."""

    def load(self, run: Run) -> ModelReady:
        """Load the base model for `run`. Raises UserError."""

    def rebuild(self, version: int, coefficients: bytes) -> bytes:
        """Set the overlay to `coefficients`; returns the first 16 bytes of the model digest."""

    def train(self, plan: Plan, model_digest: bytes, done: tuple[Report, ...] = ()) -> Job:
        """The held-out evaluation where the plan asks for it, then the local steps.

        done: what is done already, as reported then: the evaluation's last report, and the first steps.
        """

    def evaluate(self, version: int) -> Job:
        """The held-out evaluation alone."""
