"""What every test stands on: no settings from outside, no model hub, one thread, the same examples in each run."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.patient import Patient
    from tools.broker import RunningBroker

# Before the first import of numpy, torch, numba or huggingface_hub: each reads its variables once.
for name in [name for name in os.environ if name.startswith("KSEED_")]:
    del os.environ[name]
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
# Agents of a test work at once, whatever else this machine does, and leave the priority of its process alone.
os.environ.update(KSEED_GATE_ENABLED="false", KSEED_CAPS_NICE="0")
# And keep nothing in the home of whoever runs the tests.
STATE_DIR = TemporaryDirectory()
os.environ["KSEED_AGENT_STATE_DIR"] = STATE_DIR.name
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# A job in the background begins with ctrl-C ignored, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared CI machine is slow now and then, which says nothing about the code; the same commit gives the same verdict.
settings.register_profile("kseed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kseed")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """A command line in this process: `call(cli, "join", "spring")` gives exit code, stdout and stderr."""

    def run(program: ModuleType, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, words)])
        capsys.readouterr()  # what the test itself has said
        code = 0
        try:
            program.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[RunningBroker]:
    """A broker of the test's own."""
    from tests.brokers import running_mosquitto

    with running_mosquitto(tmp_path) as broker:
        yield broker


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of the test's own, 512 KB; only where the tests run as root."""
    from tests.disks import mounted

    with mounted(tmp_path / "disk", "512k") as folder:
        yield folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty reviews to tune on."""
    file = tmp_path / "reviews.jsonl"
    rows = [{"text": f"{word} {n}", "label": label} for n in range(10) for word, label in (("yes", "+"), ("no", "-"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def patient(
    tmp_path: Path, data: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> Patient:
    """A device whose configuration the test writes."""
    from tests.patient import Patient

    monkeypatch.delenv("KSEED_AGENT_STATE_DIR")  # it would win over the file
    return Patient(tmp_path, call)


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    from tests.programs import end_all

    end_all()
