"""What fits: the arithmetic, the choice of form and portion, and the prediction against a measured peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tiny_model, tiny_tokenizer

from edge_client import fit
from edge_client.fit import Size, Work, fit_of, fitting, need, proposal, size_of
from edge_client.watching.reading import MB
from shared.errors import UserError
from tools.fit import propose

SMALL = Size(
    weights=135 * MB, matrices=106 * MB, hidden=576, wide=1536, vocabulary=49152, is_packed=False,
    stored_bytes=270 * MB, can_stream=True,
)  # fmt: skip
WORK = Work(8, 125, 32)


def test_weights_are_counted_as_they_are_held() -> None:
    assert need(SMALL, "loaded", "bf16", "unpacked", WORK).weights == 270 * MB
    assert need(SMALL, "loaded", "fp32", "unpacked", WORK).weights == 540 * MB
    assert need(SMALL, "loaded", "bf16", "8bit", WORK).weights == (106 + 2 * 29) * MB
    assert need(SMALL, "loaded", "bf16", "4bit", WORK).weights == (106 * 0.5625 + 2 * 29) * MB
    assert need(SMALL, "streamed", "bf16", "unpacked", WORK).weights == 0
    packed = replace(SMALL, is_packed=True, stored_bytes=120 * MB)
    assert need(packed, "loaded", "bf16", "unpacked", WORK).weights == 120 * MB


def test_the_arithmetic_is_said_and_adds_up() -> None:
    found = need(SMALL, "loaded", "bf16", "unpacked", WORK)
    assert str(found) == (
        "270 weights + 8 weights in use + 17 activations + 59 logits and loss + 250 code and the rest = 604 MB"
    )


def test_what_fits_is_loaded_with_as_many_sequences_as_fit() -> None:
    room = need(SMALL, "loaded", "bf16", "unpacked", WORK).total
    whole = fitting(SMALL, room, "system", "bf16", "unpacked", WORK, ("loaded", "streamed"))
    assert (whole.form, whole.at_once) == ("loaded", 8)
    assert whole.why.startswith("loaded in bf16, 8 sequences of 125 tokens at once: 270 weights + ")
    assert whole.why.endswith("= 604 MB; 604 MB are free (system)")
    fewer = fitting(SMALL, room - 1, "system", "bf16", "unpacked", WORK, ("loaded", "streamed"))
    assert (fewer.form, fewer.at_once) == ("loaded", 4)


def test_what_does_not_fit_is_streamed_and_the_line_says_why() -> None:
    found = fitting(SMALL, 400 * MB, "limit of a group", "bf16", "unpacked", WORK, ("loaded", "streamed"))
    assert (found.form, found.at_once) == ("streamed", 8)
    assert found.why.startswith("loaded: 270 weights + ") and "; streamed in bf16, 8 sequences" in found.why


def test_nothing_that_fits_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(UserError, match=r"does not fit: loaded: 270 weights .* MB; streamed: .* 100 MB are free \(sys"):
        fitting(SMALL, 100 * MB, "system", "bf16", "unpacked", WORK, ("loaded", "streamed"))
    with pytest.raises(UserError, match="streamed: the checkpoint has no plain safetensors files"):
        fitting(replace(SMALL, can_stream=False), MB, "system", "bf16", "unpacked", WORK, ("loaded", "streamed"))


@pytest.mark.parametrize(
    ("free_mb", "packing", "form"),
    [(600, "unpacked", "loaded"), (460, "8bit", "loaded"), (410, "4bit", "loaded"), (300, "unpacked", "streamed")],
)
def test_a_run_is_proposed_the_most_exact_weights_that_fit(free_mb: int, packing: str, form: str) -> None:
    found = proposal(SMALL, free_mb * MB, "system", Work(1, 125, 32))
    assert (found.packing, found.form, found.dtype) == (packing, form, "bf16")


def test_no_proposal_is_made_where_nothing_fits() -> None:
    with pytest.raises(UserError, match=r"no form of the model fits into 50 MB \(system\): loaded unpacked: 270"):
        proposal(SMALL, 50 * MB, "system", Work(1, 125, 32))


def test_the_size_is_read_from_headers_and_configuration(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    model = tiny_model("llama-tied")
    found = size_of(folder)
    assert found is not None
    assert found.weights == sum(weight.numel() for weight in model.parameters())
    assert found.matrices == found.weights - 101 * 24 - 5 * 24  # without embedding and norms
    assert (found.hidden, found.wide, found.vocabulary, found.can_stream) == (24, 40, 101, True)
    assert found.stored_bytes == 4 * found.weights
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    packed = size_of(folder)
    assert packed is not None and packed.is_packed and not packed.can_stream


def test_a_model_of_unknown_size_is_not_judged(tmp_path: Path) -> None:
    assert fit_of(str(tmp_path), "bf16", "cpu", load_in="auto", max_length=64) is None
    assert fit_of("nobody/nothing", "bf16", "cpu", load_in="auto", max_length=64) is None


def test_the_choice_is_made_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_tiny(tmp_path))
    found = fit_of(folder, "bf16", "cpu", load_in="auto", max_length=64)
    assert found is not None and found.form == "loaded" and found.at_once == fit.MOST_AT_ONCE
    monkeypatch.setattr(fit, "free_on", lambda device: (fit.FIXED, "system"))
    with pytest.raises(UserError, match=r"does not fit: .* 250 MB are free \(system\)\. Free some memory, lower"):
        fit_of(folder, "bf16", "cpu", load_in="auto", max_length=64)


@pytest.mark.skipif(sys.platform != "linux", reason="a cap on memory is kept with RLIMIT_DATA")
def test_the_owners_cap_counts_as_what_is_free() -> None:
    code = (
        "import resource; from edge_client.fit import free_on;"
        "resource.setrlimit(resource.RLIMIT_DATA, (10**9, resource.RLIM_INFINITY)); print(*free_on('cpu'))"
    )
    path = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    free, source = done.stdout.split(maxsplit=1)
    assert 0.5e9 < float(free) < 1e9 and source.strip() == "the cap on what this process may allocate"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.parametrize("form", ["loaded", "streamed"])
def test_the_prediction_is_near_the_peak_of_a_real_step(form: fit.Form, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tools.bench_step import LABELLED, LENGTH, ROWS, in_process

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=3072, num_hidden_layers=14, num_attention_heads=12,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    size = size_of(tmp_path)
    assert size is not None and size.stored_bytes > 250 * MB
    predicted = need(size, form, "bf16", "unpacked", Work(ROWS, LENGTH, LABELLED)).total / MB
    way = "numba" if form == "loaded" else "streamed"
    ((imports_mb, peak_mb),) = in_process("tools.bench_memory", str(tmp_path), way)["peak"]
    # Never far too little, which ends in memory that runs out. Of a streamed model most of it is FIXED, an upper bound.
    assert 0.5 * predicted < peak_mb - imports_mb < 1.2 * predicted


def test_the_creator_of_a_run_is_told_what_to_ask_for(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path))
    said = propose(folder, 400.0, max_length=64, batch=4)
    assert said.startswith("dtype bf16, loaded, 4 of 4 sequences at once; scope all, because ")
    assert "= 2" in said and "400 MB are free (as given)\n" in said
    with pytest.raises(UserError, match="no form of the model fits into 100 MB"):
        propose(folder, 100.0, max_length=64, batch=4)
    with pytest.raises(UserError, match=r"its size is unknown\. Give the folder"):
        propose(str(tmp_path / "nowhere"), None, max_length=64, batch=4)
