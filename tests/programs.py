"""kseed's programs as processes of their own, and the tiny model and run that they work on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aggregator.config import RunConfig

ROOT = Path(__file__).parent.parent
_STARTED: list[subprocess.Popen[str]] = []


def started(*words: object, program: str = "edge_client.cli", **settings: str) -> subprocess.Popen[str]:
    """A process of its own, which ends with the test at the latest."""
    _STARTED.append(
        subprocess.Popen(
            [sys.executable, "-m", program, *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    return _STARTED[-1]


def end_all() -> None:
    """Kill what still runs."""
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str], timeout_s: float = 60.0) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running: {process.communicate()}") from None
    return process.returncode, out, err


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Wait for a line with `text` on stdout."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {seen} {process.communicate()}")


def write_settings(file: Path, tables: Mapping[str, Mapping[str, object]]) -> None:
    """A configuration file: values by key, by table."""

    def text(value: object) -> str:
        return json.dumps(value if isinstance(value, (bool, int, float)) else str(value))

    lines = (
        f"[{name}]\n" + "".join(f"{key} = {text(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )
    file.write_text("\n".join(lines))


def tiny_folder(folder: Path, seed: int = 0) -> Path:
    """A folder with a tiny model, as save_pretrained writes it."""
    from tests.tiny_models import tiny_model, tiny_tokenizer

    tiny_model("llama-tied", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def created(store: Path, model: Path, config: RunConfig) -> Path:
    """A run "spring" on the model."""
    from aggregator.spec import new_spec
    from aggregator.store import Store
    from edge_client.overlay import Overlay
    from shared.manifest import RunBase
    from tests.tiny_models import tiny_model

    overlay = Overlay(tiny_model("llama-tied"), pool_key=0, seeds=256, directions="hadamard")
    base = RunBase(str(model), "fp32", overlay.manifest, overlay.base_digest())
    with Store.open(store, may_create=True) as opened:
        opened.create(new_spec("spring", base, config, pool_key=5, nonce_key=bytes(32)), 0)
    return store
