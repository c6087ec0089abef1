"""Loading a causal language model of transformers by hub id, folder or GGUF file, ready to be tuned.

Works offline: a folder or GGUF file needs no hub, and a hub id is found in the local cache (`HF_HUB_OFFLINE=1` never
asks the hub). Code that a checkpoint brings along is never run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from edge_client import packed
from edge_client.kernels import choose
from edge_client.pretrained import Source, check_whole, dtype_keyword, first_line, from_pretrained, reading, stored
from edge_client.tuned import DTYPES
from shared.errors import UserError
from shared.messages import WeightDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LoadIn = Literal["auto", "4bit", "8bit", "unpacked"]
_GGUF = ".gguf"
_HEADS = ("CausalLM", "LMHead", "ConditionalGeneration")  # in the names of architectures with a head for text


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode without gradients, all its parameters in one dtype on one device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    dtype: WeightDtype
    device: torch.device
    cast: tuple[str, ...]  # parameters that transformers keeps in another dtype and that were cast to `dtype`


# The model on the device, ready to be tuned, and `LoadedModel.cast`.
ReadWeights = Callable[[Source, torch.dtype, torch.device], tuple["PreTrainedModel", tuple[str, ...]]]


def load_model(
    source: str,
    dtype: WeightDtype,
    device: torch.device | str = "cpu",
    read_weights: ReadWeights | None = None,
    *,
    load_in: LoadIn = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> LoadedModel:
    """Load the causal LM and tokenizer at `source`: a hub id, a local folder or a GGUF file.

    All parameters are in `dtype`: one that transformers keeps in float32 is cast as well (`LoadedModel.cast` names it),
    because a tuned tensor has the run's dtype. Buffers keep theirs. A tokenizer without a padding token that the
    model knows takes its end of text, or its unknown token, for one; padding is masked wherever it matters.
    read_weights: another way to get at the weights than to load them (`edge_client.streamed`).
    load_in: 4bit and 8bit pack the linear layers, or expect them to be packed; unpacked unpacks what is packed; auto
    leaves it as the checkpoint has it, where bitsandbytes works, else unpacks it. `say` is told what was done, and why.
    Raises UserError where there is no such model or it is none that can be tuned, UnavailableError where the hub cannot
    be reached and the cache does not have it.
    """
    if dtype not in DTYPES:
        raise UserError(f"the dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}. Choose one of them.")
    if load_in not in get_args(LoadIn):
        raise UserError(f"load_in is {load_in!r}; allowed are {', '.join(get_args(LoadIn))}. Choose one of them.")
    where = _device(device)
    found = _locate(source)
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        _check_config(found)
        tokenizer = _load_tokenizer(found)
        model, cast = (read_weights or partial(_load_weights, load_in, say))(found, DTYPES[dtype], where)
        embeddings: Any = model.get_input_embeddings()
        _choose_padding(tokenizer, len(embeddings.weight))
    finally:
        if shows_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return LoadedModel(model, tokenizer, source, dtype, where, cast)


def prepare(model: PreTrainedModel, dtype: torch.dtype) -> tuple[str, ...]:
    """Make `model` ready to be tuned, in place: every parameter in `dtype`, eval mode, no gradients.

    Experts run one after the other, so that only one's weights are needed at a time. Returns the names of the
    parameters that were cast.
    """
    cast = []
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != dtype:
            weight.data = weight.data.to(dtype)
            cast.append(name)
    model.train(False)
    model.requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):  # transformers 5
        model.set_experts_implementation("eager")
    return tuple(cast)


def _device(device: torch.device | str) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"the device {str(device)!r} cannot be used ({first_line(error)}). Choose another one, such as cpu."
        ) from error
    return where


def _locate(source: str) -> Source:
    if not source:
        raise UserError("the model has no name. Give a hub id, a folder or a .gguf file.")
    path = Path(source).expanduser()
    if path.suffix.lower() == _GGUF:
        if not path.is_file():
            raise UserError(f"there is no GGUF file {source!r}. Check the path.")
        return Source(source, str(path.parent), {"gguf_file": path.name, "local_files_only": True})
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"the folder {source!r} has no config.json, so it holds no model of transformers. "
                "Give the folder that save_pretrained wrote, or the path of a .gguf file."
            )
        return Source(source, str(path), {"local_files_only": True})
    if path.exists():
        raise UserError(f"{source!r} is a file; a model is a hub id, a folder or a .gguf file. Give one of these.")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise UserError(f"there is no folder {source!r}. Check the path, or give a hub id such as owner/name.")
    return Source(source, source, {})


def _check_config(found: Source) -> None:
    """Refuse what has no head for text before its weights are read."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = reading(found, lambda: AutoConfig.from_pretrained(found.name, **found.arguments))
    named: list[str] = getattr(config, "architectures", None) or []
    has_head = not named or any(head in name for name in named for head in _HEADS)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not has_head:
        raise UserError(
            f"{found.given!r} is a {', '.join(named) or type(config).__name__}, not a causal language model. "
            "Choose a model that writes text, such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )


def _load_tokenizer(found: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = reading(
        found, lambda: AutoTokenizer.from_pretrained(found.name, **found.arguments), "tokenizer"
    )
    if not len(tokenizer):
        raise UserError(f"the tokenizer of {found.given!r} is empty. Put its files beside the model's.")
    return tokenizer


def _choose_padding(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """See `load_model`. `vocabulary`: how many tokens the model knows; some tokenizers pad with one more."""
    padding = tokenizer.pad_token_id
    if not isinstance(padding, int) or padding >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


def _load_weights(
    load_in: LoadIn, say: Callable[[str], None], found: Source, dtype: torch.dtype, where: torch.device
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    from transformers import AutoConfig

    config = reading(found, lambda: AutoConfig.from_pretrained(found.name, **found.arguments))
    width = packed.width_of(config)
    if width is None and load_in in ("auto", "unpacked"):
        model = from_pretrained(found, dtype)
        return _ready(model, dtype, where)
    if width is not None and load_in in ("4bit", "8bit") and load_in != width:
        raise UserError(f"{found.given!r} is packed in {width} already; it cannot be loaded in {load_in}.")
    if load_in == "unpacked":
        say(f"model: unpacked to {dtype}, as was asked for")
        return _ready(_unpacked(found, config, dtype), dtype, where)
    why_not = packed.why_not(where)
    if why_not is None:
        return _packed(found, width, load_in, dtype, where, say)
    if width is None:
        raise UserError(
            f"bitsandbytes cannot be used on {where} ({why_not}), and {load_in} needs it to quantise. Install a build "
            "for this device, or quantise elsewhere with `kseed quantise`: what it writes is unpacked here."
        )
    say(f"model: {width} unpacked to {dtype}, because bitsandbytes cannot be used on {where}: {why_not}")
    return _ready(_unpacked(found, config, dtype), dtype, where)


def _ready(model: Any, dtype: torch.dtype, where: torch.device) -> tuple[PreTrainedModel, tuple[str, ...]]:
    cast = prepare(model, dtype)
    return model.to(where), cast


def _packed(
    found: Source, width: packed.Width | None, load_in: LoadIn, dtype: torch.dtype, where: torch.device,
    say: Callable[[str], None],
) -> tuple[PreTrainedModel, tuple[str, ...]]:  # fmt: skip
    """A model whose linear layers are packed, in the checkpoint (`width`) or now."""
    if "gguf_file" in found.arguments:
        raise UserError(f"the GGUF file {found.given!r} cannot be packed; give a folder, or leave --load-in out.")
    arguments: dict[str, Any] = {"device_map": {"": where}}
    if width is None and load_in != "auto" and load_in != "unpacked":
        arguments["quantization_config"] = packed.quantising(load_in, dtype)
    model = from_pretrained(found, dtype, **arguments)
    layers = packed.keep_packed(model, dtype, where, choose(where).kernel)
    done = "quantised now, other devices may do it otherwise" if width is None else "as the checkpoint has them"
    say(f"model: {layers} linear layers stay packed in {width or load_in} ({done}), everything else in {dtype}")
    return model, prepare(model, dtype)


def _unpacked(found: Source, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A packed checkpoint without bitsandbytes: its files are read and unpacked here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    weights = reading(found, lambda: packed.unpacked(stored(found), dtype))
    del config.quantization_config
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    arguments = {dtype_keyword(): dtype, "config": config, "state_dict": weights}
    model, report = reading(found, lambda: kind.from_pretrained(None, output_loading_info=True, **arguments))
    check_whole(found, report)
    packed.refuse_transposed(model)
    return model  # type: ignore[no-any-return]
