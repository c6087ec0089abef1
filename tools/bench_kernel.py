"""The kernel of one device alone: `python -m tools.bench_kernel cuda` (or cpu), against a copy of the same bytes.

One tensor of 2^26 weights is rebuilt in bf16 from a bf16, an nf4 and an int8 base. The baseline copies the bf16 base to
the same memory, in alternation. On a GPU the goal is 80% of the copy's bandwidth: 1.25 times its time, from bf16.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from edge_client.kernels import PADDING, Packed, choose
from shared.errors import UserError
from tools.bench import BenchResult, Measured, load, machine

WEIGHTS = 1 << 26
POOLS = (4096, 65536)


def bench_kernel(device: str, weights: int = WEIGHTS, runs: int = 11) -> BenchResult:
    """See the module. Raises UserError where torch has no such device."""
    try:
        base = torch.randn(weights, device=device).to(torch.bfloat16)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {device!r} cannot be used ({error}). Choose another one, such as cpu.") from error
    choice = choose(device)
    out = torch.empty(1, weights, dtype=torch.bfloat16, device=device)
    start = torch.zeros(1, dtype=torch.int64, device=device)
    rows = []
    bases: dict[str, torch.Tensor | Packed] = {"bf16": base, **packed_bases(weights, device)}
    for name, kept in bases.items():
        for seeds in POOLS:
            y = 1e-3 * torch.randn(seeds, device=device)
            padded = torch.cat((y, y[:PADDING]))

            def rebuild(kept: torch.Tensor | Packed = kept, padded: torch.Tensor = padded) -> None:
                choice.kernel.add_hadamard(kept, start, out, tensor=3, padded=padded, pool_key=7)

            ratios, copies = compared(rebuild, lambda: out.view(-1).copy_(base), base.device, runs)
            goal = "<= 1.25" if name == "bf16" and base.is_cuda else ""
            baseline = f"copy: {1e3 * sorted(copies)[len(copies) // 2]:.3f} ms"
            rows.append(Measured(f"rebuild from {name} / copy of bf16, K {seeds}", "x", ratios, goal, baseline))
    where = torch.cuda.get_device_name(device) if base.is_cuda else machine()
    return BenchResult("kernel", tuple(rows), f"{where}; kernel {choice.kernel.name} ({choice.reason})", load())


def packed_bases(weights: int, device: str) -> dict[str, Packed]:
    """Random codes and scales."""
    halves = torch.randint(0, 256, (weights // 2,), dtype=torch.uint8, device=device)
    rows = torch.randint(-128, 128, (weights,), dtype=torch.int8, device=device)
    table = torch.linspace(-1, 1, 16, device=device)
    return {
        "nf4": Packed(halves, torch.rand(weights // 64, device=device), 64, table),
        "int8": Packed(rows, torch.rand(weights // 1024, device=device), 1024, None),
    }


def compared(
    ours: Callable[[], object], theirs: Callable[[], object], device: torch.device, runs: int
) -> tuple[tuple[float, ...], list[float]]:
    """Ratios of seconds by the clock, in alternation after a warm-up, and the baseline's seconds."""
    taken: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for run in range(runs + 2):
        for work, seconds in taken.items():
            _wait(device)
            began = time.perf_counter()
            work()
            _wait(device)
            if run >= 2:
                seconds.append(time.perf_counter() - began)
    return tuple(mine / other for mine, other in zip(taken[ours], taken[theirs], strict=True)), taken[theirs]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    print(bench_kernel(sys.argv[1] if sys.argv[1:] else "cpu").table())
