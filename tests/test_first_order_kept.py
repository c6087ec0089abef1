"""What a first-order device keeps: its round after a kill, and what its updates could not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_client.first_order_kept import SYNC_S, KeptGradient, RoundUnderWay, begun
from edge_client.first_order_steps import Progress, advanced, change_of
from edge_client.state_files import Disk, Owner

K = 256
RUN, WORK, NEXT = b"r" * 32, b"w" * 32, b"n" * 32
OWNER = Owner("localhost:1883", "a-run", "a-device")


class Dying(Disk):
    """Fails at a given call, as where the machine dies there."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _call(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def write(self, file: int, data: bytes) -> None:
        self._call()
        super().write(file, data[: len(data) // 2])
        super().write(file, data[len(data) // 2 :])

    def sync(self, file: int) -> None:
        self._call()
        super().sync(file)

    def replace(self, source: Path, target: Path) -> None:
        self._call()
        super().replace(source, target)


def after(steps: int, seed: int = 0) -> Progress:
    rng = np.random.default_rng(seed)
    progress = Progress.of(K)
    for _ in range(steps):
        progress = advanced(progress, 0.7, rng.standard_normal(K), 1e-3)
    return progress


def round_of(steps: int, *, is_told: bool = False) -> RoundUnderWay:
    now = RoundUnderWay(RUN, WORK, 3, after(steps), 1e-4 * np.random.default_rng(1).standard_normal(K))
    return replace(now, told=rounded(now.to_say)) if is_told else now


def kept(folder: Path, said: list[str] | None = None, now_s: Callable[[], float] = lambda: 0.0) -> KeptGradient:
    return KeptGradient(folder, OWNER, "kseed test", [].append if said is None else said.append, now_s)


def rounded(change: np.ndarray) -> np.ndarray:
    """An update's form that loses much."""
    return np.round(change.astype(np.float64) * 1e5) / 1e5


def facts(now: RoundUnderWay | None) -> tuple[object, ...]:
    assert now is not None
    arrays = (now.progress.moved, now.progress.mean, now.progress.square, now.unsaid)
    counts = (now.progress.seen, now.progress.steps, now.progress.loss_sum)
    return (
        now.run,
        now.work,
        now.round,
        counts,
        now.told is not None and now.told.tobytes(),
        *(array.tobytes() for array in arrays),
    )


def test_progress_comes_back_to_the_bit(tmp_path: Path) -> None:
    now = round_of(3, is_told=True)
    kept(tmp_path).save(now)
    assert facts(kept(tmp_path).read(RUN, K)) == facts(now)


def test_another_run_or_another_number_of_seeds_begins_afresh(tmp_path: Path) -> None:
    kept(tmp_path).save(round_of(3))
    assert kept(tmp_path).read(b"x" * 32, K) is None
    assert kept(tmp_path).read(RUN, 2 * K) is None
    assert kept(tmp_path / "nowhere").read(RUN, K) is None


@pytest.mark.parametrize("cut", [10, 300, 1000, -1])
def test_a_damaged_file_is_set_aside_with_a_line(cut: int, tmp_path: Path) -> None:
    kept(tmp_path).save(round_of(3))
    (path,) = tmp_path.glob("*/gradient")
    path.write_bytes(path.read_bytes()[:cut])
    said: list[str] = []
    assert kept(tmp_path, said).read(RUN, K) is None
    assert len(said) == 1 and "set aside as gradient.set-aside" in said[0]


@pytest.mark.parametrize("instant", range(4))
def test_a_kill_while_saving_leaves_the_old_progress_or_the_new(instant: int, tmp_path: Path) -> None:
    old, new = round_of(3), round_of(5)
    kept(tmp_path).save(old)
    writer = KeptGradient(tmp_path, OWNER, "kseed test", [].append, lambda: 0.0, Dying(instant))
    with pytest.raises(KeyboardInterrupt):
        writer.save(new)
    assert facts(kept(tmp_path).read(RUN, K)) == facts(new if instant == 3 else old)


def test_a_disk_that_refuses_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / OWNER.folder_name).write_text("a file where the folder should be")
    said: list[str] = []
    kept(tmp_path, said).save(round_of(3))
    assert len(said) == 1 and said[0].startswith("warning: this round's progress cannot be kept")


def test_progress_is_saved_now_and_then_and_at_once_where_that_matters(tmp_path: Path) -> None:
    clock = [0.0]
    writer = kept(tmp_path, now_s=lambda: clock[0])

    def steps() -> int:
        now = kept(tmp_path).read(RUN, K)
        assert now is not None
        return now.progress.steps

    writer.save(round_of(1))
    writer.save(round_of(2))
    assert steps() == 1
    clock[0] = SYNC_S
    writer.save(round_of(3))
    writer.save(round_of(4), at_once=True)
    assert steps() == 4


def test_a_round_under_way_goes_on_and_a_first_one_begins() -> None:
    first = begun(None, RUN, WORK, 3, K)
    assert first.progress.steps == 0 and not first.unsaid.any()
    now = round_of(3)
    assert facts(begun(now, RUN, WORK, 3, K)) == facts(now)


def test_what_an_update_left_out_is_said_by_the_next() -> None:
    now = round_of(3, is_told=True)
    following = begun(now, RUN, NEXT, 4, K)
    assert following.progress.steps == 0 and following.progress.seen == 3 and not following.progress.moved.any()
    assert np.abs(following.unsaid).max() <= 0.5e-5 * 1.01
    assert now.told is not None and np.allclose(
        now.told + following.to_say, change_of(now.progress.moved) + now.unsaid, atol=1e-9
    )


def test_a_round_without_an_update_is_forgotten_but_not_what_was_unsaid_before() -> None:
    now = round_of(3)
    following = begun(now, RUN, NEXT, 4, K)
    assert np.array_equal(following.unsaid, now.unsaid)
    assert np.array_equal(following.to_say, now.unsaid.astype(np.float32))


def test_an_update_made_again_after_a_kill_says_the_same() -> None:
    now = round_of(3, is_told=True)
    again = begun(now, RUN, WORK, 3, K)
    assert again.told is None and np.array_equal(again.to_say, now.to_say)


def test_what_a_refused_update_told_of_earlier_rounds_is_unsaid_again(tmp_path: Path) -> None:
    now = round_of(3, is_told=True)
    kept(tmp_path).save(now)
    kept(tmp_path).take_back(3)
    again = kept(tmp_path).read(RUN, K)
    assert again is not None and again.told is None
    assert np.array_equal(begun(again, RUN, NEXT, 4, K).unsaid, now.unsaid)


def test_a_refusal_of_another_round_takes_nothing_back(tmp_path: Path) -> None:
    kept(tmp_path).take_back(3)
    assert not list(tmp_path.glob("*/gradient"))
    now = round_of(3, is_told=True)
    kept(tmp_path).save(now)
    kept(tmp_path).take_back(2)
    assert facts(kept(tmp_path).read(RUN, K)) == facts(now)
