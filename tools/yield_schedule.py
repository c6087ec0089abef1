"""What comes over a machine while an agent works on it, and when: a pure function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cpu", "memory", "mains"]

# How the agent says it, in the sentence that follows "paused: ".
SAYS: dict[Kind, str] = {
    "cpu": "Other programs use",
    "memory": "Free memory is",
    "mains": "The machine runs on its battery",
}
CALM_S = (12.0, 25.0)
LOAD_S = (15.0, 40.0)
BACK_S = 8.0  # until the agent has noticed the end of a load, and worked for a while


@dataclass(frozen=True)
class Load:
    """Something that needs the machine, after the agent has worked in peace for `calm_s`, for `load_s`."""

    kind: Kind
    calm_s: float
    load_s: float


def schedule(seed: int, seconds: float, quiet_s: float, kinds: tuple[Kind, ...]) -> tuple[Load, ...]:
    """As many loads as `seconds` hold, at least one of each kind; the first kind comes twice as often."""
    source = random.Random(f"kseed soak-yield {seed}")
    loads: list[Load] = []
    deck: list[Kind] = []
    used_s = 0.0
    while used_s < seconds or len(loads) < len(kinds):
        if not deck:
            deck = [*kinds, *kinds[:1]]  # the first kind, the CPU, twice
            source.shuffle(deck)
        load = Load(deck.pop(), source.uniform(*CALM_S), source.uniform(*LOAD_S))
        loads.append(load)
        used_s += load.calm_s + load.load_s + BACK_S + (quiet_s if load.kind == "cpu" else 0.0)
    return tuple(loads)
