"""Folders that a command makes, fills, and empties when it runs again, and no other folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """Where a command that plays a whole run keeps what."""

    out: Path

    @property
    def base(self) -> Path:
        """What the run starts from."""
        return self.out / "base.json"

    @property
    def store(self) -> Path:
        """The aggregator's store."""
        return self.out / "aggregator.sqlite3"

    @property
    def report(self) -> Path:
        """The report for programs."""
        return self.out / "report.json"


def prepare_folder(out: Path, command: str) -> None:
    """Make `out` an empty folder of `kseed <command>`. Raises UserError if it holds what is not from an earlier one."""
    marker = out / f"kseed-{command}.txt"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not marker.is_file())):
        raise UserError(f"--out {out} holds something else than an earlier {command}; choose a new or empty folder.")
    try:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        marker.write_text(f"Made by `kseed {command}`, which deletes this folder when it runs again.\n")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}. Choose another folder.") from error
