"""`kseed bench first-order`: an exact gradient step of all weights against LoRA and full backprop on the same batch.

Memory and time of a step, each way in a process of its own, as `tools.bench_memory` does. All ways have the same loss
(head on labelled positions only) and keep the activations of one layer at a time. LoRA is peft's, if it is
installed (it is no dependency of kseed): rank 8 and 16 on all linear layers, AdamW; full backprop is AdamW too.
With `--data`, also what K buys (`tools.bench_first_order_learning`).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shared.errors import UserError
from tools.bench import Asked, BenchResult, Measured, load, machine
from tools.bench_first_order_learning import bench_learning
from tools.bench_memory import status_mb
from tools.bench_step import batch_of, forwards_of, in_process, model_of, overlay_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edge_client.data.batches import Batch

Way = Literal["inference", "kseed", "lora-8", "lora-16", "full"]
_STEPS = 3
_TITLES: dict[Way, str] = {
    "inference": "a forward pass",
    "kseed": "kseed gradient step, all weights",
    "lora-8": "LoRA rank 8 step (peft)",
    "lora-16": "LoRA rank 16 step (peft)",
    "full": "full backprop step, AdamW",
}


@dataclass(frozen=True)
class Cost:
    """What one way costs: resident memory in MB before loading and at its peak, processor seconds of a step."""

    imports_mb: float
    peak_mb: float
    cpu_s: float


def bench_first_order(asked: Asked) -> BenchResult:
    """See the module. Raises UserError off Linux, where a peak cannot be set back."""
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("the first-order benchmark reads /proc/self; this system has none. Run it on Linux.")
    source = model_of(asked)
    ways: list[Way] = ["inference", "kseed", "lora-8", "lora-16", "full"]
    if find_spec("peft") is None:
        print("peft is not installed, so LoRA is left out; install it with: pip install peft", file=sys.stderr)
        ways = ["inference", "kseed", "full"]
    costs: dict[Way, list[Cost]] = {way: [] for way in ways}
    for _ in range(1 if asked.quick else 3):
        for way, kept in costs.items():
            kept.append(Cost(*in_process("tools.bench_first_order", source, way)["cost"]))
    rows = rows_of(costs)
    if asked.data is None:
        print(
            "no --data, so what K buys is left out; it needs a JSONL or CSV file with text and label", file=sys.stderr
        )
    else:
        rows += bench_learning(asked, source)
    return BenchResult("first-order", tuple(rows), machine(), load())


def rows_of(costs: dict[Way, list[Cost]]) -> list[Measured]:
    """Peaks beyond what the imports hold, and processor time, as numbers and against the other ways."""
    ours = costs["kseed"]
    rows = []
    for way, kept in costs.items():
        peak = statistics.median(cost.peak_mb - cost.imports_mb for cost in kept)
        seconds = statistics.median(cost.cpu_s for cost in kept)
        rows += [
            Measured(f"{_TITLES[way]}: peak beyond imports", "MB", tuple(c.peak_mb - c.imports_mb for c in kept)),
            Measured(f"{_TITLES[way]}: processor time", "s", tuple(cost.cpu_s for cost in kept)),
        ]
        if way != "kseed":
            grown = tuple((cost.peak_mb - cost.imports_mb) / peak for cost in ours)
            rows.append(Measured(f"kseed / {_TITLES[way]}: peak", "x", grown, "", f"{peak:.0f} MB"))
            slower = tuple(cost.cpu_s / seconds for cost in ours)
            rows.append(Measured(f"kseed / {_TITLES[way]}: time", "x", slower, "", f"{seconds:.2f} s"))
    return rows


def work_of(way: Way, model: PreTrainedModel, batch: Batch) -> Callable[[], object]:
    """One step of `way` on `batch`; `model` is changed."""
    if way == "inference":
        return forwards_of(model, batch, 1)
    if way == "kseed":
        from edge_client.first_order_gradient import OffsetGradient

        gradient = OffsetGradient(overlay_of(model))
        return lambda: gradient.measure(model, batch)
    if way == "full":
        model.requires_grad_(True)
        return _backprop(model, model, batch)
    return _backprop(model, _with_lora(model, int(way.removeprefix("lora-"))), batch)


def _with_lora(model: PreTrainedModel, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )
    model.enable_input_require_grads()  # type: ignore[no-untyped-call]
    return tuned


def _backprop(model: PreTrainedModel, tuned: Any, batch: Batch) -> Callable[[], object]:
    """A step of AdamW on what needs a gradient, with transformers' checkpointing of layers."""
    import torch

    from edge_client.loss import token_losses

    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    model.train()
    chosen = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=1e-6)

    def step() -> None:
        token_losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
        chosen.step()
        chosen.zero_grad(set_to_none=True)

    return step


def measured(source: str, way: Way) -> Cost:
    """Load `source` and work, in this process, which should have done nothing else before."""
    import torch

    from edge_client.kernels import choose
    from edge_client.model import load_model

    torch.set_num_threads(1)
    if way == "kseed":
        choose("cpu")
    elif way.startswith("lora"):
        import peft  # noqa: F401
    imports_mb = status_mb("VmRSS")
    model = load_model(source, "bf16").model
    work = work_of(way, model, batch_of(int(model.config.vocab_size)))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes what is held now
    work()  # compiles, allocates
    begun = time.process_time()
    for _ in range(_STEPS):
        work()
    return Cost(imports_mb, status_mb("VmHWM"), (time.process_time() - begun) / _STEPS)


def _main(source: str, way: Way) -> None:
    cost = measured(source, way)
    print(json.dumps({"cost": [cost.imports_mb, cost.peak_mb, cost.cpu_s]}))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])  # type: ignore[arg-type]
