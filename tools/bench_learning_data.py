"""What `kseed bench learning` learns from: the demo's remarks, or a file; and the model under an overlay for it."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from aggregator.config import RunConfig
from edge_client.data.batches import Tokens
from edge_client.data.settings import DataConfig
from edge_client.data.sources import read_records
from edge_client.data.task import Task, load_task
from edge_client.model import LoadedModel, load_model
from edge_client.overlay import Overlay
from edge_client.scopes import Scope, names_in
from edge_client.tuned import select
from tools.bench_learning_fleet import Bench, dealt, learn

DEMO = Path(__file__).parent / "demo_data"
DEMO_TRAIN = ("cafes", "gadgets", "travel")
PROMPT = "{text} It was"  # MeZO's for sentiment; the model meets the words and must learn which of them to say
WORDS = {"positive": " great", "negative": " terrible"}
LONGEST = 64  # tokens: longer examples are left out, which keeps a forward pass short
SHUFFLE = 7  # the same examples are judged by whatever the seed is


class LearningBench:
    """A model, an overlay of its own pool of directions for each seed, and examples on three sides."""

    def __init__(self, source: str, data: Path | None, scope: Scope, seed: int, judged: int) -> None:
        """`data`: a file as an agent takes it, of which a tenth is judged by; None: the demo's.

        Raises UserError where model or data cannot be used.
        """
        loaded = load_model(source, "bf16")
        task = task_of(loaded, data)
        only = names_in(scope, [tensor.name for tensor in select(loaded.model).manifest.tensors])
        overlay = Overlay(loaded.model, pool_key=seed, seeds=RunConfig().seeds, directions="hadamard", only=only)
        self.rows = _short(task.train)
        self._seed = seed
        self.bench = Bench(loaded, overlay, task, tuple(_short(task.held_out)[:judged]))

    def curve(
        self, config: RunConfig, devices: int, held_out: int, rounds: int | None, forwards: float, every: float
    ) -> list[tuple[float, float, float | None]]:
        """(forwards, loss, accuracy) at the start, about each `every` forwards, at the end.

        rounds: after so many the run ends, whatever they cost, and each gives a point.
        """
        fleet = dealt(self.rows, held_out, devices, None)
        if rounds is not None:
            forwards, every = float("inf"), 0.0
        config = _of(config, devices, rounds)
        points = learn(self.bench, config, fleet, self._seed, forwards, every)
        return [(point.forwards, point.loss, point.accuracy) for point in points]


def _of(config: RunConfig, devices: int, rounds: int | None) -> RunConfig:
    import msgspec

    many = 1 << 20  # the forwards end it
    return msgspec.structs.replace(config, quorum=devices, min_updates=devices, rounds=rounds or many)


def task_of(loaded: LoadedModel, data: Path | None) -> Task:
    """The task of a file, or the demo's: 240 short remarks to learn from, 60 to judge by."""
    if data is not None:
        first = next(iter(read_records(str(data))))
        is_mood = str(first.fields.get("label", "")).strip() in WORDS
        more = {"template": PROMPT, "verbalizers": WORDS} if is_mood else {}
        return load_task(DataConfig(source=str(data), **more), loaded.tokenizer)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        together = Path(folder) / "train.jsonl"
        together.write_text("".join((DEMO / f"{name}.jsonl").read_text("utf-8") for name in DEMO_TRAIN), "utf-8")
        config = DataConfig(
            source=str(together), held_out_source=str(DEMO / "test.jsonl"), template=PROMPT, verbalizers=WORDS
        )
        return load_task(config, loaded.tokenizer)


def _short(rows: tuple[Tokens, ...]) -> list[Tokens]:
    """Those of `rows` that are not too long, in a random order that is always the same."""
    found = [row for row in rows if len(row) <= LONGEST] or sorted(rows, key=len)[: max(1, len(rows) // 2)]
    random.Random(SHUFFLE).shuffle(found)
    return found
