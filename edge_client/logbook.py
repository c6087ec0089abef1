"""The agent's log: what it says to people, with the time, in a file that is never larger than a few megabytes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

LARGEST_BYTES = 1_000_000
OLD_FILES = 2
POLL_S = 0.5  # of `follow`


class _Quiet(RotatingFileHandler):
    """A full disk is no reason to stop, nor to fill another one with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the line out."""


class Logbook:
    """Writes to `path`; older lines are in `path`.1 and .2. What cannot be written is left out."""

    def __init__(self, path: Path) -> None:
        self._handler: logging.Handler
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handler = _Quiet(path, maxBytes=LARGEST_BYTES, backupCount=OLD_FILES, encoding="utf-8")
        except OSError:
            self._handler = logging.NullHandler()
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def add(self, text: str) -> None:
        """One line."""
        self._handler.handle(logging.LogRecord("kseed", logging.INFO, "", 0, "%s", (text,), None))

    def close(self) -> None:
        """Let go of the file."""
        with suppress(OSError):  # what a full disk did not take before, it does not take now
            self._handler.close()


def tail(path: Path, count: int) -> list[str]:
    """The last lines, of the file before as well where there are too few. Raises OSError."""
    lines = _lines(path)
    before = path.with_name(f"{path.name}.1")
    if len(lines) < count and before.exists():
        lines = _lines(before) + lines
    return lines[-count:] if count else []


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def follow(path: Path) -> Iterator[str]:
    """What is added from this call on, text as it comes, across rotations, for ever. Raises OSError."""
    stream = path.open(encoding="utf-8", errors="replace")
    stream.seek(0, os.SEEK_END)
    return _added(path, stream)


def _is_rotated(path: Path, stream: TextIO) -> bool:
    """Whether `path` is another file than the one that is open; the new one comes with the next line."""
    try:
        return path.stat().st_ino != os.fstat(stream.fileno()).st_ino
    except FileNotFoundError:
        return False


def _added(path: Path, stream: TextIO) -> Iterator[str]:
    while True:
        is_old = _is_rotated(path, stream)  # asked before reading
        if text := stream.read():
            yield text
        elif is_old:
            stream.close()
            stream = path.open(encoding="utf-8", errors="replace")
        else:
            time.sleep(POLL_S)
