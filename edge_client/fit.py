"""What fits into memory: how much a step needs in each form of the model, against what is free, with the arithmetic.

Everything is in bytes until it is said. The estimate counts the weights, the slice of them that is in use, the
activations of one layer, the logits and their loss, and a constant for what no model's size explains. It is checked
against measured peaks in the tests and by `kseed bench memory`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edge_client.checkpoint import Stored, stored_tensors
from edge_client.watching.memory import available_memory
from edge_client.watching.reading import MB
from shared.errors import UserError
from shared.messages import WeightDtype

Form = Literal["loaded", "streamed"]
Packing = Literal["unpacked", "8bit", "4bit"]
MOST_AT_ONCE = 64  # sequences; more are not faster
# Model code, tokenizer and compiled kernels, beyond what the process holds before it loads the model; on a CPU
# (torch 2.13, transformers 5.23, numba 0.68: 180 to 260 MB).
FIXED = 250 * MB
SLICE = 1 << 21  # weights in use at a time (edge_client.placeholders)
LOGITS = 1 << 22  # turned to float32 at a time, twice (edge_client.loss)
ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
_PACKED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # bytes of a weight with its share of the scales


@dataclass(frozen=True)
class Size:
    """A model, from its configuration and the headers of its files."""

    weights: int
    matrices: int  # of the weights, those in linear layers inside the model: what packing packs
    hidden: int
    wide: int  # of the middle of a layer
    vocabulary: int
    is_packed: bool  # the checkpoint itself
    stored_bytes: int
    can_stream: bool
    layers: int = 0


@dataclass(frozen=True)
class Work:
    """What goes through the model together: sequences, tokens of each, and how many of these have a label."""

    at_once: int
    length: int
    labelled: int


@dataclass(frozen=True)
class Need:
    """Bytes of a step, part by part."""

    weights: float
    in_use: float
    activations: float
    logits: float
    rest: float
    numbers: float = 0.0  # K of them, and more as long

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.in_use + self.activations + self.logits + self.numbers + self.rest

    def __str__(self) -> str:
        """The sum, in MB."""
        parts = [("weights", self.weights), ("weights in use", self.in_use), ("activations", self.activations),
                 ("logits and loss", self.logits), ("coefficients", self.numbers),
                 ("code and the rest", self.rest)]  # fmt: skip
        said = " + ".join(f"{part / MB:.0f} {name}" for name, part in parts if part >= MB / 2)
        return f"{said} = {self.total / MB:.0f} MB"


@dataclass(frozen=True)
class Fit:
    """A form of the model that fits, how many sequences go through it together, and why."""

    form: Form
    dtype: WeightDtype
    packing: Packing
    at_once: int
    why: str


def need(size: Size, form: Form, dtype: WeightDtype, packing: Packing, work: Work) -> Need:
    """What a step takes beyond the memory of a process that has not loaded the model."""
    item = ITEM[dtype]
    weights: float = 0
    if form == "loaded" and size.is_packed:
        weights = size.stored_bytes
    elif form == "loaded":
        packed = size.matrices if packing != "unpacked" else 0
        weights = packed * _PACKED.get(packing, 0) + (size.weights - packed) * item
    both = 2 if form == "streamed" else 1  # probes that run together
    tokens = work.at_once * work.length
    layer = tokens * item * (6 * size.hidden + 3 * size.wide) + work.at_once * work.length**2 * 4
    logits = work.at_once * work.labelled * size.vocabulary
    loss = 2 * 4 * min(logits, LOGITS)
    return Need(weights, both * 2 * SLICE * item, both * layer, both * logits * item + loss, FIXED)


def fitting(
    size: Size, free: float, source: str, dtype: WeightDtype, packing: Packing, work: Work, forms: tuple[Form, ...]
) -> Fit:
    """The first of `forms` in which at least one sequence fits into `free` bytes, with as many as fit.

    `source`: where that number comes from. Raises UserError with the arithmetic where none does.
    """
    refused = []
    for form in forms:
        if form == "streamed" and not size.can_stream:
            refused.append("streamed: the checkpoint has no plain safetensors files")
            continue
        at_once = work.at_once
        while at_once > 1 and need(size, form, dtype, packing, replace(work, at_once=at_once)).total > free:
            at_once //= 2
        found = need(size, form, dtype, packing, replace(work, at_once=at_once))
        if found.total <= free:
            held = form if packing == "unpacked" or form == "streamed" else f"{form}, {packing}"
            sequences = f"{at_once} sequence{'s' if at_once > 1 else ''} of {work.length} tokens at once"
            why = f"{held} in {dtype}, {sequences}: {found}; {free / MB:.0f} MB are free ({source})"
            return Fit(form, dtype, packing, at_once, "; ".join([*refused, why]))
        refused.append(f"{form}: {found}")
    raise UserError(
        f"the model does not fit: {'; '.join(refused)} with one sequence of {work.length} tokens; "
        f"{free / MB:.0f} MB are free ({source}). Free some memory, lower max_length, take a smaller model, "
        "or try it all the same with form = loaded."
    )


def proposal(size: Size, free: float, source: str, work: Work) -> Fit:
    """What the creator of a run may ask of devices with `free` bytes: the most exact weights that fit.

    bf16 first, then packed, then streamed: packing changes the base that all devices stand on, streaming is slow.
    Raises UserError with the arithmetic where nothing fits.
    """
    tried: list[str] = []
    ways: tuple[tuple[Packing, Form], ...] = (
        ("unpacked", "loaded"), ("8bit", "loaded"), ("4bit", "loaded"), ("unpacked", "streamed"),
    )  # fmt: skip
    for packing, form in ways[:1] + ways[3:] if size.is_packed else ways:
        try:
            return fitting(size, free, source, "bf16", packing, work, (form,))
        except UserError:
            found = need(size, form, "bf16", packing, replace(work, at_once=1))
            tried.append(f"{form} {packing}: {found}")
    raise UserError(
        f"no form of the model fits into {free / MB:.0f} MB ({source}): {'; '.join(tried)}. "
        "Take a smaller model, or a shorter max_length."
    )


def fit_of(source: str, dtype: WeightDtype, device: str, *, load_in: str, max_length: int) -> Fit | None:
    """The form in which the model at `source` fits on this machine now; None where its size is unknown.

    load_in: as under [model]. Raises UserError with the arithmetic where no form fits.
    """
    size = size_of(folder_of(source))
    if size is None:
        return None
    packing: Packing = "4bit" if load_in == "4bit" else "8bit" if load_in == "8bit" else "unpacked"
    forms: tuple[Form, ...] = ("loaded", "streamed") if packing == "unpacked" and not size.is_packed else ("loaded",)
    free, where = free_on(device)
    return fitting(size, free, where, dtype, packing, Work(MOST_AT_ONCE, max_length, max_length // 2), forms)


def folder_of(source: str) -> Path:
    """The folder of a model: the one given, or that of a hub's model in the cache; nothing is fetched."""
    if Path(source).expanduser().is_dir() or source.count("/") != 1:
        return Path(source).expanduser()
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent if isinstance(found, str) else Path(source)


def size_of(folder: Path) -> Size | None:
    """The size of the checkpoint in `folder`, or None where its files do not say (GGUF, pickled weights)."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = stored_tensors(folder)
    except (OSError, ValueError, UserError):
        return None
    config = {**config, **(config.get("text_config") or {})}
    matrices = [tensor for name, tensor in stored.items() if _is_inner(name, tensor)]
    is_packed = bool(config.get("quantization_config"))
    return replace(
        shape_of(config),
        weights=sum(tensor.elements for tensor in stored.values()),
        matrices=sum(tensor.elements for tensor in matrices),
        is_packed=is_packed,
        stored_bytes=sum(tensor.stored_bytes for tensor in stored.values()),
        can_stream=not is_packed,
    )


def shape_of(config: Mapping[str, Any]) -> Size:
    """What a configuration alone tells of a model; its weights count as none."""
    config = {**config, **(config.get("text_config") or {})}
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    return Size(
        weights=0,
        matrices=0,
        hidden=hidden,
        wide=_first(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden,
        vocabulary=_first(config, "vocab_size"),
        is_packed=False,
        stored_bytes=0,
        can_stream=False,
        layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
    )


def free_on(device: str) -> tuple[float, str]:
    """Bytes that this process can still take where the model will run, and where that is known from."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return float(free), f"GPU {device}"
    found = available_memory(Path("/sys"), Path("/proc"))
    free_bytes, source = (found.value or 0.0) * MB, found.source
    left = _left_under_cap()
    return (left, "the cap on what this process may allocate") if left < free_bytes else (free_bytes, source)


def _left_under_cap() -> float:
    if sys.platform != "linux":
        return float("inf")
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        return float("inf")
    pages = _number_at(Path("/proc/self/statm"), 5)
    return max(0.0, soft - pages * resource.getpagesize())


def _number_at(file: Path, column: int) -> float:
    try:
        return float(file.read_text(encoding="ascii").split()[column])
    except (OSError, IndexError, ValueError):
        return 0.0


def _is_inner(name: str, tensor: Stored) -> bool:
    """A matrix of a layer: embeddings and head stay as they are when a model is packed."""
    return len(tensor.shape) == 2 and any(part.isdecimal() for part in name.split("."))


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)
