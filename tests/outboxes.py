"""Outboxes in a folder of the test's own, and disks that are full."""

from __future__ import annotations

import errno
from pathlib import Path

from edge_client.events import Kept
from edge_client.outbox import Outbox
from edge_client.state_files import Disk, Owner
from tests.driven_session import PLAN, UPDATE

OWNER = Owner("in-process", "demo", "ann")
KEPT = Kept(PLAN.nonce, UPDATE)


class FullDisk(Disk):
    """Half of every write fits."""

    def write(self, file: int, data: bytes) -> None:
        super().write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


class DiskThatIsFullFor(Disk):
    """So many writes fail, then there is room again."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def write(self, file: int, data: bytes) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(file, data)


def outbox_in(folder: Path, disk: Disk | None = None, owner: Owner = OWNER) -> tuple[Outbox, list[str]]:
    lines: list[str] = []
    return Outbox(folder, owner, lines.append, disk), lines


def file_in(folder: Path) -> Path:
    return folder / OWNER.folder_name / "update"
