"""The broker of `kseed bandwidth`, and where the programs stand: on the loopback interface, or behind lines."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UnavailableError
from tools.broker import find_mosquitto, start_broker
from tools.certificates import make_certificates
from tools.links import Line, Network, inside
from tools.processes import Crew

TLS_PORT = 8883
BROKER_START_S = 20.0

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


@dataclass(frozen=True)
class Setup:
    """Where the programs find each other, and in which namespace each runs."""

    broker: str  # for people
    address: str  # host:port of the broker, where there is no network
    ca: Path | None
    network: Network | None

    def agent_address(self, agent: int) -> str:
        """The broker, host:port, as that agent sees it."""
        return self.address if self.network is None else f"{self.network.hub_address(agent)}:{TLS_PORT}"

    def agent(self, agent: int, command: list[str]) -> list[str]:
        """In the namespace of that agent."""
        return command if self.network is None else inside(self.network.devices[agent], command)

    def hub(self, command: list[str]) -> list[str]:
        """In the hub's."""
        return command if self.network is None else inside(self.network.hub, command)


def on_loopback(out: Path, stack: ExitStack, *, tls: bool) -> Setup:
    """Everything on the loopback interface; the broker ends with `stack`."""
    extra, ca = "", None
    if tls and find_mosquitto():
        made = make_certificates(out / "certificates", ["127.0.0.1"])
        extra, ca = f"cafile {made.ca}\ncertfile {made.cert}\nkeyfile {made.key}\n", made.ca
    broker = start_broker(out / "broker", extra_config=extra)
    stack.callback(broker.stop)
    note = "" if ca or not tls else ", without TLS: kseed configures TLS for mosquitto alone"
    where = f"{broker.host}:{broker.port}"
    return Setup(f"{broker.kind} {broker.version}{note}", where, ca, None)


def on_lines(out: Path, stack: ExitStack, members: Crew, *, line: Line, agents: int) -> Setup:
    """Broker and aggregator in a hub's namespace, each agent behind a line of its own."""
    network = Network(agents, line, seed=1)
    stack.callback(network.close)
    made = make_certificates(out / "certificates", ["127.0.0.1", *map(network.hub_address, range(agents))])
    config, log = out / "mosquitto.conf", out / "mosquitto.log"
    config.write_text(_BROKER.format(port=TLS_PORT, ca=made.ca, cert=made.cert, key=made.key, log=log))
    program = str(find_mosquitto())
    members.start("broker", inside(network.hub, [program, "-c", str(config)]), out / "broker.log", {})
    deadline_s = time.monotonic() + BROKER_START_S
    while " running" not in (log.read_text() if log.exists() else ""):
        members.check()
        if time.monotonic() > deadline_s:
            raise UnavailableError(f"mosquitto did not start within {BROKER_START_S:.0f} s; its log is {log}.")
        time.sleep(0.05)
    return Setup("mosquitto", f"127.0.0.1:{TLS_PORT}", made.ca, network)
