"""Topic names (PROTOCOL.md, section "Topics") and the ids that stand in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from shared.errors import UserError

ROOT = "kseed"
Kind = Literal["run", "plan", "snapshot", "update", "receipt", "presence"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PER_DEVICE: frozenset[Kind] = frozenset({"update", "receipt", "presence"})
LONGEST_TOPIC = 144  # bytes: kseed/<64>/presence/<64>
_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


def is_id(value: str) -> bool:
    """True where `value` may stand in a topic as the id of a run or device."""
    return _ID.fullmatch(value) is not None


def check_id(what: str, value: str) -> str:
    """Return `value` if it may stand in a topic as the id of a run or device.

    Raises UserError otherwise.
    """
    if not is_id(value):
        raise UserError(
            f"{what} is {value!r}; an id has 1 to 64 characters of a-z, 0-9 and '-', "
            "and starts and ends with a letter or digit. Choose another one."
        )
    return value


@dataclass(frozen=True)
class Topic:
    """A topic of one run: `kseed/<run>/<kind>` or `kseed/<run>/<kind>/<device>`."""

    run: str
    kind: Kind
    device: str | None = None

    def __str__(self) -> str:
        tail = f"/{self.device}" if self.device is not None else ""
        return f"{ROOT}/{self.run}/{self.kind}{tail}"


def parse_topic(text: str) -> Topic | None:
    """The topic that `text` names, or None where it is not one of ours (never raises: topics come off the wire)."""
    parts = text.split("/")
    if len(parts) not in (3, 4) or parts[0] != ROOT or parts[2] not in KINDS:
        return None
    if any(not is_id(part) for part in parts[1:2] + parts[3:]):
        return None
    kind: Kind = parts[2]
    if (kind in PER_DEVICE) != (len(parts) == 4):
        return None
    return Topic(parts[1], kind, parts[3] if len(parts) == 4 else None)


def every_device(run: str, kind: Kind) -> str:
    """The subscription filter for `kind` of every device of `run`."""
    return f"{ROOT}/{run}/{kind}/+"
