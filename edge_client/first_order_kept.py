"""What a first-order device must not forget when it is killed: a round's progress, and what it could not yet say.

One sealed file, written whole: the offsets' change, Adam's two means, how far the steps are, and the error feedback:
the part of the coefficient changes that the fewer bits of updates left out, which the next update says. A refused
update has said nothing (`take_back`). It is of one run; another run's is dropped. Nothing in it is needed: without it a
round begins again, and what was left out is lost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.first_order_steps import Progress, change_of
from edge_client.state_files import Disk, Owner, read_whole, sealed, set_aside, unsealed, write_whole

KIND = "kseed gradient 2"
SYNC_S = 10.0  # a kill loses the gradient steps of this long

Floats32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RoundUnderWay:
    """A round's steps and what earlier updates left unsaid. `run` and `work` are digests."""

    run: bytes
    work: bytes
    round: int
    progress: Progress
    unsaid: NDArray[np.float64]  # of the coefficients' change, before this round's update; (K,)
    told: NDArray[np.float64] | None = None  # by this round's update, once it is made; (K,)

    @classmethod
    def first(cls, run: bytes, work: bytes, number: int, seeds: int) -> RoundUnderWay:
        """Before a run's first step on this device."""
        return cls(run, work, number, Progress.of(seeds), np.zeros(seeds))

    @property
    def to_say(self) -> Floats32:
        """The change that an update made now would tell without loss: float32 (K,)."""
        return (change_of(self.progress.moved) + self.unsaid).astype(np.float32)

    def followed_by(self, work: bytes, number: int) -> RoundUnderWay:
        """The next round. One without an update, or with a refused one, said nothing, and its steps are forgotten."""
        unsaid = self.unsaid if self.told is None else self.to_say - self.told
        return RoundUnderWay(self.run, work, number, self.progress.next_round(), unsaid)


class KeptGradient:
    """The file of one device, under `folder`. `say` tells people what went wrong; `now_s` is monotonic."""

    def __init__(
        self,
        folder: Path,
        owner: Owner,
        agent: str,
        say: Callable[[str], None],
        now_s: Callable[[], float],
        disk: Disk | None = None,
    ) -> None:
        """agent: software and version; other software may take other steps."""
        self.agent = agent
        self._path = folder / owner.folder_name / "gradient"
        self._owner = owner
        self._say = say
        self._now_s = now_s
        self._disk = disk or Disk()
        self._saved_s = -math.inf

    def read(self, run: bytes, seeds: int) -> RoundUnderWay | None:
        """What an earlier life or round left of this run; None where there is nothing that can be used."""
        kept = self._read()
        return kept if kept is not None and kept.run == run and kept.unsaid.size == seeds else None

    def take_back(self, number: int) -> None:
        """The update of round `number` was refused: what it told of earlier rounds is unsaid again."""
        kept = self._read()
        if kept is not None and kept.round == number and kept.told is not None:
            self.save(replace(kept, told=None), at_once=True)

    def _read(self) -> RoundUnderWay | None:
        try:
            data = read_whole(self._path)
            return None if data is None else _unpacked(self._owner, data)
        except OSError as error:
            self._say(f"warning: the progress kept in {self._path} cannot be read: {error.strerror}; beginning again")
        except (ValueError, KeyError, TypeError) as error:
            self._say(f"warning: ignored the progress kept in {self._path}: {error}; {set_aside(self._path)}")
        return None

    def save(self, now: RoundUnderWay, *, at_once: bool = False) -> None:
        """Keep `now`, unless that was done a moment ago and need not be `at_once`. A full disk costs a warning."""
        if not at_once and self._now_s() - self._saved_s < SYNC_S:
            return
        try:
            write_whole(self._disk, self._path, _packed(self._owner, now))
        except OSError as error:
            self._say(f"warning: this round's progress cannot be kept in {self._path}: {error.strerror}")
        self._saved_s = self._now_s()


def _packed(owner: Owner, now: RoundUnderWay) -> bytes:
    progress = now.progress
    told = np.zeros_like(now.unsaid) if now.told is None else now.told
    arrays = np.stack((progress.moved, progress.mean, progress.square, now.unsaid, told)).astype("<f8").tobytes()
    return (
        sealed(
            owner,
            KIND,
            run_digest=now.run.hex(),
            work=now.work.hex(),
            round=now.round,
            is_told=now.told is not None,
            seen=progress.seen,
            steps=progress.steps,
            loss_sum=progress.loss_sum,
            arrays=hashlib.sha256(arrays).hexdigest(),
        )
        + arrays
    )


def _unpacked(owner: Owner, data: bytes) -> RoundUnderWay:
    """Raises ValueError, KeyError or TypeError for anything but a whole file of `owner`'s."""
    fields, _, body = unsealed(owner, KIND, data)
    if fields["arrays"] != hashlib.sha256(body).hexdigest():
        raise ValueError("its numbers do not match their SHA-256")
    moved, mean, square, unsaid, told = np.frombuffer(body, "<f8").reshape(5, -1).astype(np.float64)
    number, seen, steps, loss_sum = (fields[name] for name in ("round", "seen", "steps", "loss_sum"))
    if not (isinstance(number, int) and isinstance(seen, int) and isinstance(steps, int)):
        raise ValueError("its counts are no numbers")
    if not isinstance(loss_sum, float):
        raise ValueError("its loss is no number")
    progress = Progress(moved, mean, square, seen, steps, loss_sum)
    run, work = (bytes.fromhex(str(fields[name])) for name in ("run_digest", "work"))
    return RoundUnderWay(run, work, number, progress, unsaid, told if fields["is_told"] else None)


def begun(kept: RoundUnderWay | None, run: bytes, work: bytes, number: int, seeds: int) -> RoundUnderWay:
    """Where to go on: in the middle of `work`, at the beginning of it, or at the beginning of everything."""
    if kept is None:
        return RoundUnderWay.first(run, work, number, seeds)
    return replace(kept, told=None) if kept.work == work else kept.followed_by(work, number)
