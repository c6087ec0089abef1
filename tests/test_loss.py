"""The loss of labelled tokens is that of the plain full-logits computation, with fewer rows through the head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor, nn

from edge_client.data.batches import NOT_LABELLED, Batch
from edge_client.loss import labelled_loss, token_losses
from shared.errors import UserError


def plain_losses(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of the labelled tokens from all logits, in row order."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    targets = batch.labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=NOT_LABELLED, reduction="none")
    return losses[targets != NOT_LABELLED]


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_that_of_all_logits(name: str) -> None:
    model, batch = tiny_model(name), tiny_batch()
    wanted = plain_losses(model, batch)
    assert len(wanted) == 4 + 6 + 1
    assert torch.allclose(token_losses(model, batch), wanted, rtol=1e-4, atol=1e-5)
    assert float(labelled_loss(model, batch)) == pytest.approx(float(wanted.mean()), rel=1e-5)


@torch.inference_mode()
def test_the_mean_is_over_labelled_tokens_of_the_whole_batch() -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    losses = token_losses(model, batch)
    assert losses.dtype == torch.float32
    mean = labelled_loss(model, batch)
    assert mean.dtype == torch.float64 and float(mean) == float(losses.double().sum() / 11)


@torch.inference_mode()
def test_only_labelled_positions_go_through_the_head() -> None:
    model, seen = tiny_model("gemma2"), []  # gemma2 caps the logits after the head
    model.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(tuple(output.shape)))
    labelled_loss(model, tiny_batch())
    assert seen == [(1, 11, VOCABULARY)]
    assert not model.lm_head._forward_pre_hooks


@torch.inference_mode()
def test_a_head_that_is_not_reached_through_its_module_gives_the_same_loss() -> None:
    class Direct(nn.Module):
        """Multiplies by the head's weight itself."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("llama-tied")

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.lm_head

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
            out = self.inner.model(input_ids=input_ids, attention_mask=attention_mask)
            out.logits = out.last_hidden_state @ self.inner.lm_head.weight.T
            return out

    batch = tiny_batch()
    found = token_losses(Direct(), batch)  # type: ignore[arg-type]
    assert torch.allclose(found, plain_losses(tiny_model("llama-tied"), batch), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_label_at_the_first_position_is_predicted_by_nothing() -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    labels = batch.labels.clone()
    labels[:, 0] = batch.input_ids[:, 0]
    with_first = Batch(batch.input_ids, batch.attention_mask, labels)
    assert torch.equal(token_losses(model, with_first), token_losses(model, batch))


@torch.inference_mode()
def test_padding_does_not_change_a_loss() -> None:
    model, batch = tiny_model("opt"), tiny_batch()
    alone = Batch(batch.input_ids[2:, :2], batch.attention_mask[2:, :2], batch.labels[2:, :2])
    assert torch.allclose(token_losses(model, alone), token_losses(model, batch)[-1:], rtol=1e-5)


def test_a_batch_without_labels_is_refused() -> None:
    batch = tiny_batch()
    nothing = Batch(batch.input_ids, batch.attention_mask, torch.full_like(batch.labels, NOT_LABELLED))
    with pytest.raises(UserError, match="a batch has no labelled token"):
        labelled_loss(tiny_model("llama"), nothing)


def test_a_batch_padded_on_the_left_is_refused() -> None:
    batch = tiny_batch()
    flipped = Batch(batch.input_ids.flip(1), batch.attention_mask.flip(1), batch.labels.flip(1))
    with pytest.raises(ValueError, match="padded on the left"):
        labelled_loss(tiny_model("llama"), flipped)


@torch.inference_mode()
def test_many_labelled_tokens_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    whole = token_losses(model, batch)
    monkeypatch.setattr("edge_client.loss.CHUNK", 3 * VOCABULARY)
    assert torch.equal(token_losses(model, batch), whole)
