"""`kseed bandwidth`: what a client-round costs on the wire, measured between the programs that people run.

A broker, the aggregator and one agent as processes of their own, over TLS; on a line of a network namespace with
`link`. The bytes of a round do not depend on the model, so a tiny one, made on the spot, serves unless one is named.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from aggregator.reports import RoundReport
from edge_client.tally import RoundMetrics
from shared.errors import UnavailableError, UserError
from shared.manifest import Manifest, RunBase, Tensor
from shared.messages import NumberFormat
from tools.bandwidth_report import BandwidthReport, kinds_of, layers_of, other_ways, write_csv
from tools.broker import find_mosquitto, start_broker
from tools.certificates import make_certificates
from tools.demo import ONE_THREAD, follow
from tools.demo_report import read_lines
from tools.links import PROFILES, Network, inside, missing
from tools.manifest import write_manifest
from tools.out_folder import prepare_folder
from tools.processes import Crew, crew, script
from tools.soak_world import AGENTS, World, make_world

RUN = "bandwidth"
DEVICE = "device-1"
HUB_ADDRESS = "10.77.0.1"
TLS_PORT = 8883
ENDING_S = 120.0
BROKER_START_S = 20.0
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
quorum = 1
min_updates = 1
deadline_s = {deadline_s}
"""
_BROKER = """\
listener {port} 0.0.0.0
allow_anonymous true
user root
cafile {ca}
certfile {cert}
keyfile {key}
max_queued_messages 100000
max_packet_size 16777216
set_tcp_nodelay true
log_dest file {log}
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

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise UserError(f"--rounds is {self.rounds}; give 2 or more: the first is the join's, and not counted.")
        if self.numbers not in get_args(NumberFormat):
            raise UserError(f"--numbers is {self.numbers!r}; allowed are {', '.join(get_args(NumberFormat))}.")
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


@dataclass(frozen=True)
class Setup:
    """Where the programs find each other, and in which namespace each runs."""

    broker: str  # for people
    agent_address: str  # host:port of the broker, as the agent sees it
    aggregator_address: str
    ca: Path | None
    network: Network | None

    def agent(self, command: list[str]) -> list[str]:
        """In the device's namespace."""
        return command if self.network is None else inside(self.network.devices[0], command)

    def hub(self, command: list[str]) -> list[str]:
        """In the hub's."""
        return command if self.network is None else inside(self.network.hub, command)


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
    lines = [line for line in read_lines(world.metrics(DEVICE), RoundMetrics) if line.steps]
    rounds = read_lines(world.metrics("aggregator"), RoundReport)
    if len(lines) < settings.rounds:
        raise UnavailableError(f"the agent reported {len(lines)} of {settings.rounds} rounds; see {world.out}.")
    report = _report(settings, world, broker, lines, rounds)
    write_csv(Path(report.files["CSV"]), lines)
    if "plot" in report.files:
        from tools.bandwidth_plot import plot_bandwidth

        plot_bandwidth(Path(report.files["plot"]), report)
    world.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return report


def _report(
    settings: BandwidthSettings, world: World, broker: str, lines: list[RoundMetrics], rounds: list[RoundReport]
) -> BandwidthReport:
    later = lines[1:]
    sums = [both for line in later if (both := layers_of([line]).ip.both) is not None]
    manifest = smollm2_manifest() if settings.model is None else RunBase.read(world.base).manifest
    files = {"CSV": world.out / "bandwidth.csv", "report": world.report, "logs": world.out}
    if _has_matplotlib():
        files["plot"] = world.out / "bandwidth.png"
    return BandwidthReport(
        broker=broker,
        protocol="MQTT over TLS" if settings.tls and "amqtt" not in broker else "MQTT without TLS",
        link=settings.link,
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
        joining=layers_of(lines[:1]),
        others=other_ways(manifest),
        round_s=statistics.median(report.seconds for report in rounds[1:]),
        steps_s=statistics.median(line.steps_s for line in later),
        files={name: str(path) for name, path in files.items()},
    )


def _has_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def smollm2_manifest() -> Manifest:
    """The tensors of SmolLM2-135M: what other ways would send, where the model measured with is a tiny one."""
    width, mid, layers, vocabulary, kv = 576, 1536, 30, 49152, 192
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mid, width),
        "mlp.up_proj": (mid, width),
        "mlp.down_proj": (width, mid),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    tensors = [Tensor("model.embed_tokens.weight", (vocabulary, width)), Tensor("model.norm.weight", (width,))]
    tensors += [
        Tensor(f"model.layers.{n}.{name}.weight", shape) for n in range(layers) for name, shape in shapes.items()
    ]
    return Manifest(tuple(tensors))


def _run(settings: BandwidthSettings, world: World, say: Say) -> str:
    """The run itself, until aggregator and agent have left; says which broker it was."""
    config = world.out / "run.toml"
    config.write_text(
        _RUN.format(
            seeds=settings.seeds,
            rounds=settings.rounds,
            local_steps=settings.local_steps,
            numbers=settings.numbers,
            deadline_s=DEADLINE_S,
        )
    )
    with ExitStack() as stack:
        members = stack.enter_context(crew())
        setup = _linked(settings, world, members, stack) if settings.link else _local(settings, world, stack)
        say(f"broker: {setup.broker}")
        store = ("--store", str(world.store))
        create = ["create", RUN, "--base", str(world.base), "--config", str(config), *store]
        members.finish(
            members.start("create", [*script("kseed-aggregator"), *create], world.log("create", 1), {}), ENDING_S
        )
        where = ["--tls", "--ca-file", str(setup.ca)] if setup.ca else []
        serve = ["serve", RUN, *store, "--metrics", str(world.metrics("aggregator"))]
        serve += ["--broker", setup.aggregator_address, *where]
        aggregator = members.start(
            "aggregator", setup.hub([*script("kseed-aggregator"), *serve]), world.log("aggregator", 1), ONE_THREAD
        )
        join = [*script("kseed-edge"), *_join(settings, world), "--broker", setup.agent_address, *where]
        agent = members.start("agent", setup.agent(join), world.log(DEVICE, 1), ONE_THREAD)
        follow(members, aggregator, [agent], world.metrics("aggregator"), lambda report: None)
        members.finish(agent, ENDING_S)
        return setup.broker


def _join(settings: BandwidthSettings, world: World) -> list[str]:
    options: dict[str, object] = {
        "device": DEVICE,
        "model": settings.model or world.model,
        "data": world.data(AGENTS[0]),
        "held-out": 0.2,
        "threads": 1,
        "metrics": world.metrics(DEVICE),
        "state-dir": world.out / "state",
        "nice": 0,
    }
    return [
        "join",
        RUN,
        "--wait",
        "--no-gate",
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
    ]


def _local(settings: BandwidthSettings, world: World, stack: ExitStack) -> Setup:
    """Everything on the loopback interface."""
    extra, ca = "", None
    if settings.tls and find_mosquitto():
        made = make_certificates(world.out / "certificates", ["127.0.0.1"])
        extra, ca = f"cafile {made.ca}\ncertfile {made.cert}\nkeyfile {made.key}\n", made.ca
    broker = start_broker(world.out / "broker", extra_config=extra)
    stack.callback(broker.stop)
    note = "" if ca or not settings.tls else ", without TLS: kseed configures TLS for mosquitto alone"
    where = f"{broker.host}:{broker.port}"
    return Setup(f"{broker.kind} {broker.version}{note}", where, where, ca, None)


def _linked(settings: BandwidthSettings, world: World, members: Crew, stack: ExitStack) -> Setup:
    """Broker and aggregator in a hub's namespace, the agent behind a line."""
    assert settings.link is not None
    network = Network(1, PROFILES[settings.link], seed=1)
    stack.callback(network.close)
    made = make_certificates(world.out / "certificates", ["127.0.0.1", HUB_ADDRESS])
    config, log = world.out / "mosquitto.conf", world.out / "mosquitto.log"
    config.write_text(_BROKER.format(port=TLS_PORT, ca=made.ca, cert=made.cert, key=made.key, log=log))
    program = str(find_mosquitto())
    members.start("broker", inside(network.hub, [program, "-c", str(config)]), world.log("broker", 1), {})
    deadline_s = time.monotonic() + BROKER_START_S
    while " running" not in (log.read_text() if log.exists() else ""):
        members.check()
        if time.monotonic() > deadline_s:
            raise UnavailableError(f"mosquitto did not start within {BROKER_START_S:.0f} s; its log is {log}.")
        time.sleep(0.05)
    where = f"{network.hub_address(0)}:{TLS_PORT}", f"127.0.0.1:{TLS_PORT}"
    return Setup("mosquitto", *where, made.ca, network)
