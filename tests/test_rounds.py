"""The round logic: every rule of the table, the opening, the deadline, the operator, who comes and goes."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from aggregator import rounds
from aggregator.events import (
    BadUplink,
    Begin,
    Event,
    KeepProgress,
    KeepUpdate,
    KeepVersion,
    Online,
    Pause,
    Publish,
    Resume,
    Stop,
    Tick,
)
from aggregator.rounds import TABLE, step
from aggregator.spec import nonce
from aggregator.state import Phase, new_state, plan_of
from shared.messages import Everyone, Plan, Run, Snapshot, Threshold, forwards_of
from shared.refusals import Refusal
from shared.seeds import takes_part
from tests.runs import (
    DEADLINE_MS,
    START_MS,
    after,
    arrival,
    notes,
    opened,
    published,
    receipts,
    report_in,
    spec_of,
    update_of,
)


def test_the_table_has_every_phase_and_event() -> None:
    assert set(TABLE) == set(itertools.product(get_args(Phase), get_args(Event)))


def test_the_written_table_says_the_same_as_the_code() -> None:
    lines = [line.split() for line in (rounds.__doc__ or "").splitlines()]
    events = {event.__name__: event for event in get_args(Event)}
    written = {cells[0]: " ".join(cells[1:]) for cells in lines if cells and cells[0] in events}
    assert set(written) == set(events)
    for name, event in events.items():
        dashes = [TABLE[phase, event].__name__ == "_nothing" for phase in get_args(Phase)]
        assert written[name].split().count("-") == sum(dashes), name


@pytest.mark.parametrize(("phase", "event"), sorted(TABLE, key=str))
def test_a_rule_that_does_nothing_leaves_the_very_state(phase: Phase, event: type) -> None:
    states = {
        "created": new_state(spec_of()),
        "open": opened(),
        "paused": after(opened(), Pause(START_MS, "")).state,
        "finished": after(opened(), Stop(START_MS, "")).state,
    }
    examples: dict[type, Any] = {
        Begin: Begin(START_MS),
        Tick: Tick(START_MS),
        Online: Online(0),
        Pause: Pause(START_MS, "r"),
        Resume: Resume(START_MS),
        Stop: Stop(START_MS, "r"),
        BadUplink: BadUplink("a", Refusal.MALFORMED, "d"),
    }
    state = states[phase]
    following, actions = step(state, examples.get(event, arrival("a", update_of())))
    if TABLE[phase, event].__name__ == "_nothing":
        assert following is state
        assert actions == ()
    if not any(isinstance(a, (KeepUpdate, KeepVersion, KeepProgress)) for a in actions):
        assert following is state


def test_a_run_begins_with_run_snapshot_and_plan_in_this_order() -> None:
    state, actions = step(new_state(spec_of()), Begin(START_MS))
    messages = [a.message for a in actions if isinstance(a, Publish)]
    assert [type(m) for m in messages] == [Run, Snapshot, Plan]
    assert messages[0] == spec_of().facts
    assert messages[1] == Snapshot(0, bytes(4 * 256))
    plan = messages[2]
    assert (plan.round, plan.phase, plan.deadline_s, plan.published_at_ms) == (0, "open", 60.0, START_MS)
    assert plan.nonce == nonce(state.spec, 0)
    assert len(plan.nonce) == 16


def test_the_plan_says_how_scalars_are_measured_and_how_many_passes_that_takes() -> None:
    plans = [plan_of(opened(local_steps=40, one_sided=group)) for group in (0, 2, 8)]
    assert [plan.one_sided for plan in plans] == [0, 2, 8]
    assert [forwards_of(plan) for plan in plans] == [80, 40, 40]


def test_nonces_differ_by_round_and_by_key() -> None:
    first = spec_of()
    nonces = {nonce(first, number) for number in range(100)}
    assert len(nonces) == 100


def test_beginning_again_says_the_same_again() -> None:
    state, first = step(new_state(spec_of()), Begin(START_MS))
    again, second = step(state, Begin(START_MS + 5000))
    assert again is state
    assert [a for a in first if isinstance(a, Publish)] == list(second)


def test_a_deadline_that_passed_while_the_broker_was_away_starts_anew() -> None:
    late = DEADLINE_MS + 1
    state, actions = step(opened(), Begin(late))
    assert state.progress.deadline_at_ms == late + 60_000
    assert state.progress.extensions == 0
    assert published(actions, Plan).published_at_ms == late
    assert "starts anew" in notes(actions)


def test_a_clock_set_back_neither_stretches_the_deadline_nor_makes_an_older_plan() -> None:
    state = opened()
    early = START_MS - 3_600_000
    state, actions = step(state, Begin(early))
    assert state.progress.deadline_at_ms == early + 60_000
    assert published(actions, Plan).published_at_ms == START_MS
    paused, actions = step(state, Pause(early + 5, ""))
    assert published(actions, Plan).published_at_ms == START_MS
    assert plan_of(step(paused, Resume(early + 6)).state).published_at_ms == START_MS


def test_nothing_happens_before_the_deadline() -> None:
    state = step(opened(), arrival("a", update_of())).state
    assert step(state, Tick(DEADLINE_MS - 1)) == (state, ())


def test_the_deadline_closes_a_round_that_has_its_least_updates() -> None:
    state = step(opened(), arrival("a", update_of())).state
    following, actions = step(state, Tick(DEADLINE_MS))
    assert following.progress.round == 1
    assert report_in(actions).counted == 1


def test_the_deadline_extends_a_round_that_has_too_few() -> None:
    state = step(opened(min_updates=2), arrival("a", update_of())).state
    following, actions = step(state, Tick(DEADLINE_MS))
    assert following.progress.round == 0
    assert following.progress.deadline_at_ms == DEADLINE_MS + 60_000
    assert list(following.updates) == ["a"]
    plan = published(actions, Plan)
    assert (plan.round, plan.nonce, plan.published_at_ms) == (0, nonce(state.spec, 0), DEADLINE_MS)
    assert "1 of 2 updates at the deadline" in notes(actions)


def test_each_extension_selects_twice_as_many_and_keeps_those_it_had() -> None:
    state = opened(participation=0.2)
    shares = []
    for number in range(4):
        shares.append(plan_of(state).participation)
        state = step(state, Tick(DEADLINE_MS + number * 60_000)).state
    assert shares == [Threshold(int(0.2 * 2**32)), Threshold(int(0.4 * 2**32)), Threshold(int(0.8 * 2**32)), Everyone()]


def test_extensions_are_forgotten_when_the_round_closes() -> None:
    state = step(opened(participation=0.2, quorum=1), Tick(DEADLINE_MS)).state
    selected = next(
        d for d in (f"d{i}" for i in range(99)) if takes_part(plan_of(state).participation, nonce(state.spec, 0), d)
    )
    closed = step(state, arrival(selected, update_of())).state
    assert closed.progress.extensions == 0
    assert plan_of(closed).participation == Threshold(int(0.2 * 2**32))


def test_pause_keeps_the_updates_and_resume_goes_on_with_the_same_round() -> None:
    state = step(opened(), arrival("a", update_of())).state
    paused, actions = step(state, Pause(START_MS + 2000, "lunch"))
    assert (published(actions, Plan).phase, published(actions, Plan).reason) == ("paused", "lunch")
    assert step(paused, Tick(DEADLINE_MS * 2)) == (paused, ())
    late = DEADLINE_MS + 99
    resumed, actions = step(paused, Resume(late))
    plan = published(actions, Plan)
    assert (plan.phase, plan.round, plan.nonce) == ("open", 0, nonce(state.spec, 0))
    assert resumed.progress.deadline_at_ms == late + 60_000
    assert list(resumed.updates) == ["a"]


def test_stop_combines_the_updates_there_are() -> None:
    state = step(opened(), arrival("a", update_of())).state
    stopped, actions = step(state, Stop(START_MS + 2000, "enough"))
    assert (stopped.progress.phase, stopped.progress.round, stopped.progress.reason) == ("finished", 1, "enough")
    assert report_in(actions).counted == 1
    assert stopped.coefficients != state.coefficients


def test_stop_without_updates_finishes_as_it_is() -> None:
    state = opened()
    stopped, actions = step(state, Stop(START_MS, ""))
    assert (stopped.progress.phase, stopped.progress.round) == ("finished", 0)
    assert published(actions, Plan).reason == "stopped by the operator"
    assert stopped.coefficients == state.coefficients


def test_a_run_that_was_paused_before_it_began_can_be_resumed() -> None:
    state = after(new_state(spec_of()), Pause(START_MS, ""), Begin(START_MS), Resume(START_MS + 5)).state
    assert (state.progress.phase, state.progress.opened_at_ms) == ("open", START_MS + 5)


def test_a_device_that_joins_at_round_50_counts_from_there() -> None:
    state = opened(rounds=60, quorum=1)
    for number in range(50):
        state = step(state, arrival("a", update_of(number))).state
    state, actions = step(state, arrival("newcomer", update_of(50)))
    assert receipts(actions)[0] == ("newcomer", Refusal.ACCEPTED)
    assert state.progress.round == 51


def test_a_device_that_vanishes_and_returns_counts_again() -> None:
    state = opened(rounds=9, quorum=2)
    for number, devices in enumerate(["ab", "bc", "bc", "ac"]):
        state = after(state, *(arrival(device, update_of(number)) for device in devices)).state
    assert state.progress.round == 4
