"""What the base digest covers beside the parameters: floating point buffers that a checkpoint stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from edge_client.model import load_model
from edge_client.overlay import Overlay
from edge_client.tuned import stored_buffers
from tests.tiny_models import tiny_ids, tiny_model, tiny_tokenizer

ROUTER = "model.layers.1.mlp.gate.e_score_correction_bias"


def digest_of(model: nn.Module) -> bytes:
    overlay = Overlay(model, pool_key=1, seeds=256, directions="hadamard")  # type: ignore[arg-type]
    digest = overlay.base_digest()
    overlay.detach()
    return digest


def tiny_deepseek() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=101, hidden_size=24, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    model.state_dict()[ROUTER].copy_(torch.tensor([0.5, -0.25, 2.0, -2.0]))
    return model


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    ids = tiny_ids(2, 11)
    return float(model(input_ids=ids, labels=ids).loss)


def test_a_router_s_stored_bias_is_part_of_the_base(tmp_path: Path) -> None:
    model = tiny_deepseek()
    digests, losses = [], []
    for name, bias in (("one", [0.5, -0.25, 2.0, -2.0]), ("other", [2.0, -2.0, 0.5, -0.25])):
        model.state_dict()[ROUTER].copy_(torch.tensor(bias))
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        for _ in range(2):
            loaded = load_model(str(tmp_path / name), "fp32").model
            digests.append(digest_of(loaded))
            losses.append(loss_of(loaded))
    assert digests[0] == digests[1] and digests[2] == digests[3]
    assert losses[0] != losses[2] and digests[0] != digests[2]


def test_a_buffer_counts_as_rounded_to_the_dtype_of_the_run() -> None:
    digests = set()
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", torch.bfloat16)
        model.register_buffer("scale", torch.tensor([1.0, 1 + 2**-8]).to(dtype))
        digests.add(digest_of(model))
    assert len(digests) == 1


def test_models_without_stored_buffers_have_the_digest_of_their_parameters() -> None:
    plain = digest_of(tiny_model("llama"))
    for buffer, is_persistent in ((torch.ones(3), False), (torch.ones(3, dtype=torch.int64), True)):
        model = tiny_model("llama")
        model.register_buffer("more", buffer, persistent=is_persistent)
        assert digest_of(model) == plain
    model.register_buffer("scale", torch.ones(3))
    assert digest_of(model) != plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_buffers_follow_each_other_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    model.register_buffer("0a", torch.tensor(3.0))
    model[0].running_mean.fill_(1.0)
    model[0].running_var.fill_(2.0)
    numbers = torch.tensor([1.0, 2.0, 3.0]).to(dtype)  # "0.running_mean", "0.running_var", "0a"
    assert stored_buffers(model, dtype) == numbers.view(torch.uint8).numpy().tobytes()
