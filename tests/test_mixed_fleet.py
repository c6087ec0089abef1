"""A fleet of both kinds of device learns more in the same time than either half of it alone.

Each device has its own part of the data; what is measured is the loss on all of it. Everything is simulated in this
process but real: overlay, estimators, update's form, the aggregator's combination.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from aggregator.algorithms import Contribution, Contributions, FedKSeed
from edge_client.data.batches import NOT_LABELLED, Batch, batch_for_step
from edge_client.estimator import local_steps
from edge_client.first_order_gradient import OffsetGradient
from edge_client.first_order_steps import Progress, change_of, gradient_steps
from edge_client.loss import labelled_loss
from edge_client.overlay import Overlay
from shared.messages import NormalisedStep, Plan
from shared.seeds import draw
from shared.steprule import deltas
from tests.driven_session import PLAN
from tests.tiny_models import VOCABULARY, tiny_model

SEEDS = 256
ROUNDS = 4
FORWARD, FIRST_ORDER = ("ann", "bob", "cem", "dee", "eva", "fay"), ("gil", "hal")
RULE = NormalisedStep(step_rms=1.2e-2, clip=3.0, decay=0.99, prior_mean_square=0.0, prior_count=0)


def rows_of(device: str) -> list[torch.Tensor]:
    """Sixteen sequences in which a token tells the next; which tokens they are made of is the device's own."""
    following = np.random.default_rng(0).permutation(np.arange(4, VOCABULARY))
    rng = np.random.default_rng(list(device.encode()))
    own = rng.choice(np.arange(4, VOCABULARY), 24, replace=False)
    rows = []
    for start in rng.choice(own, 16):
        tokens = [int(start)]
        while len(tokens) < 8:
            tokens.append(int(following[tokens[-1] - 4]))
        rows.append(torch.tensor(tokens))
    return rows


def batch_of(rows: Sequence[torch.Tensor]) -> Batch:
    ids = torch.stack(list(rows))
    labels = ids.clone()
    labels[:, 0] = NOT_LABELLED
    return Batch(ids, torch.ones_like(ids), labels)


class Fleet:
    """One model that plays every device in turn."""

    def __init__(self) -> None:
        self.model = tiny_model("llama-tied")
        self.overlay = Overlay(self.model, pool_key=5, seeds=SEEDS, directions="hadamard")
        self.gradient = OffsetGradient(self.overlay)
        self.data = {device: rows_of(device) for device in FORWARD + FIRST_ORDER}
        self.everything = batch_of([row for rows in self.data.values() for row in rows])

    def loss(self, a: np.ndarray) -> float:
        """On all devices' data together."""
        self.overlay.set_coefficients(a)
        with torch.inference_mode():
            return float(labelled_loss(self.model, self.everything))

    def batch(self, plan: Plan, device: str, step: int) -> Batch:
        return batch_of(batch_for_step(self.data[device], nonce=plan.nonce, device=device, step=step, batch_size=4))

    def forward_only(self, plan: Plan, device: str) -> Contribution:
        steps = local_steps(
            self.overlay, plan, device, lambda step: self.batch(plan, device, step),
            lambda batch: labelled_loss(self.model, batch), "f32",
        )  # fmt: skip
        scalars = np.array([step.scalar for step in steps], dtype=np.float32)
        seeds = draw(plan.nonce, device, plan.local_steps, SEEDS, None)
        return Contribution(device, 16, seeds, scalars, deltas(plan.step, scalars))

    def first_order(self, plan: Plan, device: str) -> Contribution:
        def measure(step: int) -> tuple[float, np.ndarray]:
            return self.gradient.measure(self.model, self.batch(plan, device, step))

        *_, (_, last) = gradient_steps(self.overlay, plan, Progress.of(SEEDS), measure)
        change = change_of(last.moved)
        return Contribution(device, 16, np.arange(SEEDS), np.empty(0, np.float32), change)

    def loss_after(self, forward: Sequence[str], first_order: Sequence[str]) -> float:
        """Of all data, after `ROUNDS` rounds in which these devices take part."""
        algorithm = FedKSeed(server_scale="sqrt")
        state, a = algorithm.init(SEEDS), np.zeros(SEEDS, np.float32)
        for number in range(ROUNDS):
            nonce = bytes([number]) * 16
            plan = msgspec.structs.replace(PLAN, round=number, nonce=nonce, local_steps=25, batch_size=4, step=RULE)
            updates = []
            for device in (*forward, *first_order):
                self.overlay.set_coefficients(a)
                take = self.forward_only if device in FORWARD else self.first_order
                updates.append(take(plan, device))
            state, change, _ = algorithm.apply(state, Contributions.of(updates), SEEDS)
            a = a + change.astype(np.float32)
        return self.loss(a)


def test_a_mixed_fleet_beats_either_half_alone_at_equal_time() -> None:
    fleet = Fleet()
    before = fleet.loss(np.zeros(SEEDS, np.float32))
    forward, first_order = fleet.loss_after(FORWARD, ()), fleet.loss_after((), FIRST_ORDER)
    mixed = fleet.loss_after(FORWARD, FIRST_ORDER)
    told = f"before {before:.3f}, forward-only {forward:.3f}, first-order {first_order:.3f}, mixed {mixed:.3f}"
    assert forward < before and first_order < before, told
    assert mixed < min(forward, first_order) - 0.005, told
