"""The learning part of `kseed bench first-order`: what K buys a device with exact gradients.

One device, one long round of gradient steps of batch 16 on all weights, for K from 1,024 to 65,536, each in a process
of its own. Judged on held-out examples of the same file. The benchmark's folder gets a line of JSON per K as soon as it
is known (`learning.jsonl`), and a picture (`learning.png`).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from shared.messages import Everyone, NormalisedStep, Plan
from tools.bench import Asked, Measured
from tools.bench_learning import Curve
from tools.bench_step import POOL_KEY, in_process

POOLS = (1024, 4096, 16384, 65536)
BATCH = 16
JUDGED = 400  # held-out examples, at most
READ_EVERY = 25  # gradient steps
LOCAL_STEPS = 250  # forward-only ones: as dear as 100 with gradients
RULE = NormalisedStep(step_rms=2.5e-3, clip=3.0, decay=0.99, prior_mean_square=0.0, prior_count=0)  # 4e-4 per gradient
TEMPLATE = "{text}\nSentiment:"


def bench_learning(asked: Asked, source: str) -> list[Measured]:
    """Loss and accuracy before and after, for each K. `asked.data`: a JSONL or CSV file with text and label."""
    from tools.bench_learning_plot import plot_curves

    lines = []
    with (asked.folder / "learning.jsonl").open("a", encoding="utf-8") as file:
        for seeds in (4096,) if asked.quick else POOLS:
            steps = 5 if asked.quick else LOCAL_STEPS
            facts: dict[str, Any] = in_process(
                "tools.bench_first_order_learning", source, str(asked.data), str(seeds), str(steps)
            )
            lines.append(facts)
            print(json.dumps(facts), file=file, flush=True)
    plot_curves(asked.folder / "learning.png", [Curve(f"K {facts['seeds']}", 0, facts["points"]) for facts in lines])
    rows = []
    for facts in lines:
        (_, loss, accuracy), *_, (forwards, last_loss, last_accuracy) = facts["points"]
        what = f"K {facts['seeds']}, batches of {BATCH}, {forwards} forwards' worth"
        rows += [
            Measured(f"{what}: held-out loss", "nats", (last_loss,), "", f"before: {loss:.3f}"),
            Measured(f"{what}: held-out accuracy", "", (last_accuracy,), "", f"before: {accuracy:.3f}"),
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
    from edge_client.first_order_steps import GRADIENT_COST, Progress, change_of, gradient_steps, steps_of
    from edge_client.loss import labelled_loss
    from edge_client.model import load_model
    from tools.bench_step import overlay_of

    torch.set_num_threads(1)
    loaded = load_model(source, "bf16")
    task = load_task(DataConfig(source=data, template=TEMPLATE), loaded.tokenizer)
    overlay = overlay_of(loaded.model, seeds=seeds)
    gradient = OffsetGradient(overlay)
    plan = Plan(
        round=0, phase="open", nonce=bytes(16), local_steps=local_steps, one_sided=0, batch_size=BATCH,
        eps=1e-3, step=RULE, participation=Everyone(), common_seeds=False, levels=None, evaluate=False,
        published_at_ms=0, deadline_s=1.0, reason="", change=None,
    )  # fmt: skip

    def measure(step: int) -> tuple[float, Any]:
        rows = batch_for_step(task.train, nonce=plan.nonce, device="bench", step=step, batch_size=BATCH)
        return gradient.measure(loaded.model, collate(rows, task.padding))

    def judged() -> tuple[float, float | None]:
        rows = task.held_out[:JUDGED]
        found = evaluate(loaded.model, loaded.tokenizer, rows, labelled_loss, answers=task.answers)
        return found.loss, found.accuracy

    points = [(0, *judged())]
    for _, progress in gradient_steps(overlay, plan, Progress.of(seeds), measure):
        if progress.steps % READ_EVERY == 0 or progress.steps == steps_of(plan):
            overlay.set_coefficients(change_of(progress.moved))
            points.append((progress.steps * GRADIENT_COST, *judged()))
    return {"seeds": seeds, "pool_key": POOL_KEY, "points": points}


if __name__ == "__main__":
    print(json.dumps(learned(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
