"""Checkpoints of transformers: what they are read with, and errors of reading as errors of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edge_client.shortage import is_out_of_memory
from shared.errors import UnavailableError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class Source:
    """What from_pretrained is called with."""

    given: str
    name: str
    arguments: dict[str, Any]


def stored(found: Source) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in safetensors, by their names in it."""
    from safetensors.torch import load_file
    from transformers.utils.hub import cached_file

    index = cached_file(
        found.name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **found.arguments
    )
    names = {"model.safetensors"}
    if index is not None:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        tensors |= load_file(str(cached_file(found.name, name, **found.arguments)))
    return tensors


def from_pretrained(found: Source, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    """What transformers makes of `found`, with `more` arguments. Raises UserError where weights are missing."""
    import transformers

    arguments = {dtype_keyword(): dtype, **found.arguments, **more}
    is_gguf = "gguf_file" in found.arguments
    if is_gguf and hasattr(transformers, "GgufConfig"):
        # Where it exists, the default may keep the weights packed, and forbids saving the model in any case.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, report = reading(
        found,
        lambda: transformers.AutoModelForCausalLM.from_pretrained(found.name, output_loading_info=True, **arguments),
    )
    check_whole(found, report)
    if is_gguf and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are unpacked; with it the model could not be saved again
    return model  # type: ignore[no-any-return]


def dtype_keyword() -> str:
    """What from_pretrained calls the dtype, which depends on its version."""
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def check_whole(found: Source, report: Any) -> None:
    """Raise UserError where the loading report of from_pretrained has missing weights."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{found.given!r} lacks the weights {', '.join(missing[:_SHOWN])}"
            f"{f' and {len(missing) - _SHOWN} more' if len(missing) > _SHOWN else ''}, which would start at random. "
            "Give a whole checkpoint of a causal language model."
        )


def reading(found: Source, read: Any, what: str = "model") -> Any:
    """What `read` returns; its errors as ours, whatever they are: parsers of five formats raise all kinds."""
    try:
        return read()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = first_line(error)
        if isinstance(error, OSError) and ("connect" in str(error).lower() or "offline" in str(error).lower()):
            raise UnavailableError(
                f"the model {found.given!r} is not in the local cache and the hub cannot be reached ({text}). "
                "Connect, or give the path of a folder or a .gguf file."
            ) from error
        raise UserError(
            f"the {what} of {found.given!r} cannot be loaded: {text} Check its name and files, "
            "and that the installed transformers is new enough for it."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of its text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
