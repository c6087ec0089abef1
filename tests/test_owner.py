"""The owner's commands: finding the agent, wishes, what a status says and what it ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from edge_client import logbook, owner
from edge_client.board import LOG, Board, Life
from edge_client.logbook import Logbook
from edge_client.policy import Wish
from edge_client.status import Accepted, AgentStatus, Layers, Seen, StateName, duration, lines
from shared.errors import UserError
from tests.disks import fill

NOW_S = 1_700_000_000.0


def status_of(
    run: str = "spring", device: str = "ann", state: StateName = "waiting", at_s: float = NOW_S
) -> AgentStatus:
    return AgentStatus(
        written_at_ms=round(at_s * 1000),
        started_at_ms=round(at_s * 1000) - 7_500_000,
        pid=42,
        agent="kseed 0",
        run=run,
        device=device,
        broker="b.example.org:8883",
        session="05",
        state=state,
        text="waiting for the next round",
        bytes_today=Layers("2026-11-20"),
    )


def left(folder: Path, run: str = "spring", device: str = "ann", **more: object) -> Board:
    """What an agent left there."""
    board = Board(folder / f"{run}.{device}.0")
    board.post(msgspec.json.encode(status_of(run, device, **more)))  # type: ignore[arg-type]
    return board


@contextmanager
def alive(board: Board) -> Iterator[Board]:
    life = Life(board.folder)
    try:
        yield board
    finally:
        life.end()


def found(folder: Path, run: str | None = None, device: str | None = None) -> Board:
    return owner.find_board(None, folder, run, device, {})


# Which agent.


def test_the_agent_that_runs_is_meant_before_one_that_does_not(tmp_path: Path) -> None:
    old = left(tmp_path, "spring", at_s=NOW_S - 100)
    left(tmp_path, "summer", at_s=NOW_S)
    with alive(old):
        assert found(tmp_path).folder == old.folder


def test_of_those_that_do_not_run_the_latest_is_meant(tmp_path: Path) -> None:
    left(tmp_path, "spring", at_s=NOW_S - 100)
    latest = left(tmp_path, "summer", at_s=NOW_S)
    left(tmp_path, "winter", at_s=NOW_S - 200)
    assert found(tmp_path).folder == latest.folder


def test_several_that_run_have_to_be_told_apart(tmp_path: Path) -> None:
    with alive(left(tmp_path, "spring")), alive(left(tmp_path, "summer")) as summer:
        with pytest.raises(UserError, match="2 agents work here: ann in run spring, ann in run summer"):
            found(tmp_path)
        assert found(tmp_path, run="summer").folder == summer.folder


def test_no_agent_at_all_says_where_it_looked(tmp_path: Path) -> None:
    left(tmp_path)
    with pytest.raises(UserError, match=r"no agent of device 'bob' has left anything in .*; start one"):
        found(tmp_path, device="bob")
    with pytest.raises(UserError, match="no agent has left anything in"):
        found(tmp_path / "none")


def test_the_folder_comes_from_the_environment_where_no_option_names_it(tmp_path: Path) -> None:
    board = left(tmp_path)
    assert owner.find_board(None, None, None, None, {"KSEED_AGENT_STATE_DIR": str(tmp_path)}).folder == board.folder


def test_a_configuration_file_names_the_agent_to_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "kseed.toml"
    file.write_text('[agent]\nrun = "spring"\ndevice = "ann"\nstate_dir = "state"\n[data]\nsource = "none"\n')
    board = owner.find_board(file, None, None, None, {})
    assert board.folder.parent == tmp_path / "state"
    assert board.folder.name.startswith("spring.ann.")
    with pytest.raises(UserError, match="no agent has left a status in"):
        owner.see(board, NOW_S)


# Wishes.


def test_a_pause_says_until_when_and_whether_somebody_hears_it(tmp_path: Path) -> None:
    board = left(tmp_path)
    assert owner.pause(board, NOW_S, None) == "paused. No agent runs just now; the next one begins with the pause."
    with alive(board):
        assert owner.pause(board, NOW_S, 3600.0).startswith("paused until 20")
    assert board.wish() == Wish("pause", NOW_S, NOW_S + 3600)


def test_resume_takes_a_pause_back_and_says_where_there_was_none(tmp_path: Path) -> None:
    board = left(tmp_path)
    owner.pause(board, NOW_S, None)
    assert owner.resume(board) == "resumed. No agent runs just now."
    assert owner.resume(board).startswith("nothing to resume: its owner did not pause it.")


def test_nothing_can_be_finished_where_no_agent_runs(tmp_path: Path) -> None:
    board = left(tmp_path)
    with pytest.raises(UserError, match="no agent runs here, so there is nothing to finish"):
        owner.finish(board, NOW_S)
    assert board.wish() is None


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("30min", 1800), ("45m", 2700), ("1h30m", 5400), ("1d 2h", 93_600)]
)
def test_durations_are_read(text: str, value: float) -> None:
    assert owner.seconds(text) == value


@pytest.mark.parametrize("text", ["", "2", "h", "0s", "-1h", "1.5h", "2 weeks"])
def test_impossible_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="give one such as 30min, 2h or 1h30m"):
        owner.seconds(text)


# What a status says.


@pytest.mark.parametrize(
    ("state", "is_alive", "age_s", "code"),
    [
        ("working", True, 1, 0),
        ("waiting", True, 1, 0),
        ("starting", True, 1, 0),
        ("paused", True, 1, 1),
        ("unconnected", True, 1, 4),
        ("failed", True, 1, 4),
        ("working", False, 1, 5),
        ("left", False, 1, 5),
        ("working", True, 601, 6),
    ],
)
def test_the_exit_code_tells_how_it_stands(state: StateName, is_alive: bool, age_s: float, code: int) -> None:
    assert Seen(status_of(state=state), is_alive, age_s, "/state").exit_code == code


def test_a_dead_agent_is_told_from_one_that_left() -> None:
    assert lines(Seen(status_of(state="left"), False, 5, "/state"))[1].endswith(
        "not running: waiting for the next round"
    )
    assert (
        "it ended without a word while it was working" in lines(Seen(status_of(state="working"), False, 5, "/state"))[1]
    )


def test_a_status_shows_everything_people_ask_for() -> None:
    status = msgspec.structs.replace(
        status_of(),
        round=12,
        loss=2.1134,
        last_accepted=Accepted(11, round(NOW_S * 1000) - 240_000),
        queue=("the update of round 12 (800 bytes of scalars) has no receipt yet",),
        connected_since_ms=round(NOW_S * 1000) - 7_260_000,
        round_trip_s=0.0123,
        round_trip_at_ms=round(NOW_S * 1000) - 5000,
        bytes_today=Layers("2026-11-20", 1234, 20_000, 1500, 21_000, None, None),
        budget_bytes=200_000,
        energy_j=312.4,
    )
    shown = "\n".join(lines(Seen(status, True, 3, "/state")))
    for text in (
        "ann in run spring (kseed 0, process 42, started 2 h 5 min ago)",
        "waiting: waiting for the next round",
        "12, loss 2.113 in the last step",
        "round 11, 4 min ago",
        "the update of round 12 (800 bytes of scalars) has no receipt yet",
        "b.example.org:8883, connected for 2 h 1 min, answers in 12.3 ms (measured 8 s ago)",
        "payload 1.2 kB up, 20.0 kB down; MQTT 1.5 kB up, 21.0 kB down; TCP/IP with TLS unknown up, unknown down"
        "; the day's budget is 200 kB",
        "312 J since it started",
        "3 s ago, in /state",
    ):
        assert text in shown, shown


def test_a_status_for_programs_says_what_was_found_too() -> None:
    told = json.loads(Seen(status_of(), True, 3, "/state").as_json())
    assert (told["is_running"], told["is_silent"], told["age_s"], told["state"]) == (True, False, 3.0, "waiting")
    assert json.loads(Seen(status_of(), True, 700, "/state").as_json())["is_silent"]
    assert not json.loads(Seen(status_of(), False, 700, "/state").as_json())["is_silent"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (90_000, "1 d 1 h"),
        (86_400, "1 d"),
    ],
)
def test_durations_are_told_in_two_units(value: float, text: str) -> None:
    assert duration(value) == text


# The log.


def test_the_log_has_the_time_in_front_and_turns_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "LARGEST_BYTES", 300)
    book = Logbook(tmp_path / LOG)
    for number in range(40):
        book.add(f"line {number} of 100% äöü")
    book.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    last = owner.log_lines(Board(tmp_path), 9)
    assert [line.split(" ", 2)[2] for line in last] == [f"line {number} of 100% äöü" for number in range(31, 40)]
    assert owner.log_lines(Board(tmp_path), 0) == []


def test_following_a_log_goes_on_when_it_turns_over(tmp_path: Path) -> None:
    path = tmp_path / LOG
    path.write_text("old\n")
    following = logbook.follow(path)
    with path.open("a") as stream:
        stream.write("new\n")
    assert next(following) == "new\n"
    with path.open("a") as stream:
        stream.write("the last of this file\n")
    path.rename(tmp_path / "log.1")
    path.write_text("the first of the next\n")
    assert [next(following), next(following)] == ["the last of this file\n", "the first of the next\n"]


def test_following_a_log_outlives_the_moment_between_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LOG
    path.write_text("old\n")
    following = logbook.follow(path)
    path.rename(tmp_path / "log.1")
    monkeypatch.setattr(Path, "exists", lambda self: True)  # as it was an instant ago
    monkeypatch.setattr(logbook.time, "sleep", lambda seconds: path.write_text("new\n"))
    assert next(following) == "new\n"


def test_a_log_on_a_full_disk_stops_nothing(tiny_disk: Path) -> None:
    fill(tiny_disk)
    book = Logbook(tiny_disk / LOG)
    book.add("lost")
    book.close()


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Logbook(tmp_path / "file" / "log").add("lost")
    with pytest.raises(UserError, match="there is no log"):
        owner.log_lines(Board(tmp_path / "file"), 5)
