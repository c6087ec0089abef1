"""All checks of the doctor, in the order in which a person would make them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from edge_client.board import Board
from edge_client.config import EdgeConfig
from edge_client.doctor import here
from edge_client.doctor.check import Check, Finding, Seen, Trouble, examine
from edge_client.doctor.link import Way
from edge_client.doctor.talk import Talk
from edge_client.lives import AWAY_S
from edge_client.operations import AGENT, agent_folder, device_id, read_config
from edge_client.owner import see
from edge_client.status import duration
from edge_client.watching.machine import Machine
from shared.errors import UserError

CONFIGURATION = "configuration"
WIDTH = len(CONFIGURATION) + 2


def findings(file: Path | None, env: Mapping[str, str], *, is_quick: bool = False) -> Iterator[Finding]:
    """Make every check, with the settings that `up` would read; each finding as soon as it is there.

    is_quick: but for those that need torch.
    """
    try:
        config = read_config(file, {}, env)
        if not config.agent.run:
            raise UserError("agent.run is missing; give the run's name as run under [agent], or as KSEED_AGENT_RUN.")
    except UserError as error:
        yield Finding(CONFIGURATION, "failed", str(error), "Nothing else can be checked without it.")
        return
    board = Board(agent_folder(config))
    who = f"device {device_id(config)}, run {config.agent.run}, broker {config.broker.host}:{config.broker.port}"
    yield Finding(CONFIGURATION, "ok", f"{file or 'the environment alone'}: {who}")
    with ExitStack() as stack:
        talk = Talk(config.broker, config.agent.run, device_id(config), AGENT, AWAY_S)
        stack.callback(talk.close)
        yield from examine([*_of_the_way(config, board, talk), *_of_the_machine(config, board, talk)])
        if not board.is_alive():  # else it fits: the memory it takes is not free any more
            yield from examine([Check("model", lambda: here.model(config, talk.run))])
        if not is_quick:
            yield from examine([Check("kernel", partial(here.kernel, config))])


def _of_the_way(config: EdgeConfig, board: Board, talk: Talk) -> list[Check]:
    way = Way(config.broker)
    checks = [
        Check("name", way.name),
        Check("connection", way.connection, ("name",)),
        Check("TLS", way.tls, ("connection",)),
    ]
    if board.is_alive():
        return [*checks, Check("agent", partial(_ask_the_agent, board), ("TLS",))]
    return [
        *checks,
        Check("login", talk.login, ("TLS",)),
        Check("limits", talk.limits, ("login",)),
        Check("own topics", talk.topics, ("login",)),
        Check("run", talk.about_run, ("login",)),
    ]


def _of_the_machine(config: EdgeConfig, board: Board, talk: Talk) -> list[Check]:
    machine = Machine(device=config.model.device, disk=board.folder, broker=config.broker.host)
    return [
        Check("clock", lambda: here.clock(talk.plan, time.time())),
        Check("data", partial(here.data, config)),
        Check("disk", partial(here.disk, board.folder, config)),
        Check("sensors", partial(here.sensors, machine, config)),
    ]


def _ask_the_agent(board: Board) -> Seen:
    """The agent that runs has the connection; a second one under its id would take it away."""
    seen = see(board, time.time())
    status = seen.status
    if status.connected_since_ms is None:
        why = status.trouble or status.text
        raise Trouble(f"the agent runs and is not connected: {why}", "See kseed-edge status and kseed-edge logs.")
    since = duration(time.time() - status.connected_since_ms / 1000)
    trip = "" if status.round_trip_s is None else f", and the broker answers in {status.round_trip_s * 1000:.3g} ms"
    return Seen(
        f"it runs and has been connected for {since}{trip}; so login, limits, own topics and run are not tried: that "
        "would take its connection away"
    )
