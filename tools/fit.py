"""`kseed fit`: what the creator of a run may ask of devices with so much memory."""

from __future__ import annotations

from edge_client.fit import Work, folder_of, free_on, proposal, size_of
from edge_client.watching.reading import MB
from shared.errors import UserError


def propose(model: str, memory_mb: float | None, *, max_length: int, batch: int) -> str:
    """What to tell the person. memory_mb: of the smallest device; None: what is free here.

    Raises UserError where the model's size is unknown, and with the arithmetic where it fits in no form.
    """
    size = size_of(folder_of(model))
    if size is None:
        raise UserError(
            f"{model!r} is no folder with config.json and safetensors files, and no such model is in the hub's local "
            "cache, so its size is unknown. Give the folder."
        )
    free, source = free_on("cpu") if memory_mb is None else (memory_mb * MB, "as given")
    found = proposal(size, free, source, Work(batch, max_length, max_length // 2))
    packing = "" if found.packing == "unpacked" else f", packed in {found.packing} (kseed quantise)"
    return (
        f"dtype {found.dtype}, {found.form}{packing}, {found.at_once} of {batch} sequences at once; scope all, because "
        f"what a narrower one leaves out must be in memory too\n{found.why}"
    )
