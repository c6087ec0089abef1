"""`kseed export`: base + delta as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from shared.delta import read_delta
from tools.checkpoint import check_free, save_whole


def export_checkpoint(model: str, delta_file: Path, output: Path) -> str:
    """Write the tuned model to the new folder `output`, whole or not at all; returns what to tell the person.

    Plain transformers loads the folder and computes the same logits, bit for bit. Raises UserError where the delta does
    not fit `model`, or the folder cannot be written.
    """
    delta = read_delta(delta_file)
    check_free(output)
    from tools.tuned_model import apply_delta, load_base

    tuned = apply_delta(load_base(model, delta.dtype), delta, str(delta_file))
    tuned.overlay.write_out()
    save_whole(tuned.loaded, output)
    return f"{output}: {delta.model} with version {delta.version} of run {delta.run}, in {delta.dtype}"
