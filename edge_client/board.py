"""The board between an agent and its owner: small files in the agent's folder, that only the owner of the files reads.

The agent holds the lock while it lives and publishes its status; the owner's commands leave a wish. Files work on every
system, need no port, and a wish is still there when the agent starts again. Nothing here is sent anywhere.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from edge_client.policy import Wish
from edge_client.state_files import Disk, read_whole, write_whole
from shared.errors import UnavailableError, UserError

WISH, STATUS, LOCK, LOG = "wish.json", "status.json", "lock", "log"
LOCK_WAIT_S = 1.0  # `is_alive` of another process shares the lock for an instant


class Board:
    """The folder of one agent. Reading never raises; what cannot be read is told as such."""

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        self.folder = folder
        self._disk = disk or Disk()

    def wish(self) -> Wish | None:
        """What the owner wants. A wish that cannot be read is a pause: the owner wanted something, surely not work."""
        try:
            data = read_whole(self.folder / WISH)
            return None if data is None else msgspec.json.decode(data, type=Wish)
        except (OSError, ValueError):  # msgspec's errors are ValueErrors
            return Wish("pause", 0.0)

    def is_finish_asked(self) -> bool:
        """Whether the owner wants the agent to leave after its round."""
        wish = self.wish()
        return wish is not None and wish.kind == "finish"

    def want(self, wish: Wish | None) -> None:
        """Leave a wish for the agent, or take it back. Raises UnavailableError where the disk refuses."""
        try:
            if wish is None:
                self._disk.remove(self.folder / WISH)
            else:
                write_whole(self._disk, self.folder / WISH, msgspec.json.encode(wish))
        except OSError as error:
            raise UnavailableError(
                f"{self.folder / WISH} cannot be written: {error.strerror}. Check the folder and its disk."
            ) from error

    def post(self, status: bytes) -> None:
        """Publish the status: whoever reads gets all of the old one or all of the new one. Raises OSError.

        It is not synced: after a power cut nobody asks what the agent was doing, and syncing wears out memory cards.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.folder / f"{STATUS}.new"
        new.write_bytes(status)
        self._disk.replace(new, self.folder / STATUS)

    def status(self) -> bytes | None:
        """The status as it was published last; None where there is none."""
        try:
            return read_whole(self.folder / STATUS)
        except (OSError, ValueError):
            return None

    def is_alive(self) -> bool:
        """Whether an agent holds this folder just now, in whatever container, and however the clock was set since."""
        if not (self.folder / LOCK).exists():
            return False
        try:
            with closing(sqlite3.connect(self.folder / LOCK, timeout=0.0)) as connection:
                connection.execute("SELECT 1 FROM sqlite_master")  # a lock that others who ask may share
        except sqlite3.Error as error:
            return "locked" in str(error)
        return False


class Life:
    """An agent at work in `folder`, until `end` or until its process dies, however it dies."""

    def __init__(self, folder: Path, *, wait_s: float = LOCK_WAIT_S) -> None:
        """Raises UserError where another process lives there, UnavailableError where nobody can know."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # sqlite's own file lock: it works on every system and dies with the process.
            self._connection = sqlite3.connect(folder / LOCK, timeout=wait_s, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(f"{folder / LOCK} cannot be opened: {error}. Check the folder.") from error
        try:
            self._connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            self._connection.close()
            if "locked" in str(error):
                raise UserError(
                    f"an agent of this device and run is at work here already ({folder / LOCK} is locked). "
                    "See kseed-edge status, or give this one another --device-id."
                ) from error
            raise UnavailableError(f"{folder / LOCK} cannot be locked: {error}. Check the folder.") from error

    def end(self) -> None:
        """Give the folder back. The file stays: removing it would race with the next one."""
        self._connection.close()
