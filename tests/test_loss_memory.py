"""The loss turns few logits to float32 at a time, and keeps none of those for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from overlays import overlay_of
from tiny_models import VOCABULARY, tiny_batch, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from edge_client import loss
from edge_client.first_order_gradient import OffsetGradient

LABELLED = 11  # tokens of the tiny batch


class Wide(TorchDispatchMode):
    """Counts the float32 numbers that lie in rows as long as the vocabulary, in a model of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.shape[-1:] == (VOCABULARY,):
            storage = out.untyped_storage()
            self.alive[storage._cdata] = (StorageWeakRef(storage), out.numel())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def test_a_gradient_keeps_no_float32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.bfloat16)
    measure = OffsetGradient(overlay_of(model))
    whole = measure.measure(model, tiny_batch())
    monkeypatch.setattr(loss, "CHUNK", VOCABULARY)  # one labelled token at a time
    with Wide() as seen:
        parts = measure.measure(model, tiny_batch())
    assert 0 < seen.most <= 3 * VOCABULARY < LABELLED * VOCABULARY
    assert parts[0] == whole[0] and (parts[1] == whole[1]).all()
