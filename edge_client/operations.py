"""What `join` and `up` do: check everything cheap, then live."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_client import caps
from edge_client.board import LOG, Board, Life
from edge_client.config import AGGREGATOR_SECTIONS, EdgeConfig, device_of
from edge_client.data.settings import DataConfig
from edge_client.data.shapes import SHAPES, Reader, detect_shape
from edge_client.data.sources import read_records
from edge_client.events import Finish
from edge_client.lives import Lives, Place
from edge_client.logbook import Logbook
from edge_client.progress import Screen
from edge_client.signals import Asked
from edge_client.state import Limits
from edge_client.state_files import Owner, default_folder
from shared import __version__
from shared.config import load
from shared.errors import UnavailableError, UserError

AGENT = f"kseed {__version__}"


def join(config: EdgeConfig) -> Finish:
    """Take part in the run until it is finished or the owner stops it; says how it ended. Raises UserError."""
    return _live(config, lambda lives: lives.one(_limits(config)))


def up(config: EdgeConfig) -> Finish:
    """Take part for as long as the owner wants: wait for broker and run, come back after failures. Raises UserError.

    It ends where the owner stops it, where another agent has this device's id, or where it cannot begin at all.
    """
    return _live(config, Lives.many)


def _live(config: EdgeConfig, live: Callable[[Lives], Finish]) -> Finish:
    """What is cheap to check comes first: names, data, metrics file; then broker and run; the model comes last."""
    if not config.agent.run:
        raise UserError("agent.run is missing; give the run's name as KSEED_AGENT_RUN, or as run under [agent].")
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise UserError(
            "torch or transformers is not installed; install kseed with its extra: pip install 'kseed[edge]'."
        )
    check_data(config.data)
    board = Board(agent_folder(config))
    logbook = Logbook(board.folder / LOG)
    screen = Screen(sys.stdout, is_terminal=sys.stdout.isatty(), log=logbook.add)
    with ExitStack() as stack:
        stack.callback(logbook.close)
        try:
            stack.callback(Life(board.folder).end)
        except UnavailableError as error:
            screen.say(f"warning: {error} kseed-edge status will not know that this agent runs.")
        caps.apply(config.caps, screen.say)
        lives = Lives(Place(config.agent.run, device_id(config), config, board), AGENT, screen)
        with Asked(lives.leave):
            ending = live(lives)
        logbook.add(f"error: {ending.text}" if ending.exit_code else ending.text)
        if board.is_finish_asked():
            board.want(None)
        return ending


def agent_folder(config: EdgeConfig) -> Path:
    """Where the agent of this configuration keeps its files."""
    broker = f"{config.broker.host}:{config.broker.port}"
    state_dir = config.agent.state_dir or default_folder(os.environ)
    return state_dir / Owner(broker, config.agent.run, device_id(config)).folder_name


def device_id(config: EdgeConfig) -> str:
    """The one given, or one made from the host's name."""
    return config.agent.device or device_of(socket.gethostname())


def read_config(file: Path | None, flags: Mapping[str, Any], env: Mapping[str, str]) -> EdgeConfig:
    """The settings, from flags, environment, file and defaults. Raises UserError."""
    return load(EdgeConfig, file=file, env=env, flags=flags, other_sections=AGGREGATOR_SECTIONS)


def check_data(config: DataConfig) -> int:
    """How many records there are, held-out ones of another source included; needs no model.

    Raises UserError where the data is missing, empty, malformed or of no known shape.
    """
    count = 0
    for source in filter(None, (config.source, config.held_out_source)):
        records = read_records(source, split=config.split, subset=config.subset)
        shape = detect_shape(records[0], config.fields)[0] if config.shape == "auto" else SHAPES[config.shape]
        reader = Reader(shape, config.fields)
        for record in records:
            reader.value(record, shape.learned)
            if not config.template:
                reader.value(record, shape.asked)
        count += len(records)
    return count


def _limits(config: EdgeConfig) -> Limits:
    agent = config.agent
    if agent.wait:
        return Limits(connect_timeout_s=None, run_timeout_s=None)
    return Limits(connect_timeout_s=agent.connect_timeout_s, run_timeout_s=agent.run_timeout_s)
