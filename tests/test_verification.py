"""`verify`: the journal folded again, independently, equals every version; every kind of damage is found and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import cli
from aggregator.events import Begin, Event, KeepProgress, KeepUpdate, KeepVersion, Note, Pause, Stop, Tick
from aggregator.rounds import step
from aggregator.store import Store
from aggregator.verification import text, verify
from shared.changes import write_change
from shared.errors import UserError
from shared.messages import Update
from shared.wire import scalars_to_bytes
from tests.runs import START_MS, arrival, spec_of, update_of

OTHER_MODEL = b"o" * 16


def play(store: Store, *events: Event) -> None:
    """Step and commit, as the service does."""
    state = store.state("night")
    for event in events:
        state, actions = step(state, event)
        keeps = [a for a in actions if isinstance(a, (KeepUpdate, KeepVersion, KeepProgress, Note))]
        store.commit("night", keeps, START_MS)


def update(number: int, seed: int, **fields: Any) -> Update:
    """An update with scalars of its own."""
    rng = np.random.default_rng([number, seed])
    scalars = (rng.normal(size=1 + seed % 3) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    usual = {"samples": 1 + 7 * seed, "scalars": scalars_to_bytes(scalars, "f32"), "held_out_loss": 3.0 + seed - number}
    return update_of(number, **{**usual, **fields})


def story(late: bool = True) -> list[Event]:
    """Five rounds: a device with another model, late updates, a tie, an empty deadline, the end by the operator."""
    events: list[Event] = [Begin(START_MS)]
    events += [arrival("a", update(0, 1)), arrival("b", update(0, 2))]
    events += [arrival("d", update(1, 4, model_digest=OTHER_MODEL)), arrival("a", update(1, 1))]
    events += [arrival("c", update(0, 3))] * late + [Tick(START_MS + 61_000)]  # 1 to 1: no majority
    events += [arrival("e", update(1, 5))] * late + [arrival("d", update(2, 4, model_digest=OTHER_MODEL))]
    events += [arrival("b", update(2, 2)), arrival("a", update(2, 1)), arrival("c", update(2, 3))]
    events += [arrival("c", update(3, 3, held_out_loss=9.0)), Tick(START_MS + 10**7)]
    events += [arrival("b", update(4, 2, held_out_loss=None)), arrival("a", update(3, 1))]
    return [*events, arrival("a", update(4, 1)), Pause(START_MS, "lunch"), Stop(START_MS, "")]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"algorithm": "fedkseed-pro"},
    {"step": "normalised", "step_rms": 0.125, "late": "fold"},
    {"step": "normalised", "algorithm": "fedkseed-pro", "late": "fold", "max_staleness": 3},
    {"late": "fold", "weighting": "equal", "server_scale": "sqrt", "common_seeds": True},
    {"change_format": "f16", "common_seeds": True},
    {"change_format": "f8", "late": "fold", "common_seeds": True},
]


@pytest.fixture(params=SETTINGS, ids=str)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "s", may_create=True) as opened:
        opened.create(spec_of(**{"rounds": 9, **request.param}), START_MS)
        yield opened


def test_every_version_is_the_fold_of_the_journal(store: Store) -> None:
    play(store, *story())
    found = verify(store, "night")
    assert found.difference is None
    assert found.versions == found.compared == store.run("night").progress.round + 1 >= 4
    assert found.counted == sum(report.counted for report, _ in store.reports("night")) > 4
    assert found.late == sum(report.late for report, _ in store.reports("night") if report.outcome == "combined")
    assert (found.late > 0) == (store.run("night").spec.config.late == "fold")
    assert any(store.coefficients("night", found.latest))


DAMAGE = {
    "a coefficient": (
        "UPDATE versions SET coefficients = CAST(x'0000803f' || substr(coefficients, 5) AS BLOB) WHERE version = 2",
        r"version 2: coefficient 0 is 1\.0 in the store, the journal gives \S+; 1 of 256 differ",
    ),
    "the sign of a zero": (
        "UPDATE versions SET coefficients = CAST(x'00000080' || substr(coefficients, 5) AS BLOB) WHERE version = 0",
        r"version 0: coefficient 0 is -0\.0 in the store, the journal gives 0\.0; 1 of 256 differ",
    ),
    "a cut version": ("UPDATE versions SET coefficients = x'00' WHERE version = 1", "version 1 has 1 bytes of coeff"),
    "what is carried": (
        "UPDATE versions SET carried = zeroblob(1024) WHERE version = 2",
        "version 2: what its changes left over is not what the journal gives",
    ),
    "the change": (
        "UPDATE versions SET change = (SELECT change FROM versions WHERE version = 1) WHERE version = 3",
        "version 3: the change that leads to it is not what the journal gives",
    ),
    "a missing version": ("DELETE FROM versions WHERE version = 1", "version 1 is missing in the store"),
    "the last version missing": (
        "DELETE FROM versions WHERE version = (SELECT MAX(version) FROM versions)",
        "the run stands at version ., but the store has versions 0 to .",
    ),
    "a missing update": ("DELETE FROM updates WHERE round = 0 AND device = 'a'", "version 1: coefficient"),
    "an update too many": (
        "INSERT INTO updates SELECT run, 0, 'z', payload, 0, 0 FROM updates WHERE round = 0 AND device = 'b'",
        "version 1: coefficient",
    ),
    "an update of another round": ("UPDATE updates SET counted_in = 1 WHERE round = 0 AND device = 'a'", "version 1: "),
    "an update that does not read": (
        "UPDATE updates SET payload = x'0105' WHERE round = 0 AND device = 'a'",
        "version 1: what it was made from does not read",
    ),
    "the fleet": (
        """UPDATE versions SET fleet = '{"step_rms":0.5,"reference_loss":1.0}' WHERE version = 1""",
        "version 1: the fleet is Fleet",
    ),
    "the plan": (
        "UPDATE versions SET plan = (SELECT plan FROM versions WHERE version = 2) WHERE version = 1",
        "version 1: the plan of round 0 is not",
    ),
    "the fleet's model": (
        "UPDATE versions SET report = replace(report, '6d6d', '6d6e') WHERE version = 1",
        "version 1: round 0 took 6d6e.* for the fleet's model, the votes give 6d6d",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_differs_is_found_and_the_first_difference_is_named(tmp_path: Path, name: str) -> None:
    statement, message = DAMAGE[name]
    with Store.open(tmp_path / "s", may_create=True) as store:
        store.create(spec_of(rounds=9), START_MS)
        play(store, *story())
        assert verify(store, "night").difference is None
        store._do(statement.replace("SET report = replace(report", "SET report = replace(CAST(report AS TEXT)"))
        found = verify(store, "night")
        assert found.difference is not None
        assert np.char.count(found.difference, "\n") == 0
        import re

        assert re.match(message, found.difference), found.difference
        assert found.compared < found.versions or "stands at" in found.difference
        assert "DIFFERENT: " in text(found)


def mixed(number: int, size: float = 3e-4) -> list[Event]:
    """A round of two first-order devices and two others."""
    values = np.random.default_rng(number).normal(size=(2, 256)) * size
    changes = [write_change(None, values[0], "f16"), write_change(np.arange(5), values[1, :5], "f16")]
    first = [update_of(number, scalars=b"", change=change) for change in changes]
    rest = [update(number, seed, scalars=scalars_to_bytes(np.arange(3) - seed, "f16")) for seed in (1, 2)]
    return [arrival(device, one) for device, one in zip("abcd", first + rest, strict=True)]


@pytest.mark.parametrize("form", ["f32", "f16", "f8"])
def test_rounds_of_both_kinds_fold_to_the_same_bits(tmp_path: Path, form: str) -> None:
    with Store.open(tmp_path / "s", may_create=True) as store:
        settings = {"step": "normalised", "first_order": "accept", "scalar_format": "f16", "change_format": form}
        store.create(spec_of(rounds=9, quorum=4, **settings), START_MS)
        play(store, Begin(START_MS), *(event for number in range(4) for event in mixed(number)))
        found = verify(store, "night")
        assert (found.difference, found.counted, found.steps) == (None, 16, 24)
        worth = store.state("night").algorithm_state.worth
        assert (worth.noise_rounds, worth.agreement_rounds) == (4, 4)
        store._do("UPDATE updates SET payload = (SELECT payload FROM updates WHERE device = 'a' AND round = 1)")
        assert verify(store, "night").difference is not None


def test_a_changed_significance_is_found(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", may_create=True) as store:
        store.create(spec_of(rounds=9, algorithm="fedkseed-pro"), START_MS)
        play(store, *story())
        store._do("UPDATE versions SET algorithm_state = zeroblob(4096) WHERE version = 2")
        difference = verify(store, "night").difference
        assert difference == "version 2: what the algorithm remembers is not what the journal gives"


def test_a_combination_past_float32_changes_nothing_in_the_fold_either(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", may_create=True) as store:
        store.create(spec_of(rounds=3, lr=1.0, quorum=2, server_scale="sum", common_seeds=True), START_MS)
        huge = update_of(1, scalars=scalars_to_bytes(np.array([3e38], np.float32), "f32"))
        rounds = (update(0, 1), huge, update(2, 1))
        play(store, Begin(START_MS), *(arrival(device, one) for one in rounds for device in "ab"))
        assert [report.outcome for report, _ in store.reports("night")] == ["combined", "not finite", "combined"]
        found = verify(store, "night")
        assert (found.difference, found.versions, found.counted) == (None, 4, 4)


def test_a_run_that_never_began_verifies(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", may_create=True) as store:
        store.create(spec_of(), START_MS)
        assert text(verify(store, "night")).splitlines()[:2] == [
            "run night: 0 rounds folded from 0 accepted updates (0 counted; 0 steps)",
            "all 1 versions in the store are the fold of the journal, bit for bit",
        ]
        with pytest.raises(UserError, match="there is no run 'day'"):
            verify(store, "day")


def test_a_run_that_is_served_meanwhile_is_verified_as_it_was(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", may_create=True) as writer, Store.open(tmp_path / "s", may_write=False) as reader:
        writer.create(spec_of(rounds=9), START_MS)
        play(writer, *story()[:3])
        with reader.frozen():
            assert reader.run("night").progress.round == 1
            play(writer, arrival("a", update(1, 1)), arrival("b", update(1, 2)))
            assert [row.version for row in reader.folds("night")] == [0, 1]
        assert verify(reader, "night").versions == 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcde"), st.integers(-3, 0), st.integers(0, 30), st.sampled_from([b"m" * 16, OTHER_MODEL])
        ),
        max_size=30,
    ),
    st.sampled_from(SETTINGS),
)
def test_whatever_comes_in_whatever_order_the_fold_agrees(
    tmp_path_factory: pytest.TempPathFactory, arrivals: list[tuple[str, int, int, bytes]], settings: dict[str, Any]
) -> None:
    with Store.open(tmp_path_factory.mktemp("v") / "s", may_create=True) as store:
        store._do("PRAGMA synchronous = OFF")
        store.create(spec_of(**{"rounds": 9, **settings}), START_MS)
        play(store, Begin(START_MS))
        for device, ago, seed, model in arrivals:
            number = store.run("night").progress.round
            play(store, arrival(device, update(max(0, number + ago), seed, model_digest=model)))
        play(store, Tick(START_MS + 10**8))
        assert verify(store, "night").difference is None


# --- the command


def test_the_command_prints_what_it_found_and_its_exit_code_says_whether_all_is_well(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    path = tmp_path / "s"
    with Store.open(path, may_create=True) as store:
        store.create(spec_of(rounds=9, late="fold"), START_MS)
        play(store, *story())
    words = ("verify", "night", "--store", path)
    code, out, _ = call(cli, *words)
    assert code == 0
    head, verdict, last = out.splitlines()
    assert head.startswith("run night: 5 rounds folded from 1")
    assert "of them late" in head
    assert verdict == "all 6 versions in the store are the fold of the journal, bit for bit"
    assert last.startswith("version 5: coefficients with SHA-256 ")
    facts = json.loads(call(cli, *words, "--json")[1])
    assert (facts["difference"], facts["compared"], facts["latest"]) == (None, 6, 5)
    with Store.open(path) as store:
        store._do("DELETE FROM updates WHERE device = 'a' AND round = 0")
    code, out, _ = call(cli, *words)
    assert code == 1
    assert "DIFFERENT: version 1: coefficient " in out
    assert "equal before it: 1 of 6 versions" in out


def test_losses_that_overflow_together_do_not_disturb_the_fold(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", may_create=True) as store:
        store.create(spec_of(step="normalised"), START_MS)
        play(store, Begin(START_MS), *(arrival(d, update_of(held_out_loss=1.7e308, samples=10**6)) for d in "ab"))
        assert verify(store, "night").difference is None
        assert math.isfinite(verify(store, "night").steps)
