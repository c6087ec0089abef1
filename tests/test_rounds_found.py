"""What the state machine of `test_rounds_model` and the second reader have found in the round logic, by hand."""

from __future__ import annotations

import math
import struct

import pytest

from aggregator.events import KeepVersion, Tick
from shared.refusals import Refusal
from tests.runs import after, arrival, opened, update_of


@pytest.mark.parametrize("other", [1.7e308, -1.7e308])
def test_finite_losses_whose_sum_is_not_finite_neither_end_the_loop_nor_hold_up_the_round(other):
    state = opened(quorum=3, min_updates=2)
    updates = [update_of(train_loss=loss, held_out_loss=loss, samples=9) for loss in (1.7e308, other)]
    state = after(state, *(arrival(name, update) for name, update in zip(("ann", "bob"), updates, strict=True))).state
    closed = after(state, Tick(state.progress.deadline_at_ms))
    (report,) = [action.report for action in closed.actions if isinstance(action, KeepVersion)]
    assert (report.outcome, report.counted, report.train_loss) == ("combined", 2, None)
    assert closed.state.progress.round == 1


def test_too_many_scalars_are_refused_for_their_count_whatever_they_are():
    scalars = struct.pack("<4f", 1.0, math.nan, 1.0, 1.0)
    _, (sent,) = after(opened(), arrival("ann", update_of(scalars=scalars)))
    assert sent.receipt.code == Refusal.SCALAR_COUNT
