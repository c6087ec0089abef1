"""The mean loss of a batch's labelled tokens, with only their positions through the output head.

The head of a small model holds a fifth of its weights and writes a number per word of the vocabulary, so positions
whose logits nobody reads (prompt and padding) are dropped just before it. What the model's own code does to the logits
afterwards, such as soft capping, still happens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edge_client.data.batches import NOT_LABELLED, Batch
from edge_client.shortage import in_portions
from shared.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1 << 22  # logits turned to float32 at a time


@dataclass(frozen=True)
class Labelled:
    """Where the logits stand that predict the labelled tokens: int64 (N,) each."""

    rows: Tensor
    positions: Tensor  # of the token before the labelled one
    targets: Tensor


def labelled(batch: Batch) -> Labelled:
    """The labelled tokens of `batch`: the logits at position t - 1 predict the label at t.

    Raises UserError where there is none, ValueError where the batch is padded on the left.
    """
    if bool((batch.attention_mask[:, 1:] > batch.attention_mask[:, :-1]).any()):
        raise ValueError("the batch is padded on the left; positions are right only for padding on the right")
    shifted = batch.labels[:, 1:]
    rows, positions = (shifted != NOT_LABELLED).nonzero(as_tuple=True)
    if not len(rows):
        raise UserError("a batch has no labelled token, so it has no loss; every example needs a response to learn.")
    return Labelled(rows, positions, shifted[rows, positions])


def token_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """-log p of every labelled token, in row order: float32 (N,), in nats. Raises as `labelled` does."""
    wanted = labelled(batch)
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if _takes_use_cache(getattr(model.forward, "__func__", model.forward)):
        arguments["use_cache"] = False
    with _only(model, wanted, batch.input_ids.shape) as picked:
        logits = model(**arguments).logits
    # Not picked: the head was not reached through its module.
    logits = logits.reshape(-1, logits.shape[-1]) if picked else logits[wanted.rows, wanted.positions]
    step = max(1, CHUNK // logits.shape[-1])
    parts = zip(torch.split(logits, step), torch.split(wanted.targets, step), strict=True)
    return torch.cat([_losses(part, targets) for part, targets in parts])


def labelled_loss(model: PreTrainedModel, batch: Batch, at_once: int | None = None) -> Tensor:
    """The mean of `token_losses`, in nats: a scalar on the CPU, summed in float64.

    A probe's scalar is the small difference of two losses: in float32 the sum alone would cost digits of it.
    at_once: sequences that go through the model together (None: all); the mean is over the tokens of all of them.
    """
    portions = in_portions(batch, at_once)
    return torch.cat([token_losses(model, portion).cpu().to(torch.float64) for portion in portions]).mean()


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """`_cross_entropy`, of which backward keeps nothing: in float32 the logits would be there twice more."""
    if not logits.requires_grad:
        return _cross_entropy(logits, targets)
    again: Tensor = checkpoint(_cross_entropy, logits, targets, use_reentrant=False, preserve_rng_state=False)
    return again


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def _only(model: PreTrainedModel, wanted: Labelled, shape: torch.Size) -> Iterator[list[bool]]:
    """While it lasts, the output head sees the wanted positions alone, as (1, N, D). The list gets an entry if so."""
    picked: list[bool] = []

    def pick(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or arguments[0].shape[:-1] != shape:
            return None
        picked.append(True)
        return (arguments[0][wanted.rows, wanted.positions].unsqueeze(0), *arguments[1:])

    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        yield picked
        return
    hook = head.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        hook.remove()


@lru_cache(maxsize=8)
def _takes_use_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters
