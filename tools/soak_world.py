"""What a soak tunes: a language model so small that a step takes milliseconds, a tokenizer and data, made in code."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path

from tools.manifest import write_manifest
from tools.out_folder import RunFolder
from tools.processes import flags, script

RUN = "soak"
AGENTS = ("ash", "birch", "cedar")
SEEDS = 256
LOCAL_STEPS, GROUP = 8, 4
_SIZE = 16
_LENGTH = 64
_EXAMPLES = 40


class World(RunFolder):
    """Where a soak keeps what."""

    @property
    def model(self) -> Path:
        """The base model and its tokenizer."""
        return self.out / "model"

    def data(self, agent: str) -> Path:
        """An agent's examples."""
        return self.out / f"{agent}-data.jsonl"

    def metrics(self, name: str) -> Path:
        """A process's metrics: they go on where an earlier process stopped."""
        return self.out / f"{name}-metrics.jsonl"

    def logs(self, name: str) -> list[Path]:
        """The logs of all processes of a name, first to last."""
        return sorted(self.out.glob(f"{name}-log-*.txt"))

    def log(self, name: str, number: int) -> Path:
        """The log of the process of a name that was started as the `number`th."""
        return self.out / f"{name}-log-{number:05d}.txt"


def make_world(world: World, seed: int) -> None:
    """Write model, tokenizer, base file and data. The same seed makes the same files."""
    _write_model(world.model, seed)
    write_manifest(str(world.model), "fp32", world.base, name="soak")
    source = random.Random(f"kseed soak data {seed}")
    for agent in AGENTS:
        lines = [json.dumps(_example(source)) for _ in range(_EXAMPLES)]
        world.data(agent).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _example(source: random.Random) -> dict[str, str]:
    word = "".join(source.choices(string.ascii_lowercase[:8], k=4))
    return {"text": word, "label": word[::-1]}


def _write_model(folder: Path, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [character for character in string.printable if character not in "\r\x0b\x0c"]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=_SIZE,
        intermediate_size=2 * _SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=_LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.detach().mean()), std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def create_command(
    world: World,
    seed: int,
    *,
    rounds: int = 1_000_000_000,
    deadline: int = 5,
    local_steps: int = LOCAL_STEPS,
    one_sided: int = 0,
    quorum: int = 2,
) -> list[str]:
    """The command line that creates the run: it ends when it is stopped; late updates are refused or folded in.

    deadline: of a round, seconds. one_sided: the size of groups that are measured on one side; 0: both sides.
    """
    return _command(
        ["kseed-aggregator", "create", RUN],
        {
            "base": world.base,
            "store": world.store,
            "seeds": SEEDS,
            "rounds": rounds,
            "local-steps": local_steps,
            "one-sided": one_sided,
            "batch-size": 4,
            "quorum": quorum,
            "deadline": deadline,
            "late": "fold" if seed % 2 else "refuse",
            "scalar-format": "f16",
            "change-format": "f8",
        },
    )


def serve_command(world: World, broker: str) -> list[str]:
    """The command line of the aggregator. broker: host:port."""
    options = {"broker": broker, "store": world.store, "metrics": world.metrics("aggregator")}
    return _command(["kseed-aggregator", "serve", RUN], {**options, "wait": 3600})


def stop_command(world: World) -> list[str]:
    """The command line that ends the run."""
    return _command(["kseed-aggregator", "stop", RUN], {"store": world.store})


def join_command(
    world: World, agent: str, broker: str, manners: Sequence[str] = ("--no-gate", "--nice", "0")
) -> list[str]:
    """The command line of an agent. broker: host:port."""
    options = {
        "device": agent,
        "broker": broker,
        "model": world.model,
        "data": world.data(agent),
        "held-out": 0.2,
        "threads": 1,
        "kernel": "torch",  # numba compiles for seconds, and these processes do not live for long
        "metrics": world.metrics(agent),
    }
    return _command(["kseed-edge", "join", RUN, "--wait", *manners], options)


def _command(start: list[str], options: dict[str, object]) -> list[str]:
    name, *words = start
    return [*script(name), *words, *flags(options)]
