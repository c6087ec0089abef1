"""Models whose linear layers stay packed, as bitsandbytes quantises them (`shared.packed` says what they stand for).

bitsandbytes quantises, and reads checkpoints that were quantised before. What it made is taken out of its modules
before any of them has run: on some processors the first forward pass packs the weights anew, in another order. From
then on the model is one of plain linear layers whose weights stand behind placeholders, computed by kseed's kernels. So
a forward pass multiplies with unpacked weights in the run's dtype; LLM.int8's own product of integers is not used.

Where bitsandbytes does not work, a checkpoint that was quantised before is read without it and unpacked.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edge_client.bases import BareWeights, PackedBase, Scratch
from edge_client.kernels import Kernel, Packed
from edge_client.kernels.torch_any import TorchKernel
from edge_client.placeholders import Placeholder
from shared.errors import UserError

Width = Literal["4bit", "8bit"]
_LAYERS: dict[str, Width] = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}
_HALVES = ".quant_state.bitsandbytes__"  # in the name of a 4-bit weight's description


def width_of(config: Any) -> Width | None:
    """How a checkpoint with this configuration of transformers is packed; None if it is not.

    Raises UserError for a packing other than that of bitsandbytes.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    stated = found if isinstance(found, dict) else found.to_dict()
    if stated.get("load_in_4bit"):
        return "4bit"
    if stated.get("load_in_8bit"):
        return "8bit"
    raise UserError(
        f"the model is packed by {stated.get('quant_method')!r}; kseed reads what bitsandbytes packs (4bit, 8bit). "
        "Give the model as it was before, or one that `kseed quantise` wrote."
    )


def why_not(device: torch.device) -> str | None:
    """Why bitsandbytes cannot be used on `device`; None if it can. Its kernels are tried: an import says little."""
    try:
        functional = import_bitsandbytes()
        values = torch.linspace(-1, 1, 256, device=device, dtype=torch.bfloat16).view(2, 128)
        codes, state = functional.quantize_4bit(values, quant_type="nf4")
        halves = functional.dequantize_4bit(codes, state)
        rows, scales, _ = functional.int8_vectorwise_quant(values.to(torch.float16))
        whole = functional.int8_vectorwise_dequant(rows, scales)
        far = max(float((halves - values).abs().max()), float((whole.to(values.dtype) - values).abs().max()))
    except Exception as error:  # not installed, no kernel for this machine, a driver too old
        return " ".join(str(error).split()) or type(error).__name__
    return None if far < 0.2 else f"its kernels lose {far:.2g} of numbers up to 1"


def import_bitsandbytes() -> Any:
    """`bitsandbytes.functional`, without a word to a hub. Raises whatever its import raises."""
    with _without_the_hub():
        import bitsandbytes.functional as functional
    return functional


@contextmanager
def _without_the_hub() -> Iterator[None]:
    """bitsandbytes asks a hub for a kernel when it is imported on some processors; ours are used in its place."""
    name = "kernels"
    before = sys.modules.get(name)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def quantising(width: Width, dtype: torch.dtype, kind: str = "nf4") -> Any:
    """What transformers needs to quantise while it loads: `kind` nf4 or fp4 for 4 bit, scales not quantised again."""
    import transformers

    configuration: Any = transformers.BitsAndBytesConfig
    if width == "8bit":
        return configuration(load_in_8bit=True)
    return configuration(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)


def keep_packed(model: nn.Module, dtype: torch.dtype, device: torch.device, kernel: Kernel) -> int:
    """Put a linear layer over a packed base in the place of each of bitsandbytes' layers; returns how many.

    The model must not have run. Raises UserError, naming the layer, where one cannot be tuned.
    """
    scratch = Scratch(dtype, device)
    standing: dict[int, Placeholder] = {}  # tied weights once
    layers = layers_of(model)
    for name, layer in layers.items():
        if id(layer.weight) not in standing:
            shape = torch.Size((layer.out_features, layer.in_features))
            packed = checked(name, _taken(layer), shape.numel())
            base = PackedBase(packed, shape.numel(), dtype, kernel)
            weights = BareWeights(f"{name}.weight", base, scratch)
            standing[id(layer.weight)] = Placeholder(weights, 0, shape, dtype, device)
        _replace(model, name, _linear(layer, standing[id(layer.weight)]))
    forget_packing(model)
    return len(layers)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The layers that bitsandbytes packed, by name. Raises UserError where there are none, or one cannot be tuned."""
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if type(module).__name__ in _LAYERS
    }
    if not layers:
        raise UserError("no layer of this model can be packed. Load it without --load-in.")
    for name, layer in layers.items():
        _check_orientation(name, getattr(layer, "source_cls", nn.Linear))
    return layers


def forget_packing(model: Any) -> None:
    """Let transformers take `model` for one that was never quantised, so that it can be saved as such."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method"),
                        (model, "is_loaded_in_4bit"), (model, "is_loaded_in_8bit")):  # fmt: skip
        if name in vars(owner):
            delattr(owner, name)
    if "is_quantized" in vars(model):
        model.is_quantized = False
    if getattr(model, "_weight_conversions", None):  # transformers 5: how names and weights came from the checkpoint's
        for conversion in model._weight_conversions:
            conversion.quantization_operation = None
        model._weight_conversions = [each for each in model._weight_conversions if not _is_of_bitsandbytes(each)]


def _is_of_bitsandbytes(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(type(operation).__module__.endswith(".bitsandbytes") for operation in operations)


def unpacked(stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a checkpoint that bitsandbytes packed, unpacked; what was not packed stays as it is.

    stored: tensors by their names in the checkpoint. Raises UserError where one does not make sense.
    """
    found = {}
    belonging = set()
    for name, tensor in stored.items():
        described = next((other for other in stored if other.startswith(f"{name}{_HALVES}")), None)
        rows = f"{name.removesuffix('weight')}SCB"
        if described is not None:
            packed, shape = _described(stored, name, json.loads(bytes(stored[described].tolist())))
            belonging |= {other for other in stored if other.startswith(f"{name}.")}
        elif name.endswith("weight") and rows in stored:
            packed, shape = (
                Packed(tensor.reshape(-1), stored[rows].reshape(-1).float(), tensor.shape[-1], None),
                tensor.shape,
            )
            belonging |= {rows, f"{name}_format"}
        else:
            found[name] = tensor
            continue
        weights = torch.empty(1, shape.numel(), dtype=dtype)
        TorchKernel().unpack(checked(name, packed, shape.numel()), torch.zeros(1, dtype=torch.int64), weights)
        found[name] = weights.view(shape)
    return {name: tensor for name, tensor in found.items() if name not in belonging}


def refuse_transposed(model: nn.Module) -> None:
    """Raise UserError where packing has turned the weights of a layer round, as it does GPT-2's."""
    for name, module in model.named_modules():
        _check_orientation(name, type(module))


def checked(name: str, packed: Packed, elements: int) -> Packed:
    """`packed`, if it holds `elements` weights: kernels read past its end otherwise. Raises UserError."""
    codes = elements if packed.table is None else (elements + 1) // 2
    kind = torch.int8 if packed.table is None else torch.uint8
    is_right = packed.codes.dtype == kind and packed.codes.shape == (codes,) and packed.codes.is_contiguous()
    is_right &= packed.block > 0 and packed.scales.shape == (-(-elements // max(1, packed.block)),)
    is_right &= packed.table is None or packed.table.shape == (16,)
    if not is_right:
        raise UserError(
            f"{name!r} is packed in {packed.codes.numel()} codes of {packed.codes.dtype} and {packed.scales.numel()} "
            f"scales for blocks of {packed.block}; {elements} weights need others. Quantise the model again."
        )
    return packed


def _taken(layer: Any) -> Packed:
    """What bitsandbytes holds for a layer that has not run."""
    weight = layer.weight
    if _LAYERS[type(layer).__name__] == "8bit":
        rows, scales = weight.CB if weight.CB is not None else weight.data, weight.SCB
        if rows is None or scales is None:
            raise UserError("a layer in 8 bit has no scales; it was loaded in part or has run. Load the model again.")
        return Packed(rows.reshape(-1).contiguous(), scales.reshape(-1).float(), layer.in_features, None)
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        twice = (state.state2.absmax, state.state2.code, state.state2.blocksize, state.offset)
        scales = _single(scales, *twice)
    codes = weight.data.contiguous().view(torch.uint8).reshape(-1)
    return Packed(codes, scales.reshape(-1).float(), int(state.blocksize), state.code.reshape(-1).float())


def _described(stored: Mapping[str, Tensor], name: str, facts: Mapping[str, Any]) -> tuple[Packed, torch.Size]:
    """A 4-bit weight of a checkpoint, and its shape."""
    scales = stored[f"{name}.absmax"]
    if "nested_offset" in facts:
        twice = stored[f"{name}.nested_absmax"], stored[f"{name}.nested_quant_map"]
        scales = _single(scales, *twice, int(facts["nested_blocksize"]), torch.tensor(float(facts["nested_offset"])))
    codes = stored[name].contiguous().view(torch.uint8).reshape(-1)
    table = stored[f"{name}.quant_map"].reshape(-1).float()
    return Packed(codes, scales.reshape(-1).float(), int(facts["blocksize"]), table), torch.Size(facts["shape"])


def _single(coded: Tensor, scales: Tensor, table: Tensor, block: int, offset: Tensor) -> Tensor:
    """Scales that were quantised themselves: float32 (n,)."""
    numbers = torch.arange(coded.numel(), device=coded.device)
    products = torch.mul(table[coded.reshape(-1).to(torch.int64)], scales[numbers // block])
    return torch.add(products, offset)


def _linear(layer: Any, weight: Placeholder) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    made._parameters["weight"] = weight  # type: ignore[assignment]
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return made


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _check_orientation(name: str, kind: type) -> None:
    if kind.__name__ == "Conv1D":
        raise UserError(
            f"{name!r} is a Conv1D, whose weights bitsandbytes turns round, so a packed model would not be the one "
            "that others tune. Load this model without --load-in."
        )
