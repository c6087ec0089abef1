"""Memory for exact gradients: the arithmetic, what `auto` makes of it, and the prediction against a measured peak."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edge_client import first_order_fit, first_order_gradient, fit, loss, placeholders
from edge_client.first_order import FirstOrderRounds
from edge_client.first_order_fit import gradient_need, gradients_beside, most_at_once
from edge_client.fit import Need, Work, need, size_of
from edge_client.trainer import ModelTrainer
from edge_client.watching.reading import MB
from tests.test_first_order import trainer_of
from tests.test_fit import SMALL, WORK
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from tools.fit import propose

DEEP = replace(SMALL, layers=30)


def test_a_gradient_is_counted_part_by_part() -> None:
    plain = need(DEEP, "loaded", "bf16", "unpacked", WORK)
    found = gradient_need(DEEP, "loaded", "bf16", "unpacked", WORK, 65_536)
    assert (found.weights, found.rest) == (plain.weights, plain.rest)
    assert found.in_use == 2 * 2 * (1 << 22)  # a slice of weights and one of their gradient
    assert found.logits - plain.logits > 2 * 8 * 32 * 49_152  # their gradient
    assert found.numbers == 16 * 8 * 65_536
    deeper = gradient_need(replace(DEEP, layers=40), "loaded", "bf16", "unpacked", WORK, 65_536)
    assert deeper.activations - found.activations == 10 * 8 * 125 * 576 * 2  # what ten more layers were given
    assert " + 8 coefficients + 250 code and the rest = " in str(found)


def test_as_many_sequences_are_taken_at_once_as_fit_or_none() -> None:
    def need_of(work: Work) -> Need:
        return gradient_need(DEEP, "loaded", "bf16", "unpacked", work, 4096)

    for at_once in (8, 4, 2, 1):
        room = need_of(replace(WORK, at_once=at_once)).total
        assert most_at_once(need_of, room, WORK) == (at_once, need_of(replace(WORK, at_once=at_once)))
    assert most_at_once(need_of, room - 1, WORK) == (0, need_of(replace(WORK, at_once=1)))


def free(monkeypatch: pytest.MonkeyPatch, megabytes: float) -> None:
    monkeypatch.setattr(first_order_fit, "free_on", lambda device: (megabytes * MB, "system"))


def test_what_is_needed_beside_a_loaded_model_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49_152, "num_hidden_layers": 30}
    free(monkeypatch, 10_000)
    at_once, sums = gradients_beside(config, "bf16", "cpu", seeds=4096, max_length=128)
    assert at_once == 64
    assert sums.startswith("64 sequences of 128 tokens at once take 17 weights in use + ")
    assert sums.endswith(" MB beside the model; 10000 MB are free (system)")
    assert " weights + " not in sums and "code" not in sums
    free(monkeypatch, 20)
    at_once, sums = gradients_beside(config, "bf16", "cpu", seeds=4096, max_length=128)
    assert at_once == 0 and sums.startswith("1 sequence of 128 tokens at once take 17 weights in use + ")


def rounds_of(trainer: ModelTrainer) -> FirstOrderRounds | None:
    return trainer._first_order


def test_auto_leaves_gradients_that_do_not_fit_and_says_the_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 20)
    said: list[str] = []
    assert rounds_of(trainer_of(tmp_path, "auto", said=said)) is None
    (line,) = [line for line in said if line.startswith("estimator")]
    assert line.startswith("estimator forward, because exact gradients do not fit: 1 sequence of 1024 tokens at once ")
    assert line.endswith("; 20 MB are free (system)")


def test_who_demands_gradients_begins_with_one_sequence_where_none_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 20)
    rounds = rounds_of(trainer_of(tmp_path, "gradient"))
    assert rounds is not None and rounds._portions.at_once == 1


def test_auto_takes_gradients_with_as_many_sequences_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    rounds = rounds_of(trainer_of(tmp_path / "much", "auto", said=said))
    assert rounds is not None and rounds._portions.at_once is None
    (line,) = [line for line in said if line.startswith("estimator")]
    assert "exact gradients by backprop; updates are changes of coefficients; 64 sequences of 1024 tokens" in line
    config = tiny_model("llama").config.to_dict()
    need_of_three = first_order_fit.gradient_need(
        first_order_fit.shape_of(config), "loaded", "fp32", "unpacked", Work(3, 1024, 512), 256
    )
    free(monkeypatch, (need_of_three.total - need_of_three.rest) / MB)
    rounds = rounds_of(trainer_of(tmp_path / "little", "auto"))
    assert rounds is not None and rounds._portions.at_once == 2


def test_the_creator_of_a_run_is_told_about_gradients_too(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path))
    enough = propose(folder, 500.0, max_length=64, batch=4).splitlines()[-1]
    assert enough.startswith("exact gradients (estimator gradient or auto, K = 4096): 4 of 4 sequences at once: 17 ")
    little = propose(folder, 262.0, max_length=64, batch=4).splitlines()[-1]
    assert "K = 4096): do not fit, not one sequence: 17 weights in use + " in little


def test_the_arithmetic_counts_what_the_engine_takes_at_a_time() -> None:
    """`fit` runs before torch is imported, so it has these numbers of its own."""
    assert fit.SLICE == placeholders.SLICE
    assert fit.LOGITS == loss.CHUNK
    assert first_order_fit.SLICE == first_order_gradient.SLICE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.parametrize(("layers", "hidden", "vocabulary"), [(14, 768, 8192), (4, 1024, 49_152)])
def test_the_prediction_is_near_the_peak_of_a_real_gradient_step(
    layers: int, hidden: int, vocabulary: int, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tools.bench_step import LABELLED, LENGTH, ROWS, in_process

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=12 if hidden == 768 else 16, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    size = size_of(tmp_path)
    assert size is not None and size.layers == layers
    predicted = gradient_need(size, "loaded", "bf16", "unpacked", Work(ROWS, LENGTH, LABELLED), 4096).total / MB
    imports_mb, peak_mb, _ = in_process("tools.bench_first_order", str(tmp_path), "kseed")["cost"]
    assert 0.6 * predicted < peak_mb - imports_mb < 1.3 * predicted
