"""The processes of a soak: started, killed without a warning, and started again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UnavailableError
from tools.broker import RunningBroker
from tools.demo import ONE_THREAD
from tools.processes import Child, Crew
from tools.soak_proxy import HOST
from tools.soak_schedule import AGGREGATOR, BROKER, Stage
from tools.soak_witness import Witness
from tools.soak_world import AGENTS, World, join_command, serve_command

# Its delays would grow to a minute in a storm of cuts, and most of the soak would be spent waiting.
SETTINGS = {**ONE_THREAD, "KSEED_BROKER_RECONNECT_LONGEST_S": "4"}


@dataclass(frozen=True)
class Died:
    """A process that ended by itself."""

    name: str
    exit_code: int
    tail: str


class SoakCrew:
    """Broker, aggregator and agents, by name."""

    def __init__(
        self,
        world: World,
        members: Crew,
        broker: RunningBroker,
        port: int,
        witness: Witness,
        ca_file: Path | None = None,
    ) -> None:
        """`port`: the proxy's. ca_file: who signed its certificate; None: no TLS."""
        self._tls = {} if ca_file is None else {"KSEED_BROKER_TLS": "true", "KSEED_BROKER_CA_FILE": str(ca_file)}
        self._witness = witness
        self.kills: Counter[str] = Counter()
        self._world = world
        self._members = members
        self._broker = broker
        self._address = f"{HOST}:{port}"
        self._children: dict[str, Child] = {}
        self._started: Counter[str] = Counter()
        self._back_at_s: dict[str, float] = {}  # of those that are dead

    def start(self) -> None:
        """Aggregator and agents; the broker runs."""
        for name in (AGGREGATOR, *AGENTS):
            self._start(name)

    def kill(self, name: str, now_s: float, away_s: float) -> None:
        """SIGKILL, and a new one in `away_s`; one that is dead already comes back first, to die at its start."""
        if name in self._back_at_s:
            self._restart(name)
        self.kills[name] += 1
        if name == BROKER:
            self._broker.kill()
        else:
            process = self._children[name].process
            process.kill()
            process.wait()
        self._back_at_s[name] = now_s + away_s

    def has_reached(self, name: str, stage: Stage) -> bool:
        """True when a process lives and has come so far."""
        return name not in self._back_at_s and self._witness.has_reached(name, stage)

    def bring_back(self, now_s: float) -> None:
        """Start those whose time has come."""
        for name in [name for name, at_s in self._back_at_s.items() if now_s >= at_s]:
            self._restart(name)

    def died(self) -> Died | None:
        """Who ended without being killed, if somebody did."""
        for name, child in self._children.items():
            if name not in self._back_at_s and (code := child.process.poll()) is not None:
                return Died(name, code, child.tail())
        if BROKER not in self._back_at_s and (code := self._broker.process.poll()) is not None:
            return Died(BROKER, code, self._broker.log_path.read_text(errors="replace")[-2000:])
        return None

    def finish(self, name: str, timeout_s: float) -> str | None:
        """Wait for a process's own end; returns what is wrong with it, if something is."""
        try:
            self._members.finish(self._children[name], timeout_s)
        except UnavailableError as error:
            return str(error)
        return None

    def tails(self) -> str:
        """How each log ends, for a person who asks why."""
        return "\n".join(f"--- {child.log}\n{child.tail()}" for child in self._children.values())

    def _restart(self, name: str) -> None:
        del self._back_at_s[name]
        self._witness.forget(name)
        if name == BROKER:
            self._broker.restart()
        else:
            self._start(name)

    def _start(self, name: str) -> None:
        command = (
            serve_command(self._world, self._address)
            if name == AGGREGATOR
            else join_command(self._world, name, self._address)
        )
        self._started[name] += 1
        own = dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"), str(self._world.out / "home"))
        settings = {**SETTINGS, **self._tls, **own}
        self._children[name] = self._members.start(name, command, self._world.log(name, self._started[name]), settings)
