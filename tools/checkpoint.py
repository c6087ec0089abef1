"""Checkpoints as transformers writes them, whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import UserError

if TYPE_CHECKING:
    from edge_client.model import LoadedModel


def check_free(output: Path) -> None:
    """Raise UserError unless `output` is new or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already and not an empty folder; choose another --output.")


def save_whole(loaded: LoadedModel, output: Path) -> None:
    """Write model and tokenizer to the new folder `output`. Raises UserError where that is impossible."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}-") as scratch:
            part = Path(scratch) / "checkpoint"
            loaded.model.save_pretrained(part)
            loaded.tokenizer.save_pretrained(part)
            part.replace(output)
    except OSError as error:
        raise UserError(f"{output}: the checkpoint cannot be written: {error}. Choose another folder.") from error
