"""The divergence vote: who is left out, who has a vote, and who is back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from aggregator.closing import vote
from aggregator.events import SendReceipt, Tick
from aggregator.rounds import step
from aggregator.state import Exclusion, State
from shared.messages import Change, Plan
from shared.refusals import Refusal
from tests.runs import (
    DEADLINE_MS,
    FLEET_MODEL,
    OTHER_MODEL,
    THIRD_MODEL,
    after,
    arrival,
    notes,
    opened,
    published,
    receipts,
    report_in,
    update_of,
)


def test_a_device_with_another_model_is_named_left_out_and_told() -> None:
    state, actions = after(
        opened(quorum=3),
        arrival("a", update_of()),
        arrival("b", update_of(model_digest=OTHER_MODEL, samples=1000)),
        arrival("c", update_of()),
    )
    assert receipts(actions)[-1] == ("b", Refusal.DIVERGED)
    only_equal = after(opened(), arrival("a", update_of()), arrival("c", update_of())).state
    assert state.coefficients == only_equal.coefficients
    assert [(e.device, e.round, e.digest) for e in state.progress.excluded] == [("b", 0, OTHER_MODEL.hex())]
    assert "device b DIVERGED" in notes(actions)
    assert FLEET_MODEL.hex() in notes(actions)
    report = report_in(actions)
    assert (report.accepted, report.counted, report.left_out) == (3, 2, 1)


def with_b_excluded(**settings: Any) -> State:
    return after(
        opened(**{"quorum": 3, **settings}),
        arrival("a", update_of()),
        arrival("b", update_of(model_digest=OTHER_MODEL)),
        arrival("c", update_of()),
    ).state


def test_an_excluded_device_is_back_when_its_model_agrees() -> None:
    state, actions = after(with_b_excluded(), *(arrival(device, update_of(1)) for device in "abc"))
    assert state.progress.excluded == ()
    assert "device b agrees with the fleet again" in notes(actions)
    assert report_in(actions).counted == 3


def test_an_excluded_device_has_no_vote() -> None:
    state = with_b_excluded(min_updates=1)
    state, actions = after(
        state, arrival("b", update_of(1, model_digest=THIRD_MODEL)), arrival("a", update_of(1)), Tick(DEADLINE_MS * 2)
    )
    # b and a differ: one vote against one would be no majority, but b has none.
    assert report_in(actions).outcome == "combined"
    assert receipts(actions)[-1] == ("b", Refusal.DIVERGED)
    assert [(e.device, e.round) for e in state.progress.excluded] == [("b", 1)]


def test_an_excluded_device_alone_does_not_close_a_round() -> None:
    state = step(with_b_excluded(), arrival("b", update_of(1))).state
    following, actions = step(state, Tick(DEADLINE_MS * 2))
    assert following.progress.round == 1
    assert "0 of 1 updates at the deadline" in notes(actions)


def test_excluded_devices_alone_do_not_make_the_quorum() -> None:
    state = opened(quorum=1)
    progress = msgspec.structs.replace(state.progress, excluded=(Exclusion("b", 0, "00"),))
    state = step(replace(state, progress=progress), arrival("b", update_of())).state
    assert (state.progress.round, list(state.updates)) == (0, ["b"])
    assert step(state, arrival("a", update_of())).state.progress.round == 1


def test_nobody_waits_for_an_excluded_device() -> None:
    state = after(
        with_b_excluded(),
        *(
            arrival(d, update_of(1, model_digest=m))
            for d, m in (("b", OTHER_MODEL), ("a", FLEET_MODEL), ("c", FLEET_MODEL))
        ),
    ).state
    assert state.progress.round == 2


def test_an_excluded_device_that_stays_away_stays_excluded() -> None:
    state = after(
        with_b_excluded(), arrival("a", update_of(1)), arrival("c", update_of(1)), Tick(DEADLINE_MS * 2)
    ).state
    assert [e.device for e in state.progress.excluded] == ["b"]


def test_a_left_out_update_sent_again_is_told_that_it_diverged() -> None:
    again = arrival("b", update_of(model_digest=OTHER_MODEL))
    assert receipts(step(with_b_excluded(), again).actions) == [("b", Refusal.DIVERGED)]


def test_without_a_majority_nothing_is_combined_and_everyone_is_told() -> None:
    first = opened()
    state, actions = after(first, arrival("a", update_of()), arrival("b", update_of(model_digest=OTHER_MODEL)))
    assert state.progress.round == 1
    assert state.coefficients == first.coefficients
    assert state.fleet == first.fleet
    assert state.progress.excluded == ()
    assert receipts(actions)[-2:] == [("a", Refusal.DIVERGED), ("b", Refusal.DIVERGED)]
    told = [a.receipt.detail for a in actions if isinstance(a, SendReceipt)][-1]
    assert FLEET_MODEL.hex() in told
    assert OTHER_MODEL.hex() in told
    assert report_in(actions).outcome == "no majority"
    assert "nothing combined" in notes(actions)
    assert published(actions, Plan).change == Change(b"", 0, b"")


@pytest.mark.parametrize(
    ("digests", "excluded", "reference", "counted"),
    [
        ({"a": b"x"}, set(), b"x", ("a",)),
        ({"a": b"x", "b": b"y"}, set(), None, ()),
        ({"a": b"x", "b": b"y", "c": b"x"}, set(), b"x", ("a", "c")),
        ({"a": b"x", "b": b"y", "c": b"x", "d": b"z"}, set(), None, ()),  # a half is no majority
        ({"a": b"x", "b": b"y", "c": b"y"}, {"b", "c"}, b"x", ("a",)),
        ({"a": b"x", "b": b"x"}, {"b"}, b"x", ("a", "b")),
        ({"b": b"y"}, {"b"}, None, ()),
    ],
)
def test_votes(digests: Any, excluded: Any, reference: Any, counted: Any) -> None:
    verdict = vote(digests, frozenset(excluded))
    assert (verdict.reference, verdict.counted) == (reference, counted)
    assert set(verdict.left_out) == set(digests) - set(counted)
