"""The update that waits for its receipt, on disk: written before it is sent, removed once its round is over.

It holds one update, as a device works on one round at a time. After a kill the same bytes are sent again, which the
aggregator tells from another update of the same round. Whatever happens to the disk, the round goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_client.events import Kept
from edge_client.state_files import Disk, Owner, read_whole, sealed, set_aside, unsealed, write_whole
from shared.errors import PeerError
from shared.messages import Update
from shared.wire import decode, encode

KIND = "kseed update 1"
RETRY_S = 10.0


class NoOutbox:
    """Keeps nothing."""

    def read(self) -> Kept | None:
        """There is nothing."""
        return None

    def keep(self, kept: Kept) -> None:
        """Leaves it."""

    def retry(self, now_s: float) -> None:
        """Nothing waits."""

    def forget(self) -> None:
        """There is nothing."""


class Outbox(NoOutbox):
    """One device's waiting update, under `folder`. `say` tells people what went wrong."""

    def __init__(self, folder: Path, owner: Owner, say: Callable[[str], None], disk: Disk | None = None) -> None:
        self._path = folder / owner.folder_name / "update"
        self._owner = owner
        self._say = say
        self._disk = disk or Disk()
        self._unwritten: Kept | None = None
        self._retry_s = 0.0

    def read(self) -> Kept | None:
        """What an earlier life of this agent left. A file that cannot be used is set aside, in a line."""
        try:
            data = read_whole(self._path)
            return None if data is None else self._parsed(data)
        except OSError as error:
            self._say(f"warning: the outbox {self._path} cannot be read: {error.strerror}; going on without it")
        except (ValueError, PeerError) as error:
            self._say(f"warning: ignored the outbox {self._path}: {error}; {set_aside(self._path)}")
        return None

    def _parsed(self, data: bytes) -> Kept:
        fields, _, rest = unsealed(self._owner, KIND, data)
        nonce, payload = (bytes.fromhex(str(fields.get(name))) for name in ("nonce", "payload"))
        update = decode("update", payload)
        if rest or not isinstance(update, Update) or encode(update) != payload:
            raise ValueError("its update would not be sent as it was")
        return Kept(nonce, update)

    def keep(self, kept: Kept) -> None:
        """Write the update down for good, before it is sent."""
        self._unwritten = None
        try:
            self._write(kept)
        except OSError as error:
            self._unwritten = kept
            self._say(
                f"warning: the update of round {kept.update.round} cannot be written to {self._path}: "
                f"{error.strerror}. It is sent from memory, and lost if this agent ends before its receipt."
            )

    def retry(self, now_s: float) -> None:
        """Write down what the disk refused before; it may have room again. now_s: monotonic."""
        if self._unwritten is None or now_s < self._retry_s:
            return
        self._retry_s = now_s + RETRY_S
        try:
            self._write(self._unwritten)
        except OSError:
            return  # said before
        self._say(f"the update of round {self._unwritten.update.round} is written to {self._path} now")
        self._unwritten = None

    def _write(self, kept: Kept) -> None:
        payload = encode(kept.update).hex()
        data = sealed(self._owner, KIND, round=kept.update.round, nonce=kept.nonce.hex(), payload=payload)
        write_whole(self._disk, self._path, data)

    def forget(self) -> None:
        """The round of the update is over, or a receipt has settled it."""
        self._unwritten = None
        try:
            self._disk.remove(self._path)
        except OSError as error:  # the next plan shows that it is old
            self._say(f"warning: the outbox {self._path} cannot be removed: {error.strerror}")
