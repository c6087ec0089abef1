"""The fast replay of many updates against its definitions in `shared`: the same bits, one device after the other."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import replay
from aggregator.replay import Work, draw_of_many, replayed
from aggregator.state import plan_of
from shared.changes import read_change, write_change
from shared.messages import Plan
from shared.seeds import draw
from shared.steprule import deltas
from shared.wire import scalars_to_bytes
from tests.runs import opened, update_of

RNG = np.random.default_rng(7)
PLAN = plan_of(opened(step="normalised", local_steps=9))
FACTS = opened().spec.facts


@given(
    st.binary(min_size=16, max_size=16),
    st.lists(st.from_regex(r"[a-z0-9]{1,12}", fullmatch=True), min_size=1, max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, bytes(256), bytes(range(256)), bytes([255]) * 256, bytes(255) + b"\xff"]),
)
def test_many_devices_draw_what_each_draws(nonce: bytes, devices: list[str], steps: int, levels: bytes | None) -> None:
    rows = draw_of_many(nonce, devices, steps, 256, levels)
    for device, row in zip(devices, rows, strict=True):
        assert row.tolist() == draw(nonce, device, steps, 256, levels).tolist()


def test_many_devices_draw_what_each_draws_of_the_largest_pool() -> None:
    levels = bytes([255]) * 65536  # the largest sum of weights: 34 bits
    rows = draw_of_many(b"n" * 16, ["a", "b"], 500, 65536, levels)
    assert rows[1].tolist() == draw(b"n" * 16, "b", 500, 65536, levels).tolist()


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(1, 2**34 - 1))
def test_the_upper_half_of_a_long_product_is_exact(low: int, high: int, factor: int) -> None:
    got = replay._top_64_bits(np.array([low], np.uint64), np.array([high], np.uint64), factor)
    assert got.tolist() == [((low + (high << 32)) * factor) >> 64]


def work(device: str, steps: int, plan: Plan = PLAN, staleness: int = 0) -> Work:
    scalars = RNG.normal(size=steps).astype(np.float32)
    return Work(device, update_of(plan.round, scalars=scalars_to_bytes(scalars, "f32")), plan, staleness)


@pytest.mark.parametrize("at_once", [1, 30, 2**17])
@pytest.mark.parametrize("common", [False, True])
def test_a_replayed_round_is_each_device_replayed(monkeypatch: pytest.MonkeyPatch, at_once: int, common: bool) -> None:
    monkeypatch.setattr(replay, "MAX_STEPS_AT_ONCE", at_once)
    plan = plan_of(opened(step="normalised", local_steps=9, common_seeds=common))
    other = plan_of(opened(local_steps=9, lr=0.125))
    works = [work(f"d{i}", 1 + i % 9, other if i % 3 == 0 else plan, i % 3) for i in range(20)]
    done = list(replayed(works, FACTS))
    assert [one.device for one in done] == [one.device for one in works]
    for one, given_ in zip(done, works, strict=True):
        scalars = np.frombuffer(given_.update.scalars, np.float32)
        name = None if given_.plan.common_seeds else one.device
        assert one.seeds.tolist() == draw(given_.plan.nonce, name, scalars.size, 256, None).tolist()
        assert one.scalars.tobytes() == scalars.tobytes()
        assert one.deltas.tobytes() == deltas(given_.plan.step, scalars).tobytes()
        assert (one.samples, one.staleness) == (10, given_.staleness)


def test_only_a_part_of_a_large_round_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_STEPS_AT_ONCE", 18)  # two devices of nine steps
    read: list[int] = []

    def works() -> object:
        for number in range(10):
            read.append(number)
            yield work(f"d{number}", 9)

    contributions = replayed(works(), FACTS)  # type: ignore[arg-type]
    next(contributions)
    assert read == [0, 1]


def test_only_one_change_of_first_order_devices_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = opened(first_order="accept", step="normalised").spec.facts
    change = write_change(None, np.ones(256), "f32")
    first = Work("a", msgspec.structs.replace(update_of(0), scalars=b"", change=change), PLAN)
    read: list[int] = []

    def spy(*arguments: Any) -> Any:
        read.append(1)
        return read_change(*arguments)

    monkeypatch.setattr(replay, "read_change", spy)
    contributions = replayed([first, work("b", 9), first], facts)
    assert next(contributions).deltas.tolist() == [1.0] * 256
    assert len(read) == 1
    assert [one.device for one in contributions] == ["b", "a"]
