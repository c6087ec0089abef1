"""`kseed bench learning`: what a run learns from the same number of forward passes, against plain ZO-SGD.

The baseline is MeZO's and FedKSeed's rule on all weights, `a[k] -= lr * g`, with each rate of a small grid; the best
counts. kseed's recipe has a normalised step that is steered by held-out loss: for data with labels the preset `upper`
on the upper third of the layers (`edge_client.scopes`), for text the default preset on all weights. Both are run
configurations, learn from the same examples by the same code (`tools.bench_learning_fleet`), and are judged on
examples that no device has. A forward pass is that of one batch; those of held-out evaluations count too. With labels,
the recipe runs again with its numbers in 32 and 8 bits on the wire, and fleets: what 1 and 4 devices reach in a round,
averaged and added up.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import msgspec

from aggregator.config import RunConfig, ServerScale, UpperRunConfig
from edge_client.scopes import Scope
from shared.messages import NumberFormat
from tools.bench import Asked, BenchResult, Measured, load, machine
from tools.bench_step import in_process, model_of

STEPS = 20  # local steps of a round
FLEET_STEPS = 8
PLAIN_RATES = (1e-5, 3e-5, 1e-4)  # FedKSeed's own is 3e-7, MeZO's 1e-7 to 1e-5, for larger models
RECIPE = "recipe"
FORMATS: tuple[NumberFormat, ...] = ("f32", "f8")  # besides the f16 of the recipe, of scalars and of changes
GOAL = "<= 0.33"


@dataclass(frozen=True)
class Arm:
    """One way of learning."""

    name: str
    config: RunConfig
    scope: Scope = "all"
    devices: int = 1
    rounds: int | None = None  # None: as many as the forwards pay for


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    seeds: int
    forwards: float  # of each run
    every: float  # forwards between two points of a curve
    judged: int  # examples
    held_out: int  # examples, of each device
    rates: tuple[float, ...]
    fleets: tuple[int, ...]
    fleet_rounds: int
    has_formats: bool  # the recipe with longer and shorter numbers as well


FULL = Sizes(
    3,
    forwards=300,
    every=50,
    judged=60,
    held_out=24,
    rates=PLAIN_RATES,
    fleets=(1, 4),
    fleet_rounds=6,
    has_formats=True,
)
QUICK = Sizes(
    1, forwards=20, every=10, judged=16, held_out=8, rates=(3e-5,), fleets=(), fleet_rounds=0, has_formats=False
)


@dataclass(frozen=True)
class Curve:
    """What one arm reached with one seed: points of (forwards, loss, accuracy)."""

    arm: str
    seed: int
    points: tuple[tuple[float, float, float | None], ...]

    @property
    def loss(self) -> float:
        """At the end, nats per token."""
        return self.points[-1][1]

    def forwards_to(self, loss: float) -> float:
        """Forwards until `loss` was reached, between points by a straight line; infinite where it never was."""
        for (start, above, _), (end, below, _) in pairwise(self.points):
            if below <= loss:
                return start + (end - start) * min(1.0, max(0.0, (above - loss) / max(above - below, 1e-12)))
        return float("inf")


def arms(sizes: Sizes, *, has_labels: bool = True) -> list[Arm]:
    """All that is compared at equal forwards: plain ZO-SGD at each rate, then the recipe for such data."""
    plain = [
        Arm(f"plain, lr {rate:g}", RunConfig(local_steps=STEPS, step="plain", lr=rate, eps=1e-3, evaluate_every=0))
        for rate in sizes.rates
    ]
    if not has_labels:
        return [*plain, Arm(RECIPE, RunConfig(local_steps=STEPS))]
    recipe = UpperRunConfig()
    other = [
        Arm(recipe_in(form), msgspec.structs.replace(recipe, scalar_format=form, change_format=form), "upper")
        for form in (FORMATS if sizes.has_formats else ())
    ]
    return [*plain, Arm(RECIPE, recipe, "upper"), *other]


def recipe_in(form: NumberFormat) -> str:
    """The name of the recipe's arm with all its numbers in `form`."""
    return f"{RECIPE} in {form}"


def fleets(sizes: Sizes) -> list[Arm]:
    """The same work per device and round for fleets of several sizes, averaged and added up."""
    found = []
    for devices in sizes.fleets:
        scales: tuple[ServerScale, ...] = ("mean", "sqrt", "sum") if devices > 1 else ("sum",)
        for scale in scales:
            config = UpperRunConfig(local_steps=FLEET_STEPS, server_scale=scale, batch_size=4)
            found.append(Arm(f"{devices} devices, {scale}", config, "upper", devices, sizes.fleet_rounds))
    return found


def bench_learning(asked: Asked) -> BenchResult:
    """See the module; writes learning.jsonl and learning.png to the folder."""
    from tools.bench_learning_plot import plot_curves

    source, data = model_of(asked), "" if asked.data is None else str(asked.data)
    facts = in_process("tools.bench_learning", source, data, "quick" if asked.quick else "full")
    curves = [Curve(str(one[0]), int(one[1]), tuple(map(tuple, one[2]))) for one in facts["curves"]]
    lines = "".join(json.dumps(asdict(curve)) + "\n" for curve in curves)
    (asked.folder / "learning.jsonl").write_text(lines, encoding="utf-8")
    plot_curves(asked.folder / "learning.png", curves)
    return BenchResult("learning", tuple(rows_of(curves)), machine(), load())


def rows_of(curves: Sequence[Curve]) -> Iterator[Measured]:
    """The loss of each arm, accuracies, and the forwards that the recipe needs for what the best plain rate reached."""
    by_arm: dict[str, list[Curve]] = {}
    for curve in curves:
        by_arm.setdefault(curve.arm, []).append(curve)
    for name, found in by_arm.items():
        forwards = statistics.median(curve.points[-1][0] for curve in found)
        start = statistics.median(curve.points[0][1] for curve in found)
        baseline = f"untuned: {start:.3f}"
        yield Measured(f"{name}: loss at {forwards:.0f} forwards", "nats", tuple(c.loss for c in found), "", baseline)
        accuracies = tuple(accuracy for curve in found if (accuracy := curve.points[-1][2]) is not None)
        if accuracies:
            yield Measured(f"{name}: accuracy then", "", accuracies)
    plain = {name: found for name, found in by_arm.items() if name.startswith("plain")}
    best = min(plain, key=lambda name: statistics.median(curve.loss for curve in plain[name]))
    pairs = zip(by_arm[RECIPE], plain[best], strict=True)
    parts = tuple(ours.forwards_to(theirs.loss) / theirs.points[-1][0] for ours, theirs in pairs)
    yield Measured("forwards of the recipe to the loss of the best plain, / its own", "x", parts, GOAL, f"{best}")
    for form in FORMATS:
        if (name := recipe_in(form)) in by_arm:
            pairs = zip(by_arm[name], by_arm[RECIPE], strict=True)
            more = tuple(other.loss - usual.loss for other, usual in pairs)
            yield Measured(f"{name}: loss at the end above that in f16", "nats", more, "", "same seed in f16")


def _main(source: str, data: str, how: str) -> None:
    from edge_client.threads import sleep_while_waiting

    sleep_while_waiting()  # as agents do
    from tools.bench_learning_data import LearningBench

    sizes, path = QUICK if how == "quick" else FULL, Path(data) if data else None
    has_labels = bool(LearningBench(source, path, "all", 1, 1).bench.task.answers)
    compared = arms(sizes, has_labels=has_labels)
    found = []
    for seed in range(1, sizes.seeds + 1):
        for arm in [*compared, *(fleets(sizes) if has_labels and seed == 1 else [])]:
            bench = LearningBench(source, path, arm.scope, seed, sizes.judged)
            points = bench.curve(arm.config, arm.devices, sizes.held_out, arm.rounds, sizes.forwards, sizes.every)
            print(f"{arm.name}, seed {seed}: loss {points[-1][1]:.3f}", file=sys.stderr, flush=True)
            found.append([arm.name, seed, points])
    print(json.dumps({"curves": found}))


if __name__ == "__main__":
    _main(*sys.argv[1:4])
