"""`kseed quantise`: a base that was quantised once, so that all devices of a run stand on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared.errors import UserError
from shared.messages import WeightDtype
from tools.checkpoint import check_free, save_whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from edge_client.pretrained import Source

Width = Literal["4bit", "8bit"]
Kind = Literal["nf4", "fp4"]


def quantise(model: str, output: Path, *, width: Width, kind: Kind, dtype: WeightDtype) -> str:
    """Write `model` with its linear layers packed by bitsandbytes to the new folder `output`; returns what to tell.

    `kind`: of 4 bit. `dtype`: of what is not packed. Plain transformers loads the folder. Raises UserError where
    bitsandbytes cannot be used, or the model cannot be packed or is packed already.
    """
    check_free(output)
    import torch

    from edge_client import packed
    from edge_client.model import load_model

    reason = packed.why_not(torch.device("cpu"))
    if reason is not None:
        raise UserError(
            f"bitsandbytes cannot be used here ({reason}), and only it quantises. Install it, or do it elsewhere."
        )

    def read(found: Source, run_dtype: torch.dtype, where: torch.device) -> tuple[PreTrainedModel, tuple[str, ...]]:
        return packed_by_bitsandbytes(found, run_dtype, where, width, kind), ()

    save_whole(load_model(model, dtype, "cpu", read), output)
    mb = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    what = f"{width} ({kind})" if width == "4bit" else width
    return f"{output}: {model} with its linear layers in {what}, everything else in {dtype}, {mb:.1f} MB"


def packed_by_bitsandbytes(
    found: Source, dtype: torch.dtype, where: torch.device, width: Width, kind: Kind
) -> PreTrainedModel:
    """The model as bitsandbytes and transformers have it, not yet kseed's. Raises UserError where that cannot be."""
    from transformers import AutoConfig

    from edge_client import packed
    from edge_client.pretrained import from_pretrained, reading

    there = packed.width_of(reading(found, lambda: AutoConfig.from_pretrained(found.name, **found.arguments)))
    if there is not None or "gguf_file" in found.arguments:
        how = f"packed in {there} already" if there else "a GGUF file"
        raise UserError(f"{found.given!r} is {how}; give a model of plain weights, a folder or a hub id.")
    configuration = packed.quantising(width, dtype, kind)
    model = from_pretrained(found, dtype, quantization_config=configuration, device_map={"": where})
    packed.layers_of(model)
    return model
