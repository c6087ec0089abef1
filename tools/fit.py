"""`kseed fit`: what the creator of a run may ask of devices with so much memory."""

from __future__ import annotations

from edge_client.first_order_fit import gradient_need, most_at_once
from edge_client.fit import Fit, Need, Size, Work, folder_of, free_on, proposal, size_of
from edge_client.watching.reading import MB
from shared.errors import UserError

SEEDS = 4096  # as a run has unless its creator says otherwise


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
    work = Work(batch, max_length, max_length // 2)
    found = proposal(size, free, source, work)
    packing = "" if found.packing == "unpacked" else f", packed in {found.packing} (kseed quantise)"
    return (
        f"dtype {found.dtype}, {found.form}{packing}, {found.at_once} of {batch} sequences at once; scope all, because "
        f"what a narrower one leaves out must be in memory too\n{found.why}\n{_gradients(size, free, found, work)}"
    )


def _gradients(size: Size, free: float, found: Fit, work: Work) -> str:
    """Whether exact gradients fit as well, with the weights so."""

    def need_of(work: Work) -> Need:
        return gradient_need(size, found.form, found.dtype, found.packing, work, SEEDS)

    at_once, needed = most_at_once(need_of, free, work)
    fits = f"{at_once} of {work.at_once} sequences at once" if at_once else "do not fit, not one sequence"
    return f"exact gradients (estimator gradient or auto, K = {SEEDS}): {fits}: {needed}"
