"""Whatever the network does, the coefficients are the fold of the accepted updates, bit for bit."""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aggregator.config import RunConfig
from aggregator.spec import nonce
from aggregator.verification import verify
from shared.faults import Fault, Faults, Strike
from shared.messages import Update
from shared.seeds import draw
from shared.wire import decode
from tests.small_fleet import SmallFleet

ROUNDS = 6
CONFIG = RunConfig(
    seeds=256,
    rounds=ROUNDS,
    local_steps=5,
    batch_size=1,
    scalar_format="f32",
    change_format="f32",
    step="plain",
    lr=0.02,
    quorum=3,
    deadline_s=20.0,
    server_scale="sum",
)
DEVICES = ("ann", "bob", "charly")
FIVE = (Fault.DROP, Fault.DUPLICATE, Fault.REORDER, Fault.DELAY, Fault.VANISH)


def accepted_updates(store: Path) -> dict[int, dict[str, Update]]:
    """What the store has, read past all of its code: round -> device -> update."""
    rounds: dict[int, dict[str, Update]] = {}
    with sqlite3.connect(store) as database:
        for number, device, payload in database.execute("SELECT round, device, payload FROM updates"):
            update = decode("update", payload)
            assert isinstance(update, Update)
            assert device not in rounds.setdefault(number, {}), "an update was stored twice"
            rounds[number][device] = update
    return rounds


def fold(fleet: SmallFleet) -> np.ndarray:
    """The coefficients that the accepted updates make, by FedKSeed's formula, step by step."""
    config = fleet.spec.config
    a = carried = np.zeros(config.seeds, np.float32)
    rounds = accepted_updates(fleet.store.path)
    for number in range(fleet.store.run("demo").progress.round):
        updates = rounds[number]
        total = sum(update.samples for update in updates.values())
        combined = np.zeros(config.seeds, np.float64)
        for device in sorted(updates):
            scalars = np.frombuffer(updates[device].scalars, "<f4")
            seeds = draw(nonce(fleet.spec, number), device, len(scalars), config.seeds, None)
            change = np.zeros(config.seeds, np.float64)
            for seed, g in zip(seeds, scalars, strict=True):
                change[seed] += np.float32(-config.lr * float(g))
            combined += updates[device].samples / total * change
        wanted = carried.astype(np.float64) + len(updates) * combined
        after = np.where(combined != 0, a + wanted.astype(np.float32), a)
        a, carried = after, (wanted - (after.astype(np.float64) - a)).astype(np.float32)
    return a


def check(fleet: SmallFleet, *, is_folded: bool = True) -> None:
    """The end of every test here. `is_folded` False: the run has settings that `fold` does not know."""
    assert all(report.outcome == "combined" and not report.left_out for report, _ in fleet.store.reports("demo"))
    assert len(fleet.store.reports("demo")) == ROUNDS
    if is_folded:
        np.testing.assert_array_equal(fleet.coefficients.view(np.uint32), fold(fleet).view(np.uint32))
    assert np.any(fleet.coefficients)
    for agent in fleet.agents.values():
        assert agent.ending is not None
        assert agent.ending.exit_code == 0, agent.ending
        assert agent.state.held is not None
        assert agent.state.held.version == ROUNDS
        np.testing.assert_array_equal(np.frombuffer(agent.state.held.coefficients, "<f4"), fleet.coefficients)


def started(folder: Path, faults: Faults | None = None) -> SmallFleet:
    fleet = SmallFleet(folder, CONFIG, faults=faults)
    for device in DEVICES:
        fleet.join(device)
    return fleet


def test_run_without_faults_is_the_fold_of_its_updates(tmp_path):
    fleet = started(tmp_path)
    fleet.run_to_the_end()
    check(fleet)
    assert [len(updates) for updates in accepted_updates(fleet.store.path).values()] == [3] * ROUNDS


@pytest.mark.parametrize("form", ["f16", "f8"])
def test_agents_that_follow_short_changes_under_faults_hold_the_published_bits(tmp_path, form):
    config = msgspec.structs.replace(
        CONFIG, scalar_format=form, change_format=form, common_seeds=True, server_scale="mean"
    )
    turns = zip(itertools.cycle(FIVE), range(4, 400, 9))
    fleet = SmallFleet(tmp_path, config, faults=Faults(tuple(Strike(fault, number) for fault, number in turns)))
    for device in DEVICES:
        fleet.join(device)
    fleet.run_to_the_end()
    check(fleet, is_folded=False)
    assert verify(fleet.store, "demo").difference is None
    assert any(fleet.service.state.carried)


@pytest.mark.parametrize(
    "pair", list(itertools.combinations(FIVE, 2)), ids=lambda pair: "+".join(f.name.lower() for f in pair)
)
def test_run_under_a_pair_of_faults_is_the_fold_of_its_updates(tmp_path, pair):
    turns = zip(itertools.cycle(pair), range(4, 400, 9))
    fleet = started(tmp_path, Faults(tuple(Strike(fault, number) for fault, number in turns)))
    fleet.run_to_the_end()
    check(fleet)
    counts = Counter(struck.fault for struck in fleet.network.struck)
    assert min(counts[fault] for fault in pair) >= 6


@pytest.mark.parametrize("fault", [*FIVE, Fault.LOSE, Fault.CUT, Fault.REFUSE], ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("kind", ["run", "plan", "snapshot", "update", "receipt", "presence"])
def test_fault_on_the_second_message_of_a_kind_changes_nothing(tmp_path, fault, kind):
    fleet = started(tmp_path, Faults((Strike(fault, 1, f"demo/{kind}"),)))
    fleet.run_to_the_end()
    check(fleet)


def test_agents_and_aggregator_killed_at_random_lose_nothing(tmp_path):
    fleet = started(tmp_path)
    chance = np.random.default_rng(3)
    for _ in range(30):
        for _ in range(int(chance.integers(1, 6))):
            fleet.turn()
        victim = ("aggregator", *DEVICES)[int(chance.integers(0, 4))]
        if victim == "aggregator":
            fleet.kill_aggregator()
        elif fleet.agents[victim].ending is None:
            fleet.kill(victim)
            fleet.join(victim)
    fleet.run_to_the_end()
    check(fleet)


def test_broker_that_goes_and_comes_back_costs_nothing(tmp_path):
    fleet = started(tmp_path)
    for _ in range(5):
        for _ in range(4):
            fleet.turn()
        fleet.network.stop_broker()
        for _ in range(20):
            fleet.turn()
        fleet.network.start_broker()
    fleet.run_to_the_end()
    check(fleet)


def test_device_that_vanishes_for_good_does_not_hold_the_run_up(tmp_path):
    fleet = started(tmp_path)
    fleet.run_until(lambda: fleet.service.state.progress.round == 2)
    fleet.kill("bob")
    fleet.run_to_the_end()
    check(fleet)
    last = accepted_updates(fleet.store.path)[ROUNDS - 1]
    assert set(last) == {"ann", "charly"}


def test_device_that_comes_back_after_rounds_away_counts_again(tmp_path):
    fleet = started(tmp_path)
    fleet.run_until(lambda: fleet.service.state.progress.round == 1)
    fleet.kill("bob")
    fleet.run_until(lambda: fleet.service.state.progress.round == 4)
    fleet.join("bob")
    fleet.run_to_the_end()
    check(fleet)
    rounds = accepted_updates(fleet.store.path)
    assert "bob" not in rounds[3]
    assert "bob" in rounds[5]
