"""A device whose configuration a test writes, and the doctor that is asked about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from edge_client import cli
from edge_client.config import EdgeConfig
from edge_client.doctor.check import Finding
from edge_client.operations import read_config
from tests.programs import write_settings
from tests.secure_broker import running
from tools.broker import free_port


class Patient:
    """One device's configuration file, and the doctor that is asked about it."""

    def __init__(self, folder: Path, call: Any) -> None:
        self._call = call
        self.file = folder / "kseed.toml"
        self.tables: dict[str, dict[str, Any]] = {
            "agent": {"run": "spring", "device": "ann", "state_dir": folder / "state"},
            "data": {"source": folder / "reviews.jsonl"},
            "broker": {},
        }

    @contextmanager
    def at_a_broker(self, **made: Any) -> Iterator[None]:
        """With a broker of its own, made as `running` takes it."""
        with running(self.file.parent / "mosquitto", "ann", **made) as broker:
            self.tables["broker"] = broker.settings("ann")
            yield

    def at_no_broker(self) -> None:
        """With the address of a broker that does not run."""
        self.tables["broker"] = {"host": "127.0.0.1", "port": free_port()}

    def write(self) -> None:
        write_settings(self.file, self.tables)

    def config(self) -> EdgeConfig:
        """As a command reads it."""
        self.write()
        return read_config(self.file, {}, {})

    def say(self, *words: str) -> tuple[int, str]:
        """Exit code and stdout of the doctor; it says nothing on stderr."""
        self.write()
        code, out, err = self._call(cli, "doctor", "--config", self.file, *words)
        assert err == ""
        return code, out

    def findings(self) -> dict[str, Finding]:
        """What it found, by the name of the check, with its exit code checked."""
        code, out = self.say("--quick", "--json")
        told = json.loads(out)
        found = {one["name"]: msgspec.convert(one, Finding) for one in told["findings"]}
        assert told["failed"] == sum(one.verdict == "failed" for one in found.values())
        assert code == (told["failed"] > 0)
        return found

    def failed(self, name: str) -> Finding:
        """The one check that failed; each that did has to say what to do."""
        found = self.findings()
        failures = [one for one in found.values() if one.verdict == "failed"]
        assert [one.name for one in failures] == [name], failures
        assert failures[0].remedy
        return failures[0]


def skipped(found: dict[str, Finding]) -> set[str]:
    return {name for name, one in found.items() if one.verdict == "skipped"}
