"""Ten rounds of two agents over lines that lose 5% of their packets, 500 ms there and back, 64 kbit/s.

In the middle the broker is killed and stays away; `SOAK_AWAY_S=600` makes that ten minutes. Real processes in network
namespaces of their own.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aggregator.store import Store
from tools.broker import find_mosquitto
from tools.demo import ONE_THREAD
from tools.links import Line, Network, inside, missing
from tools.processes import Crew, crew
from tools.soak_check import check_fold, read_journal, read_metrics, settled_rounds
from tools.soak_world import AGENTS, RUN, World, create_command, join_command, make_world, serve_command

pytestmark = [pytest.mark.soak, pytest.mark.broker]

ROUNDS = 10
LINE = Line(loss=0.05, delay_s=0.25, up_bits_per_s=64_000, down_bits_per_s=64_000)
AWAY_S = float(os.environ.get("SOAK_AWAY_S", "10"))
LIMIT_S = 240.0 + AWAY_S
PORT = 1883
DEVICES = AGENTS[:2]

CONFIG = """\
listener {port} 0.0.0.0
allow_anonymous true
user root
persistence true
persistence_location {folder}/
autosave_interval 1
max_queued_messages 100000
"""


@dataclass
class Finished:
    """A run over bad lines, when it is over."""

    world: World
    before: dict[tuple[int, str], bytes]  # the journal when the broker was killed
    lost: int
    carried: int


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    mosquitto = find_mosquitto()
    reason = "mosquitto is not installed" if mosquitto is None else missing()
    if reason is not None:
        pytest.skip(reason)
    world = World(tmp_path_factory.mktemp("bad-network"))
    make_world(world, 1)
    network = Network(len(DEVICES), LINE, seed=1)
    try:
        with crew() as members:
            yield ten_rounds(world, network, members, str(mosquitto))
    finally:
        network.close()


def ten_rounds(world: World, network: Network, members: Crew, mosquitto: str) -> Finished:
    settings = {**ONE_THREAD, "HOME": str(world.out), "XDG_STATE_HOME": str(world.out / "state")}
    config = world.out / "mosquitto.conf"
    config.write_text(CONFIG.format(port=PORT, folder=world.out))
    broker_command = inside(network.hub, [mosquitto, "-c", str(config)])
    create = members.start("create", create_command(world, 0, rounds=ROUNDS, deadline=120), world.log("create", 1), {})
    members.finish(create, 60.0)
    broker = members.start("broker", broker_command, world.log("broker", 1), {})
    serve = inside(network.hub, serve_command(world, f"127.0.0.1:{PORT}"))
    aggregator = members.start("aggregator", serve, world.log("aggregator", 1), settings)
    agents = []
    for number, device in enumerate(DEVICES):
        join = join_command(world, device, f"{network.hub_address(number)}:{PORT}")
        join = inside(network.devices[number], join)
        agents.append(members.start(device, join, world.log(device, 1), settings))
    wait_for_round(world, ROUNDS // 2)
    broker.process.kill()
    broker.process.wait()
    before = read_journal(world.store)[0]
    with pytest.raises(subprocess.TimeoutExpired):  # nobody gives up while it is away
        aggregator.process.wait(AWAY_S)
    assert [agent.process.poll() for agent in agents] == [None] * len(agents)
    members.start("broker", broker_command, world.log("broker", 2), {})
    for child in (aggregator, *agents):
        members.finish(child, LIMIT_S)
    return Finished(world, before, network.lost, network.carried)


def wait_for_round(world: World, number: int) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        with Store.open(world.store, may_write=False) as store:
            if store.run(RUN).progress.round >= number:
                return
        time.sleep(0.2)
    raise AssertionError(f"round {number} has not begun; the logs end with:\n" + tails(world.out))


def tails(folder: Path) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(folder.glob("*-log-*.txt")))


def test_two_agents_finish_ten_rounds_over_lines_that_lose_five_percent(finished: Finished) -> None:
    found = check_fold(finished.world)
    print(f"{finished.carried} packets carried, {finished.lost} lost; {found.rounds} rounds, {found.updates} updates")
    assert found.difference is None
    assert found.rounds == ROUNDS
    assert found.counted == ROUNDS * len(DEVICES)
    assert finished.lost > 0
    last = [read_metrics(finished.world.metrics(device))[-1] for device in DEVICES]
    assert [line.version for line in last] == [ROUNDS] * len(DEVICES)
    assert len({line.model_digest for line in last}) == 1


def test_a_broker_that_is_away_costs_no_accepted_update(finished: Finished) -> None:
    after = read_journal(finished.world.store)[0]
    assert finished.before
    assert finished.before.items() <= after.items()
    told = {(number, device) for device in DEVICES for number in settled_rounds(finished.world.logs(device))}
    assert told
    assert told <= after.keys()
