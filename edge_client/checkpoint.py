"""Where the tensors of a checkpoint of safetensors files stand, read from the files' headers alone.

A file: 8 bytes little-endian length of the header, the header as JSON {name: {"dtype", "shape", "data_offsets"}}, then
the data, which the offsets count from. A checkpoint of several files has an index that says which tensor is in which.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_MAX_HEADER = 100_000_000  # bytes; what the format's own reader allows


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its dtype as the format names it, and its first byte, counted from the file's begin."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    stored_bytes: int
    written_ns: int  # when the file was last written, as of the reading of its header

    @property
    def elements(self) -> int:
        """How many weights."""
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of the checkpoint in `folder`. Raises UserError where it has none or its files are not whole."""
    files = {folder / SINGLE}
    if (folder / INDEX).is_file():
        files = _indexed(folder / INDEX)
    found: dict[str, Stored] = {}
    for file in sorted(files):
        found.update(_tensors_of(file))
    return found


def _indexed(index: Path) -> set[Path]:
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(name, str) and Path(name).name == name for name in named):
            raise ValueError("a file is named by more than its name")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no index of safetensors files: {error}. Fetch the checkpoint again.") from error
    return {index.parent / name for name in named}


def _tensors_of(file: Path) -> dict[str, Stored]:
    try:
        with file.open("rb") as opened:
            facts = os.fstat(opened.fileno())
            size = facts.st_size
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"the header would have {length} bytes, the file has {size}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        return {name: _stored(file, entry, 8 + length, facts) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {file.name} in {file.parent}; a model streams from safetensors files only. "
            "Load it whole, or convert it with save_pretrained."
        ) from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise UserError(f"{file} is no whole safetensors file: {error}. Fetch the checkpoint again.") from error


def _stored(file: Path, entry: Any, data_begin: int, facts: os.stat_result) -> Stored:
    begin, end = entry["data_offsets"]
    stored = Stored(file, entry["dtype"], tuple(entry["shape"]), data_begin + begin, end - begin, facts.st_mtime_ns)
    expected = ITEM_BYTES.get(stored.dtype, 0) * stored.elements
    if begin < 0 or data_begin + end > facts.st_size or (expected and end - begin != expected):
        raise ValueError(f"a tensor {list(stored.shape)} of {stored.dtype} lies at {begin} to {end}")
    return stored
