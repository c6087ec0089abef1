"""An agent that tells its owner what it does, and leaves when its owner wants it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_client.agent import Agent
from edge_client.board import Board
from edge_client.events import Abandon, Finish, GateChanged, LeaveAfterRound, LoadModel, Rebuild, Say, Subscribe
from edge_client.policy import Limits, Wish
from edge_client.state import Limits as SessionLimits
from edge_client.status import Accepted, AgentStatus
from edge_client.telling import Teller, read_status, tell_failure
from shared.transport import Delivered
from tests.agents import BrokenTrainer, said, small, steps_of
from tests.driven_session import IDENTITY, NEXT, PLAN, RUN, Driven
from tests.small_fleet import LinearTrainer, SmallFleet
from tests.sysfs.machines import jetson_orin_6, machine
from tests.test_owner import left


def telling(fleet: SmallFleet, folder: Path, trainer: LinearTrainer | None = None) -> tuple[Agent, Board]:
    watched = machine(jetson_orin_6(folder / "machine"))
    board = Board(folder / "agent")
    teller = Teller(board, Limits(), watched.read, print, 0)
    return fleet.join("ann", trainer, teller=teller, is_asked_to_finish=board.is_finish_asked), board


def told(board: Board) -> AgentStatus:
    status = read_status(board)
    assert status is not None
    return status


def test_an_agent_tells_its_life_from_start_to_end(tmp_path: Path) -> None:
    fleet = small(tmp_path)
    agent, board = telling(fleet, tmp_path)
    states = set()
    while agent.ending is None:
        fleet.turn()
        states.add(told(board).state)
    last = told(board)
    assert {"working", "left"} <= states
    assert last.text.startswith("run 'demo' is finished at version 4")
    assert last.last_accepted is not None and last.last_accepted.round == 3
    assert last.model is not None and last.model.name == "linear"
    names = {measure.name: measure for measure in last.readings}
    assert names["power"].text == "7.6 W (rail VDD_IN)"
    assert names["temperature"].limit == "limit 85 °C"
    assert last.bytes_today.payload_sent > 0


def test_the_last_round_accepted_keeps_its_time(tmp_path: Path) -> None:
    fleet = small(tmp_path, local_steps=300, deadline_s=1e6)
    agent, board = telling(fleet, tmp_path)
    fleet.run_until(lambda: told(board).last_accepted is not None if agent.state.accepted == 0 else False)
    first = told(board)
    assert first.last_accepted is not None and first.last_accepted.round == 0
    for _ in range(250):
        fleet.turn()
    assert told(board).written_at_ms > first.written_at_ms + 5000
    assert told(board).last_accepted == first.last_accepted


def test_a_life_that_ended_without_a_word_is_noted_by_the_next(tmp_path: Path, capsys: Any) -> None:
    fleet = small(tmp_path)
    agent, _ = telling(fleet, tmp_path)
    fleet.run_until(lambda: steps_of(agent) == 3)
    fleet.kill("ann")
    telling(fleet, tmp_path)
    assert capsys.readouterr().out.startswith(
        "warning: the last life of this agent ended without a word while it was at"
    )
    fleet.run_to_the_end()
    telling(fleet, tmp_path)
    assert capsys.readouterr().out == ""


def test_the_round_trip_is_that_of_the_broker(tmp_path: Path) -> None:
    fleet = small(tmp_path)
    agent, board = telling(fleet, tmp_path)
    agent._teller.answered(Delivered(1, 0.25), 7)
    agent._teller.answered(Delivered(2), 8)
    fleet.turn()
    assert (told(board).round_trip_s, told(board).round_trip_at_ms) == (0.25, 7)


def test_a_failure_is_told_until_the_next_life(tmp_path: Path) -> None:
    board = left(tmp_path)
    tell_failure(board, "the model is another one. Trying again in 1 min.", 9)
    assert (told(board).state, told(board).written_at_ms) == ("failed", 9)
    tell_failure(Board(tmp_path / "none"), "nobody was there", 9)


def test_an_agent_that_breaks_does_not_say_that_it_left(tmp_path: Path) -> None:
    fleet = small(tmp_path)
    agent, board = telling(fleet, tmp_path, BrokenTrainer("train", ZeroDivisionError("a bug")))
    fleet.service.turn(0.0)
    with pytest.raises(ZeroDivisionError):
        while True:
            fleet.service.turn(0.0)
            agent.run()
    assert (told(board).state, told(board).text) == ("failed", "the agent broke: ZeroDivisionError: a bug")
    assert "error: the agent broke: ZeroDivisionError: a bug" in said(fleet)


# Finishing.


def test_finish_sends_the_round_under_way_and_then_leaves(tmp_path: Path) -> None:
    fleet = small(tmp_path)
    agent, board = telling(fleet, tmp_path)
    fleet.run_until(lambda: steps_of(agent) == 3)
    board.want(Wish("finish", 0.0))
    fleet.run_until(lambda: agent.ending is not None)
    assert agent.ending is not None
    assert (agent.ending.exit_code, agent.ending.text) == (0, "left run 'demo'")
    assert told(board).last_accepted == Accepted(0, told(board).written_at_ms)
    assert "round 0: update accepted" in said(fleet)
    assert said(fleet).count("leaving when the round under way is finished and sent") == 1
    assert fleet.service.state.progress.round <= 1


def test_finish_with_nothing_under_way_leaves_at_once(tmp_path: Path) -> None:
    fleet = small(tmp_path)
    board = Board(tmp_path / "agent")
    agent = fleet.join("ann", gate=lambda: "hot", is_asked_to_finish=board.is_finish_asked)
    for _ in range(20):
        fleet.turn()
    board.want(Wish("finish", 0.0))
    fleet.turn()
    assert agent.ending is not None and agent.ending.text == "left run 'demo'"


def test_a_round_that_ends_without_this_device_ends_the_wait_too() -> None:
    device = Driven().training()
    assert device.on(LeaveAfterRound(True)) == [Say("leaving when the round under way is finished and sent")]
    assert device.on(LeaveAfterRound(True)) == []
    actions = device.hear(NEXT)
    assert Abandon() in actions
    assert isinstance(actions[-1], Finish)
    assert not any(isinstance(action, (Rebuild, Subscribe)) for action in actions)


def test_a_run_that_is_over_is_waited_for_without_a_model_where_the_agent_stays() -> None:
    over = msgspec.structs.replace(PLAN, phase="finished", reason="all rounds are done")
    device = Driven(replace(IDENTITY, limits=SessionLimits(waits_after_end=True))).joined()
    (said,) = device.hear(over)
    assert isinstance(said, Say) and said.text.endswith(
        "is finished at version 3: all rounds are done; waiting for it to go on"
    )
    assert device.on(GateChanged("hot"))[0] == Say("paused: hot")
    assert device.on(GateChanged(None))[0] == Say("working again")
    actions = device.hear(msgspec.structs.replace(over, phase="open", published_at_ms=2_000_000))
    assert LoadModel(RUN) in actions


def test_finish_can_be_taken_back(tmp_path: Path) -> None:
    fleet = small(tmp_path)
    agent, board = telling(fleet, tmp_path)
    fleet.run_until(lambda: steps_of(agent) == 3)
    board.want(Wish("finish", 0.0))
    fleet.turn()
    board.want(None)
    fleet.run_to_the_end()
    assert "staying after all" in said(fleet)
    assert agent.ending is not None and "finished at version 4" in agent.ending.text
