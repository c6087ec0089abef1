"""What an owner's commands do: find the agent's folder, leave a wish, read its status and its log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from edge_client import logbook
from edge_client.board import LOG, Board
from edge_client.operations import agent_folder, read_config
from edge_client.policy import Wish
from edge_client.state_files import default_folder
from edge_client.status import AgentStatus, Seen
from edge_client.telling import read_status
from shared.errors import UserError

STATE_DIR_VARIABLE = "KSEED_AGENT_STATE_DIR"
_PART = re.compile(r"(\d+)(d|h|min|m|s)")
_SECONDS = {"d": 86_400, "h": 3600, "min": 60, "m": 60, "s": 1}
DURATION = re.compile(rf"({_PART.pattern}\s*)+")
ACKNOWLEDGED = "It takes effect after the step under way."


def find_board(
    config: Path | None, state_dir: Path | None, run: str | None, device: str | None, env: Mapping[str, str]
) -> Board:
    """The folder of the agent that is meant. Raises UserError where there is none, or more than one."""
    if config is not None:
        flags = {"agent.run": run, "agent.device": device, "agent.state_dir": state_dir}
        settings = read_config(config, flags, env)
        if settings.agent.run:
            return Board(agent_folder(settings))
        state_dir = settings.agent.state_dir
    folder = state_dir or (Path(env[STATE_DIR_VARIABLE]) if env.get(STATE_DIR_VARIABLE) else default_folder(env))
    found = [(board, status) for board, status in _boards(folder) if run in (None, status.run)]
    found = [(board, status) for board, status in found if device in (None, status.device)]
    alive = [(board, status) for board, status in found if board.is_alive()]
    if len(alive) > 1:
        names = ", ".join(f"{status.device} in run {status.run}" for _, status in alive)
        raise UserError(f"{len(alive)} agents work here: {names}. Say which with --run and --device.")
    if not found:
        which = "".join(f" of {kind} {name!r}" for kind, name in (("device", device), ("run", run)) if name)
        raise UserError(
            f"no agent{which} has left anything in {folder}; start one with kseed-edge up, or say with --config or "
            "--state-dir where it keeps its files."
        )
    board, _ = alive[0] if alive else max(found, key=lambda one: one[1].written_at_ms)
    return board


def _boards(folder: Path) -> Iterator[tuple[Board, AgentStatus]]:
    try:
        folders = sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}. Ask as the user whose agent it is.") from error
    for path in folders:
        if (status := read_status(board := Board(path))) is not None:
            yield board, status


def see(board: Board, now_s: float) -> Seen:
    """The status, and whether its agent lives. now_s: unix seconds. Raises UserError where there is none."""
    is_alive = board.is_alive()  # first: an agent that ends in between has posted its end
    status = read_status(board)
    if status is None:
        raise UserError(f"no agent has left a status in {board.folder}; start one with kseed-edge up.")
    return Seen(status, is_alive, max(0.0, now_s - status.written_at_ms / 1000), str(board.folder))


def pause(board: Board, now_s: float, for_s: float | None) -> str:
    """Leave the wish; says what comes of it."""
    until_s = None if for_s is None else now_s + for_s
    board.want(Wish("pause", now_s, until_s))
    until = "" if until_s is None else f" until {datetime.fromtimestamp(until_s):%Y-%m-%d %H:%M}"
    if board.is_alive():
        return f"paused{until}. {ACKNOWLEDGED}"
    return f"paused{until}. No agent runs just now; the next one begins with the pause."


def resume(board: Board) -> str:
    """Take back a pause, or the wish to finish."""
    wish = board.wish()
    board.want(None)
    if wish is None:
        return "nothing to resume: its owner did not pause it. kseed-edge status says what it waits for."
    return f"resumed.{'' if board.is_alive() else ' No agent runs just now.'}"


def finish(board: Board, now_s: float) -> str:
    """Leave the wish. Raises UserError where no agent runs that could finish anything."""
    if not board.is_alive():
        raise UserError("no agent runs here, so there is nothing to finish.")
    board.want(Wish("finish", now_s))
    return "finishing: the agent leaves when the round under way is finished and sent; kseed-edge status shows how far."


def log_lines(board: Board, count: int) -> list[str]:
    """The end of the log. Raises UserError where there is none."""
    try:
        return logbook.tail(board.folder / LOG, count)
    except OSError as error:
        raise UserError(f"there is no log {board.folder / LOG}: {error.strerror}.") from error


def log_from_now(board: Board) -> Iterator[str]:
    """What is added to the log, for ever."""
    return logbook.follow(board.folder / LOG)


def seconds(text: str) -> float:
    """A duration such as 90s, 30min, 2h, 1h30m or 1d. Raises UserError."""
    if DURATION.fullmatch(text) is None or not (total := sum(int(n) * _SECONDS[u] for n, u in _PART.findall(text))):
        raise UserError(f"the duration is {text!r}; give one such as 30min, 2h or 1h30m.")
    return float(total)
