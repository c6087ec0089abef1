"""pyproject.toml, constraints.txt, README.md and .ci/run agree with each other and with the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from shared import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("shared", "edge_client", "aggregator", "tools")
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]
HEAVY = ("torch", "transformers", "numba", "datasets", "bitsandbytes", "matplotlib", "amqtt")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def readme_command(name: str) -> str:
    """The one command under the marker, as .ci/run finds it."""
    match = re.search(rf"^<!-- command: {name} -->\n```sh\n(.+)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert match, f"README.md has no marked command {name}"
    return match[1]


def requirements() -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for part in PROJECT["optional-dependencies"].values() for line in part]
    return [requirement for line in lines if (requirement := Requirement(line)).name != "kseed"]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["Linux x86_64", "Linux aarch64", "Darwin arm64", "Windows AMD64"])
def test_constraints_pin_one_allowed_version_of_each_dependency(python: str, machine: str) -> None:
    system, processor = machine.split()
    names = {"Linux": ("linux", "posix"), "Darwin": ("darwin", "posix"), "Windows": ("win32", "nt")}
    environment = dict(default_environment())  # type: ignore[arg-type]
    environment |= {"python_version": python, "python_full_version": f"{python}.1", "platform_system": system}
    environment |= {"platform_machine": processor, "sys_platform": names[system][0], "os_name": names[system][1]}
    pins = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            assert canonical(pin.name) not in pins, f"{pin.name} is pinned twice"
            pins[canonical(pin.name)] = str(pin.specifier).removeprefix("==")
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = pins.get(canonical(requirement.name), "no version")
            assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_the_base_install_has_no_learning_framework() -> None:
    base = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert not base & set(HEAVY)


def test_readme_commands_set_up_everything_and_run_what_they_promise() -> None:
    setup = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[{}]' && .venv/bin/{}"
    assert readme_command("demo") == setup.format("demo", "kseed demo")
    assert readme_command("test") == setup.format("test", "python -m pytest")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^readme_command\(\) \{.*?^\}$", script, re.MULTILINE | re.DOTALL)
    assert function
    for name in ("demo", "test"):
        call = f"{function[0]}\nreadme_command {name}"
        done = subprocess.run(["bash", "-c", call], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == readme_command(name)
    assert 'bash -euo pipefail -c "$install_command"' in script
    assert script.rstrip().endswith('bash -euo pipefail -c "$pytest_command"')


@pytest.mark.parametrize("command", ["tools.cli", "aggregator.cli", "edge_client.cli"])
def test_help_answers_in_a_blink(command: str) -> None:
    before = os.times()
    done = subprocess.run([sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, check=True)
    after = os.times()
    assert b"Usage" in done.stdout
    worked_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert worked_s < 1.0, (
        f"{command} --help took {worked_s} s of processor time; 0.3 s is usual, torch alone takes 1.5"
    )


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("tools.cli", HEAVY), ("edge_client.cli", HEAVY), ("aggregator.cli", HEAVY), ("aggregator.service", HEAVY)],
)
def test_import_leaves_the_heavy_packages_out(module: str, forbidden: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*sorted({set(forbidden)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_script_names_a_function_that_exists() -> None:
    for name, target in PROJECT["scripts"].items():
        module, function = target.split(":")
        program = f"import {module}; assert callable({module}.{function})"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
        assert name.startswith("kseed")


def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "wheel"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(target)], cwd=source, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    assert wheel.name == f"kseed-{__version__}-py3-none-any.whl"
    expected = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {name for name in expected if (ROOT / name).is_file() and "__pycache__" not in name}


def test_the_module_map_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for package in PACKAGES:
        section = text.split(f"\n## {package}\n")[1].split("\n## ")[0]
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        named = {name for row in rows for name in re.findall(r"`([a-z0-9_.]+)(?<!\.bin)`", row)}
        paths = [path.relative_to(ROOT / package).with_suffix("") for path in (ROOT / package).rglob("*.py")]
        modules = {".".join(path.parts).removesuffix(".__init__") for path in paths} - {"__init__", "data"}
        assert named == modules, f"bring section {package} of docs/architecture.md up to date"
