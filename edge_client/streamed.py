"""A model larger than memory: its weights stay in their safetensors files and are read when an operation uses them.

The model is built without weights; in their place stand placeholders over `StreamedBase`. Reads are explicit and go
into the memory that the operation uses anyway, so nothing of the checkpoint is held, whatever limit counts it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edge_client.bases import Add, BareWeights, Scratch
from edge_client.checkpoint import Stored, stored_tensors
from edge_client.model import LoadedModel, load_model, prepare
from edge_client.placeholders import Placeholder
from edge_client.pretrained import Source, reading
from shared.errors import UserError
from shared.messages import WeightDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CHUNK = 1 << 20  # weights turned to another dtype, or sent to another device, at a time
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json"]


class StreamedBase:
    """A base that is read from its file each time it is used; `edge_client.bases.Base`."""

    is_far = True

    def __init__(self, stored: Stored, file: BinaryIO, dtype: torch.dtype, device: torch.device) -> None:
        """`file`: of `stored`, open without a buffer. `dtype`: the run's."""
        self.elements = stored.elements
        self.dtype = dtype
        self.device = device
        self._stored = stored
        self._file = file
        self._kept_as = DTYPES[stored.dtype]

    def fill(self, add: Add, starts: Tensor, out: Tensor) -> None:
        """See Base."""
        self.read(starts, out)
        add(out, starts, out)

    def read(self, starts: Tensor, out: Tensor) -> None:
        """See Base. Raises UserError where the file cannot be read any more, or is not what it was."""
        is_same = self._kept_as == out.dtype and out.is_cpu
        length = out.shape[1]
        for row, begin in zip(out, starts.tolist(), strict=True):
            if is_same:
                self._read_into(begin, row)
                continue
            for at in range(0, length, _CHUNK):
                part = torch.empty(min(_CHUNK, length - at), dtype=self._kept_as)
                self._read_into(begin + at, part)
                row[at : at + part.numel()].copy_(part)

    def _read_into(self, begin: int, memory: Tensor) -> None:
        left = memory.view(torch.uint8).numpy().data
        try:
            self._file.seek(self._stored.begin + begin * self._kept_as.itemsize)
            while left:
                count = self._file.readinto(left)  # type: ignore[attr-defined]
                if not count:
                    raise OSError("it ends too early")
                left = left[count:]
            # Looked at after the read, so that no write slips between.
            if os.fstat(self._file.fileno()).st_mtime_ns != self._stored.written_ns:
                raise OSError("it was written to, so its weights may be others")
        except OSError as error:
            raise UserError(
                f"{self._stored.file} cannot be read any more: {error}. The model streams from it: put the file back, "
                "and start the agent again."
            ) from error


class _Files:
    """The files of a checkpoint, each opened once and kept open: a file that is replaced later is none of ours."""

    def __init__(self) -> None:
        self._opened: dict[Path, BinaryIO] = {}

    def of(self, stored: Stored) -> BinaryIO:
        """The file that holds `stored`."""
        if stored.file not in self._opened:
            self._opened[stored.file] = stored.file.open("rb", buffering=0)
        return self._opened[stored.file]


def load_streamed(source: str, dtype: WeightDtype, device: torch.device | str = "cpu") -> LoadedModel:
    """As `edge_client.model.load_model`, but the weights stay in their files.

    Raises UserError as well where the checkpoint has no safetensors files, or where its tensors are not those of the
    model one by one, such as experts that transformers stacks when it loads them.
    """
    return load_model(source, dtype, device, _read_weights)


def _read_weights(found: Source, dtype: torch.dtype, where: torch.device) -> tuple[PreTrainedModel, tuple[str, ...]]:
    if "gguf_file" in found.arguments:
        raise UserError(f"{found.given!r} is a GGUF file; a model streams from safetensors files only. Load it whole.")
    stored = stored_tensors(_folder(found))
    model = _empty(found, dtype)
    files = _Files()
    scratch = Scratch(dtype, where)
    for names, places in _parameters(model):
        name, tensor = _find(found, model, names, stored)
        module, attribute = places[0]
        shape = module._parameters[attribute].shape  # type: ignore[union-attr]
        if tensor.shape != tuple(shape) or tensor.dtype not in DTYPES:
            raise UserError(
                f"{found.given!r} holds {name} as {list(tensor.shape)} of {tensor.dtype}; the model has {list(shape)}, "
                f"and {', '.join(DTYPES)} can be streamed. Load the model whole."
            )
        weights = BareWeights(names[0], StreamedBase(tensor, files.of(tensor), dtype, where), scratch)
        standing = Placeholder(weights, 0, shape, dtype, where)
        for module, attribute in places:
            module._parameters[attribute] = standing  # type: ignore[assignment]
    _settle_buffers(model, stored, files, where)
    return model, prepare(model, dtype)


def _folder(found: Source) -> Path:
    if Path(found.name).is_dir():
        return Path(found.name)
    from huggingface_hub import snapshot_download

    return Path(reading(found, lambda: snapshot_download(found.name, allow_patterns=_FILES)))


class _EmptyOnMeta(TorchFunctionMode):
    """What is made without values, as parameters are and buffers are not, gets no memory either."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {})


def _empty(found: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its buffers and without its weights, which are on the meta device."""
    import transformers
    from accelerate import init_empty_weights
    from packaging.version import Version

    config = reading(found, lambda: transformers.AutoConfig.from_pretrained(found.name, **found.arguments))
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{found.given!r} is quantised; only plain weights stream. Load it whole.")
    keyword = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    make: Any = transformers.AutoModelForCausalLM.from_config
    # The latter alone would make each parameter in memory first, which leaves the heap in pieces as large as the model.
    with _EmptyOnMeta(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = reading(found, lambda: make(config, **{keyword: dtype}))
    model.tie_weights()
    return model


def _parameters(model: nn.Module) -> list[tuple[list[str], list[tuple[nn.Module, str]]]]:
    """Each parameter's names, sorted, and the places where it stands."""
    names: dict[int, list[str]] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in module._parameters.items():
            if weight is not None:
                names.setdefault(id(weight), []).append(f"{prefix}.{attribute}" if prefix else attribute)
                places.setdefault(id(weight), []).append((module, attribute))
    return [(sorted(names[key]), places[key]) for key in names]


def _find(found: Source, model: PreTrainedModel, names: list[str], stored: dict[str, Stored]) -> tuple[str, Stored]:
    """The stored tensor of a parameter. Checkpoints of a model without its head lack the head's prefix."""
    prefix = f"{model.base_model_prefix}."
    for name in (*names, *(name.removeprefix(prefix) for name in names)):
        if name in stored:
            return name, stored[name]
    raise UserError(
        f"{found.given!r} has no tensor {names[0]}, which transformers makes of others or starts at random; such a "
        "model cannot stream. Load it whole."
    )


def _settle_buffers(model: PreTrainedModel, stored: dict[str, Stored], files: _Files, where: torch.device) -> None:
    """Buffers are small: those of the checkpoint are read, and all are put where the model runs."""
    for prefix, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            name = f"{prefix}.{attribute}"
            if buffer is None:
                continue
            if buffer.is_meta:
                raise UserError(f"the buffer {name} of the model would have no values; load the model whole.")
            tensor = None if attribute in module._non_persistent_buffers_set else stored.get(name)
            if tensor is not None and tensor.dtype in DTYPES:
                base = StreamedBase(tensor, files.of(tensor), buffer.dtype, buffer.device)
                base.read(torch.zeros(1, dtype=torch.int64), buffer.view(1, -1))
            module._buffers[attribute] = buffer.to(where)
