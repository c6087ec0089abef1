"""A whole fleet in one process: the real aggregator, real agents, an in-process network, and a clock that is ours.

The model is linear regression in numpy (36 weights), trained with the reference directions of `shared`, so that a
round takes a millisecond. Everything between the agents and the aggregator is the real thing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aggregator.config import RunConfig
from aggregator.service import Service
from aggregator.spec import Spec, new_spec
from aggregator.store import Store
from edge_client import session
from edge_client.agent import Agent, Clock
from edge_client.events import Begun, Evaluated, ModelReady, Trained
from edge_client.jobs import HeldOutReport, Job, Report, StepReport, Trainer
from edge_client.outbox import Outbox
from edge_client.progress import Screen
from edge_client.state import Identity, Limits
from edge_client.tally import MetricsFile
from edge_client.telling import Teller
from shared import steprule
from shared.directions import add_displacement, displacement
from shared.faults import Faults
from shared.loopback import LoopbackNetwork
from shared.manifest import Manifest, RunBase, Tensor
from shared.messages import Plan, Run, Update
from shared.numbers import rounded_by_chance
from shared.seeds import draw
from shared.wire import coefficients_from_bytes, scalars_to_bytes

TURN_S = 0.05
SHAPES = {"bias": (4,), "weight": (4, 8)}
MANIFEST = Manifest(tuple(Tensor(name, shape) for name, shape in SHAPES.items()))


def base_weights() -> dict[str, NDArray[np.float32]]:
    """The same on every device."""
    return {name: np.full(shape, 0.25, np.float32) for name, shape in SHAPES.items()}


def digest_of(weights: dict[str, NDArray[np.float32]]) -> bytes:
    """SHA-256 over the manifest's order, 32 bytes."""
    return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).digest()


BASE = RunBase("linear", "fp32", MANIFEST, digest_of(base_weights()))


class LinearTrainer:
    """Mean square error of a linear map on data of this device alone; satisfies `Trainer`."""

    def __init__(self, device: str, base: dict[str, NDArray[np.float32]] | None = None) -> None:
        self._base = base or base_weights()
        self._device = device
        generator = np.random.default_rng(int.from_bytes(device.encode(), "little") % 2**32)
        self.samples = 5 + len(device)
        self._inputs = generator.normal(size=(self.samples, 8)).astype(np.float32)
        self._wanted = (self._inputs @ np.ones((8, 4), np.float32) * 0.5).astype(np.float32)
        self.coefficients = np.zeros(0, np.float32)
        self.loads = 0
        self.steps_taken = 0
        self.rebuilds: list[int] = []

    def load(self, run: Run) -> ModelReady:
        self._run = run
        self.loads += 1
        return ModelReady(MANIFEST, digest_of(self._base))

    def weights(self, probe: tuple[int, float] | None = None) -> dict[str, NDArray[np.float32]]:
        """The rebuilt weights, or those of a probe."""
        out = {}
        for number, tensor in enumerate(MANIFEST.tensors):
            moved = displacement(
                self._run.directions, self._run.pool_key, number, 0, tensor.elements, self.coefficients, probe=probe
            )
            flat = add_displacement(self._base[tensor.name].reshape(-1), "fp32", moved)
            out[tensor.name] = np.asarray(flat, np.float32).reshape(tensor.shape)
        return out

    def loss(self, probe: tuple[int, float] | None = None) -> float:
        weights = self.weights(probe)
        error = self._inputs @ weights["weight"].T + weights["bias"] - self._wanted
        return float(np.mean(error.astype(np.float64) ** 2))

    def rebuild(self, version: int, coefficients: bytes) -> bytes:
        self.coefficients = coefficients_from_bytes(coefficients, self._run.seeds).copy()
        self.rebuilds.append(version)
        return digest_of(self.weights())[:16]

    def train(self, plan: Plan, model_digest: bytes, done: tuple[Report, ...] = ()) -> Job:
        held_out = next((report.loss for report in done if isinstance(report, HeldOutReport)), None)
        if plan.evaluate and held_out is None:
            held_out = self.loss()
            yield HeldOutReport(self.samples, self.samples, held_out)
        device = None if plan.common_seeds else self._device
        seeds = draw(plan.nonce, device, plan.local_steps, self._run.seeds, plan.levels)
        state, scalars, losses = steprule.start(plan.step), [], []
        kept = {report.step: report for report in done if isinstance(report, StepReport)}
        for step, seed in enumerate(seeds.tolist(), start=1):
            if step in kept:
                scalars.append(np.float32(kept[step].scalar))
                losses.append(kept[step].loss)
                state, delta = steprule.advance(plan.step, state, scalars[-1])
                self.coefficients[seed] += delta
                continue
            self.steps_taken += 1
            plus, minus = self.loss((seed, plan.eps)), self.loss((seed, -plan.eps))
            scalar = rounded_by_chance((plus - minus) / (2 * plan.eps), self._run.scalar_format, 2**31)
            state, delta = steprule.advance(plan.step, state, scalar)
            self.coefficients[seed] += delta
            scalars.append(scalar)
            losses.append((plus + minus) / 2)
            if (yield StepReport(step, plan.local_steps, losses[-1], float(scalar))):
                break
        sent = scalars_to_bytes(scalars, self._run.scalar_format)
        return Trained(
            Update(plan.round, self.samples, float(np.mean(losses)), held_out, None, model_digest, sent, None)
        )

    def evaluate(self, version: int) -> Job:
        yield HeldOutReport(self.samples, self.samples, self.loss())
        return Evaluated(version)


class SmallFleet:
    """An aggregator and agents that take turns."""

    def __init__(
        self, folder: Path, config: RunConfig, *, faults: Faults | None = None, base: RunBase = BASE, seed: int = 1
    ) -> None:
        self.now_s = 0.0
        self.network = LoopbackNetwork(faults)
        self.spec: Spec = new_spec("demo", base, config, pool_key=seed, nonce_key=bytes([seed]) * 32)
        self.store = Store.open(folder / "store.sqlite", may_create=True)
        self.store.create(self.spec, 0)
        self.agents: dict[str, Agent] = {}
        self.screens: dict[str, StringIO] = {}
        self.log: list[str] = []
        self._sessions = 0
        self.serve()

    def unix_ms(self) -> int:
        return 1_700_000_000_000 + round(self.now_s * 1000)

    def serve(self) -> None:
        """Start the aggregator, or a new one after `kill_aggregator`."""
        transport = self.network.transport("aggregator", manual_acknowledge=True)
        self.service = Service(self.store, "demo", transport, self.unix_ms, self.log.append)
        self.service.start()

    def kill_aggregator(self) -> None:
        """SIGKILL: its memory is gone, its store is not. The next one serves at once."""
        self.network.kill("aggregator")
        self.serve()

    def join(
        self,
        device: str,
        trainer: Trainer | None = None,
        *,
        gate: Callable[[], str | None] = lambda: None,
        energy_j: Callable[[], float | None] = lambda: None,
        rest_s: Callable[[float], float] = lambda spent_s: 0.0,
        metrics: Path | None = None,
        limits: Limits | None = None,
        outbox: Outbox | None = None,
        log: Callable[[str], None] = lambda line: None,
        teller: Teller | None = None,
        is_asked_to_finish: Callable[[], bool] = lambda: False,
        begun: Begun | None = None,
        refused: Callable[[int], None] = lambda number: None,
    ) -> Agent:
        """A new agent process of that id, connecting."""
        self._sessions += 1
        identity = Identity("demo", device, self._sessions, "kseed test", "in-process", limits or Limits())
        screen = self.screens[device] = StringIO()
        self.agents[device] = agent = Agent(
            identity,
            self.network.transport(device, will=session.will(identity)),
            trainer or LinearTrainer(device),
            clock=Clock(lambda: self.now_s, self.unix_ms),
            screen=Screen(screen, is_terminal=False, log=log),
            gate=gate,
            energy_j=energy_j,
            rest_s=rest_s,
            metrics=MetricsFile(metrics),
            outbox=outbox,
            teller=teller,
            is_asked_to_finish=is_asked_to_finish,
            begun=begun,
            refused=refused,
        )
        agent.start()
        return agent

    def kill(self, device: str) -> None:
        """SIGKILL of an agent."""
        self.network.kill(device)
        del self.agents[device]

    def turn(self) -> None:
        """Everybody does what is to be done now; then a little time passes."""
        self.service.turn(0.0)
        for device, agent in list(self.agents.items()):
            if agent.ending is None and not agent.run_once(0.0):
                agent.close()
                assert agent.ending is not None, device
        self.now_s += TURN_S

    def run_until(self, is_done: Callable[[], bool], *, turns: int = 3_000) -> None:
        """Turn until `is_done`; a fleet that gets stuck fails."""
        for _ in range(turns):
            if is_done():
                return
            self.turn()
        said = "\n".join(f"--- {device}\n{screen.getvalue()[-1500:]}" for device, screen in self.screens.items())
        raise AssertionError(f"stuck after {turns} turns:\n" + "\n".join(self.log[-20:]) + said)

    def run_to_the_end(self) -> None:
        """Until the run is finished and every agent has left."""
        self.run_until(lambda: all(agent.ending is not None for agent in self.agents.values()))
        assert self.service.state.progress.phase == "finished"

    @property
    def coefficients(self) -> NDArray[np.float32]:
        """The newest version in the store."""
        return np.frombuffer(self.store.coefficients("demo", self.store.run("demo").progress.round), "<f4")
