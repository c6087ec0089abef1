"""The learning part of `kseed bench first-order`: what K buys a device with exact gradients.

One device, one long round of gradient steps of batch 16 on all weights, for K from 1,024 to 65,536, each in a process
of its own. Judged on held-out examples of the same file. A line of JSON per reading goes to `learning.jsonl` in the
benchmark's folder, so that a run that is cut short has told what it knew.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from shared.messages import Everyone, NormalisedStep, Plan
from tools.bench import Asked, Measured
from tools.bench_step import POOL_KEY, in_process

POOLS = (1024, 4096, 16384, 65536)
BATCH = 16
JUDGED = 400  # held-out examples, at most
LOCAL_STEPS = 250  # forward-only ones: as dear as 100 with gradients
RULE = NormalisedStep(step_rms=2.5e-3, clip=3.0, decay=0.99, prior_mean_square=0.0, prior_count=0)  # 4e-4 per gradient
TEMPLATE = "{text}\nSentiment:"


def bench_learning(asked: Asked, source: str) -> list[Measured]:
    """Loss and accuracy before and after, for each K. `asked.data`: a JSONL or CSV file with text and label."""
    lines = []
    with (asked.folder / "learning.jsonl").open("a", encoding="utf-8") as file:
        for seeds in (4096,) if asked.quick else POOLS:
            steps = 5 if asked.quick else LOCAL_STEPS
            facts: dict[str, Any] = in_process(
                "tools.bench_first_order_learning", source, str(asked.data), str(seeds), str(steps)
            )
            lines.append(facts)
            print(json.dumps(facts), file=file, flush=True)
    rows = []
    for facts in lines:
        what = f"K {facts['seeds']}, {facts['steps']} gradient steps of {BATCH}, {facts['forwards']} forwards' worth"
        loss, accuracy = facts["before"]
        rows += [
            Measured(f"{what}: held-out loss", "nats", (facts["after"][0],), "", f"before: {loss:.3f}"),
            Measured(f"{what}: held-out accuracy", "", (facts["after"][1],), "", f"before: {accuracy:.3f}"),
        ]
    return rows


def learned(source: str, data: str, seeds: int, local_steps: int) -> dict[str, Any]:
    """One K: the facts of its line."""
    import torch

    from edge_client.data.batches import batch_for_step, collate
    from edge_client.data.settings import DataConfig
    from edge_client.data.task import load_task
    from edge_client.evaluate import evaluate
    from edge_client.first_order_gradient import OffsetGradient
    from edge_client.first_order_steps import GRADIENT_COST, Progress, change_of, gradient_steps
    from edge_client.loss import labelled_loss
    from edge_client.model import load_model
    from tools.bench_step import overlay_of

    torch.set_num_threads(1)
    loaded = load_model(source, "bf16")
    task = load_task(DataConfig(source=data, template=TEMPLATE), loaded.tokenizer)
    overlay = overlay_of(loaded.model, seeds=seeds)
    gradient = OffsetGradient(overlay)
    plan = Plan(
        round=0, phase="open", nonce=bytes(16), local_steps=local_steps, batch_size=BATCH, eps=1e-3, step=RULE,
        participation=Everyone(), common_seeds=False, levels=None, evaluate=False, published_at_ms=0, deadline_s=1.0,
        reason="", change=None,
    )  # fmt: skip

    def measure(step: int) -> tuple[float, Any]:
        rows = batch_for_step(task.train, nonce=plan.nonce, device="bench", step=step, batch_size=BATCH)
        return gradient.measure(loaded.model, collate(rows, task.padding))

    def judged() -> tuple[float, float | None]:
        rows = task.held_out[:JUDGED]
        found = evaluate(loaded.model, loaded.tokenizer, rows, labelled_loss, answers=task.answers)
        return found.loss, found.accuracy

    before = judged()
    steps = list(gradient_steps(overlay, plan, Progress.of(seeds), measure))
    losses, moved = [round(loss, 4) for loss, _ in steps], steps[-1][1].moved
    overlay.set_coefficients(change_of(moved))
    return {
        "seeds": seeds, "steps": len(losses), "forwards": len(losses) * GRADIENT_COST, "before": before,
        "after": judged(), "losses": losses, "pool_key": POOL_KEY,
        "moved_rms": float(np.sqrt(np.mean(moved**2))),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(learned(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
