"""When memory runs out: less at once, and the same result; at one sequence, a refusal that says what to do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from edge_client.data.batches import Batch
from shared.errors import UserError

# What the allocators of torch (CPU on Linux, on Windows, MPS), mmap and cuBLAS say; only CUDA's has a type of its own.
SAYINGS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "cublas_status_alloc_failed",
)
T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Did the machine or the GPU have too little memory?"""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in SAYINGS)


class TooLittleMemory(UserError):
    """Memory ran out, and there is nothing left to make smaller here."""


class Portions:
    """How many sequences go through the model at once. Halved when memory runs out, and it stays so."""

    def __init__(self, what: str, say: Callable[[str], None], at_once: int | None = None) -> None:
        """what: the work, for people. at_once: None for as many as there are."""
        self.at_once = at_once
        self._what = what
        self._say = say

    def attempt(self, measure: Callable[[], T], rows: int) -> T:
        """`measure()`, which takes `rows` sequences `at_once`; done all over with fewer when memory runs out.

        All over, because both losses of a probe must come about in the same way: rounding depends on the batch's
        shape. Raises TooLittleMemory where one sequence is too much, and whatever else `measure` raises.
        """
        while True:
            try:
                return measure()
            except (MemoryError, RuntimeError) as error:
                self.shrink(error, rows)
            release()  # outside of the handler: while the error lives, its frames hold the tensors

    def shrink(self, error: MemoryError | RuntimeError, rows: int) -> None:
        """Halve, after `error` at `rows` sequences. Raises TooLittleMemory at one, `error` if it is another matter."""
        if not is_out_of_memory(error):
            raise error
        now = min(self.at_once or rows, rows)
        why = str(error).strip().splitlines()
        because = f" ({why[0][:200]})" if why else ""
        if now == 1:
            raise TooLittleMemory(
                f"{self._what}: memory ran out with a single sequence{because}. "
                "Lower max_length, free some memory, or take a smaller model."
            ) from error
        self.at_once = (now + 1) // 2
        self._say(
            f"warning: {self._what}: memory ran out with {now} sequences at once{because}; from here on "
            f"{self.at_once} at once, which takes longer and changes nothing else"
        )


@contextmanager
def must_fit(what: str) -> Iterator[None]:
    """For work that cannot be done in portions. Raises TooLittleMemory where memory runs out in it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TooLittleMemory(f"{what} ({error}). Free some memory, or take a smaller model.") from error


def in_portions(batch: Batch, at_once: int | None) -> list[Batch]:
    """`batch` as batches of up to `at_once` sequences, in their order, without padding that none of them needs."""
    rows = len(batch.input_ids)
    if at_once is None or rows <= at_once:
        return [batch]
    return [batch.rows(start, start + at_once) for start in range(0, rows, at_once)]


def release() -> None:
    """Give back what is not used any more."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
