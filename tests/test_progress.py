"""What people see of an agent: the live line, and what it says it does."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest

from edge_client.jobs import HeldOutReport
from edge_client.progress import Screen, Status, activity, byte_text, status_line
from edge_client.state import Link, State, Training
from shared.transport import TrafficCount
from tests.agents import small
from tests.driven_session import PLAN


def test_live_line_is_rewritten_below_what_is_said():
    stream = StringIO()
    screen = Screen(stream, is_terminal=True)
    screen.show("step 1", 0.0)
    screen.show("step 2", 0.05)  # too soon
    screen.say("round 0 over")
    screen.show("step 3", 0.2)
    screen.end()
    assert stream.getvalue() == "\r\x1b[Kstep 1\r\x1b[Kround 0 over\nstep 1\r\x1b[Kstep 3\r\x1b[K"


def test_no_live_line_where_there_is_no_terminal():
    stream = StringIO()
    screen = Screen(stream, is_terminal=False)
    screen.show("step 1", 0.0)
    screen.say("round 0 over")
    screen.end()
    assert stream.getvalue() == "round 0 over\n"


def test_live_line_shows_run_round_step_loss_memory_and_bytes():
    count = TrafficCount(100, 200, 1, 2, 3, 4, 1234, 56789)
    status = Status("demo", 3, "step 4/20", 2.34567, 812_000_000, count)
    assert status_line(status) == "demo | round 3 | step 4/20 | loss 2.346 | memory 812 MB | up 1.2 kB, down 56.8 kB"
    bare = Status("demo", None, "waiting for a plan", None, None, TrafficCount(100, 200, None, None))
    assert status_line(bare) == "demo | waiting for a plan | up 100 B, down 200 B"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (999_499, "999 kB"), (999_500, "1.0 MB")],
)
def test_bytes_are_shown_in_powers_of_a_thousand(count, text):
    assert byte_text(count) == text
    assert byte_text(10**13) == "10000 GB"


def test_activity_says_why_nothing_happens(tmp_path):
    fleet = small(tmp_path)
    agent = fleet.join("ann")
    assert activity(agent.state, None) == "no connection to in-process"
    seen = set()

    def note() -> bool:
        seen.add(activity(agent.state, agent._jobs.report))
        return agent.ending is not None

    fleet.run_until(note)
    assert {"step 1/6", "step 6/6", "waiting for the receipt"} <= seen


def test_held_out_progress_is_an_activity(tmp_path):
    state: State = small(tmp_path).join("ann").state
    working = replace(state, link=Link(is_connected=True), plan=PLAN, work=Training(None))
    assert activity(working, HeldOutReport(16, 40)) == "held-out 16/40"
    assert activity(working, None) == "starting"
