"""`kseed bandwidth`: what a client-round costs on the wire, measured between the programs that people run.

A broker, the aggregator and up to three agents as processes of their own, over TLS; with `link` on lines between
network namespaces. The bytes of a round do not depend on the model, so a tiny one serves unless one is named.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from aggregator.reports import RoundReport
from edge_client.tally import RoundMetrics
from shared.errors import UnavailableError, UserError
from shared.manifest import RunBase
from shared.messages import NumberFormat
from tools.bandwidth_report import BandwidthReport, kinds_of, layers_of, other_ways, smollm2_manifest, write_csv
from tools.bandwidth_setup import on_lines, on_loopback
from tools.broker import find_mosquitto
from tools.demo import ONE_THREAD, follow
from tools.demo_report import read_lines
from tools.links import PROFILES, missing
from tools.manifest import write_manifest
from tools.out_folder import prepare_folder
from tools.processes import crew, flags, script
from tools.soak_world import AGENTS, World, make_world

RUN = "bandwidth"
ENDING_S = 120.0
DEADLINE_S = 3600

_RUN = """\
[run]
seeds = {seeds}
rounds = {rounds}
local_steps = {local_steps}
batch_size = 1
common_seeds = true
scalar_format = "{numbers}"
change_format = "{numbers}"
quorum = {agents}
min_updates = {agents}
deadline_s = {deadline_s}
"""
Say = Callable[[str], None]


@dataclass(frozen=True)
class BandwidthSettings:
    """What a person can choose. Raises UserError where that is impossible."""

    out: Path
    model: str | None = None  # hub id, folder or GGUF file; None: a tiny one
    rounds: int = 10
    local_steps: int = 200
    seeds: int = 4096
    numbers: str = "f16"  # f32, f16 or f8: of scalars up and of changes down
    tls: bool = True
    link: str | None = None
    agents: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise UserError(f"--rounds is {self.rounds}; give 2 or more: the first is the join's, and not counted.")
        if self.numbers not in get_args(NumberFormat):
            raise UserError(f"--numbers is {self.numbers!r}; allowed are {', '.join(get_args(NumberFormat))}.")
        if not 1 <= self.agents <= len(AGENTS):
            raise UserError(f"--agents is {self.agents}; allowed are 1 to {len(AGENTS)}.")
        if self.link is None:
            return
        if self.link not in PROFILES:
            raise UserError(f"--link is {self.link!r}; allowed are {', '.join(PROFILES)}.")
        if not self.tls:
            raise UserError("--link is measured with TLS alone; leave --no-tls out.")
        reason = missing() if find_mosquitto() else "mosquitto is not installed"
        if reason:
            raise UnavailableError(
                f"--link shapes a line between network namespaces, and {reason}. It needs Linux, root, iproute2, "
                "/dev/net/tun and mosquitto; without --link the loopback interface is measured."
            )


def measure_bandwidth(settings: BandwidthSettings, say: Say) -> BandwidthReport:
    """Run it; its files are in `settings.out`.

    Raises UserError for settings that cannot work, UnavailableError where a process fails (with the tail of its log).
    """
    prepare_folder(settings.out, "bandwidth")
    world = World(settings.out.resolve())
    make_world(world, 1)
    if settings.model is not None:
        write_manifest(settings.model, "bf16", world.base, name=settings.model)
    broker = _run(settings, world, say)
    agents = [read_lines(world.metrics(name), RoundMetrics) for name in AGENTS[: settings.agents]]
    agents = [[line for line in lines if line.steps] for lines in agents]
    rounds = read_lines(world.metrics("aggregator"), RoundReport)
    fewest = min(map(len, agents))
    if fewest < settings.rounds:
        raise UnavailableError(f"an agent reported {fewest} of {settings.rounds} rounds; see {world.out}.")
    report = _report(settings, world, broker, agents, rounds)
    write_csv(Path(report.files["CSV"]), [line for lines in agents for line in lines])
    if "plot" in report.files:
        from tools.bandwidth_plot import plot_bandwidth

        plot_bandwidth(Path(report.files["plot"]), report)
    world.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return report


def _report(
    settings: BandwidthSettings, world: World, broker: str, agents: list[list[RoundMetrics]], rounds: list[RoundReport]
) -> BandwidthReport:
    first = [lines[0] for lines in agents]
    later = [line for lines in agents for line in lines[1:]]
    sums = [both for line in later if (both := layers_of([line]).ip.both) is not None]
    manifest = smollm2_manifest() if settings.model is None else RunBase.read(world.base).manifest
    files = {"CSV": world.out / "bandwidth.csv", "report": world.report, "logs": world.out}
    if _has_matplotlib():
        files["plot"] = world.out / "bandwidth.png"
    return BandwidthReport(
        broker=broker,
        protocol="MQTT over TLS" if settings.tls and "amqtt" not in broker else "MQTT without TLS",
        link=settings.link,
        agents=settings.agents,
        model=settings.model or "a tiny model (the bytes of a round do not depend on it)",
        compared_with=settings.model or "for SmolLM2-135M's shapes",
        seeds=settings.seeds,
        local_steps=settings.local_steps,
        numbers=settings.numbers,
        rounds=len(later),
        client_round=layers_of(later),
        least_bytes=min(sums, default=None),
        most_bytes=max(sums, default=None),
        kinds=kinds_of(later),
        joining=layers_of(first),
        others=other_ways(manifest),
        round_s=statistics.median(report.seconds for report in rounds[1:]),
        steps_s=statistics.median(line.steps_s for line in later),
        files={name: str(path) for name, path in files.items()},
    )


def _has_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _run(settings: BandwidthSettings, world: World, say: Say) -> str:
    """The run itself, until aggregator and agent have left; says which broker it was."""
    config = _write_config(settings, world)
    with ExitStack() as stack:
        members = stack.enter_context(crew())
        if settings.link is None:
            setup = on_loopback(world.out, stack, tls=settings.tls)
        else:
            setup = on_lines(world.out, stack, members, line=PROFILES[settings.link], agents=settings.agents)
        say(f"broker: {setup.broker}")
        store = ("--store", str(world.store))
        create = ["create", RUN, "--base", str(world.base), "--config", str(config), *store]
        members.finish(
            members.start("create", [*script("kseed-aggregator"), *create], world.log("create", 1), {}), ENDING_S
        )
        where = ["--tls", "--ca-file", str(setup.ca)] if setup.ca else []
        serve = ["serve", RUN, *store, "--metrics", str(world.metrics("aggregator"))]
        serve += ["--broker", setup.address, *where]
        aggregator = members.start(
            "aggregator", setup.hub([*script("kseed-aggregator"), *serve]), world.log("aggregator", 1), ONE_THREAD
        )
        agents = []
        for number, name in enumerate(AGENTS[: settings.agents]):
            join = [
                *script("kseed-edge"),
                *_join(settings, world, name),
                "--broker",
                setup.agent_address(number),
                *where,
            ]
            agents.append(members.start(name, setup.agent(number, join), world.log(name, 1), ONE_THREAD))
        follow(members, aggregator, agents, world.metrics("aggregator"), lambda report: None)
        for agent in agents:
            members.finish(agent, ENDING_S)
        return setup.broker


def _write_config(settings: BandwidthSettings, world: World) -> Path:
    """What `create` reads."""
    config = world.out / "run.toml"
    config.write_text(
        _RUN.format(
            seeds=settings.seeds,
            rounds=settings.rounds,
            local_steps=settings.local_steps,
            numbers=settings.numbers,
            agents=settings.agents,
            deadline_s=DEADLINE_S,
        )
    )
    return config


def _join(settings: BandwidthSettings, world: World, name: str) -> list[str]:
    options: dict[str, object] = {
        "device": name,
        "model": settings.model or world.model,
        "data": world.data(name),
        "held-out": 0.2,
        "threads": 1,
        "metrics": world.metrics(name),
        "state-dir": world.out / "state",
        "nice": 0,
    }
    return ["join", RUN, "--wait", "--no-gate", *flags(options)]
