"""An agent's lives in one process: `join` has one, `up` as many as it takes.

Each life is a new session with a new connection, and the model goes with the old one: an agent that waits holds none.
"""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import dataclass
from datetime import datetime

import msgspec
import psutil

from edge_client import byte_budget, session
from edge_client.agent import Agent, Clock
from edge_client.board import Board
from edge_client.config import EdgeConfig
from edge_client.events import Finish, ModelReady
from edge_client.first_order_kept import KeptGradient
from edge_client.gate import Gate
from edge_client.jobs import Job, Report
from edge_client.kept_steps import KeptSteps, ResumingTrainer
from edge_client.ledger import Ledger
from edge_client.outbox import Outbox
from edge_client.progress import Screen
from edge_client.state import Identity, Limits
from edge_client.state_files import Owner
from edge_client.status import duration
from edge_client.tally import MetricsFile
from edge_client.telling import IDLE_S, Teller, tell_failure
from edge_client.watching.machine import Machine
from shared.errors import UserError
from shared.messages import Plan, Run

AWAY_S = 86_400  # how long the broker keeps receipts and changes for a device that is away
FIRST_WAIT_S, LONGEST_WAIT_S = 60.0, 3600.0  # before the next life, after a failure; doubles
STABLE_S = 3600.0  # a life this long clears the record
POLL_S = 1.0  # ctrl-C is heard this late while nothing is done


@dataclass(frozen=True)
class Place:
    """Which agent this is, and where its files are."""

    run: str
    device: str
    config: EdgeConfig
    board: Board


class Lives:
    """All lives of one agent in this process."""

    def __init__(self, place: Place, agent: str, screen: Screen) -> None:
        """agent: software and version. Raises UserError where the metrics file cannot be written."""
        self._place, self._agent, self._screen = place, agent, screen
        config = place.config
        self._metrics = MetricsFile(config.agent.metrics)
        self._machine = Machine(device=config.model.device, disk=place.board.folder.parent, broker=config.broker.host)
        self._started_at_ms = unix_ms()
        self._is_leaving = False
        self._current: Agent | None = None

    def leave(self) -> None:
        """Stop after the step under way. May be called from a signal handler."""
        self._is_leaving = True
        if self._current is not None:
            self._current.leave()

    def one(self, limits: Limits) -> Finish:
        """Live once; says how it ended."""
        place = self._place
        identity = Identity(
            run=place.run,
            device=place.device,
            session=secrets.randbits(64),
            agent=self._agent,
            broker=f"{place.config.broker.host}:{place.config.broker.port}",
            limits=limits,
        )
        self._current = self._make(identity)
        if self._is_leaving:
            self._current.leave()
        try:
            return self._current.run()
        finally:
            self._current = None
            _free_model()

    def many(self) -> Finish:
        """Live until the owner wants the end, or another agent has this device's id; says how the last one ended."""
        limits = Limits(connect_timeout_s=None, run_timeout_s=None, waits_after_end=True)
        lives = failures = 0
        while True:
            began_s = time.monotonic()
            try:
                ending = self.one(limits)
            except UserError as error:
                if not lives:
                    raise  # it cannot begin at all
                ending = Finish(error.exit_code, str(error))  # such as a certificate that is being replaced just now
            lives += 1
            if ending.is_taken or self._is_over(ending):
                return ending
            if ending.exit_code == 0:
                self._screen.say(ending.text)
                continue  # the run is finished; the next life waits for it to go on
            failures = 1 if time.monotonic() - began_s >= STABLE_S else failures + 1
            wait_s = min(FIRST_WAIT_S * 2.0 ** min(failures - 1, 20), LONGEST_WAIT_S)
            if not self._rest(ending.text, wait_s):
                return Finish(0, f"left run {self._place.run!r}")

    def _is_over(self, ending: Finish) -> bool:
        return self._is_leaving or (ending.exit_code == 0 and self._place.board.is_finish_asked())

    def _rest(self, why: str, wait_s: float) -> bool:
        """Wait after a failure; False where the owner wants the end meanwhile."""
        board, until_s = self._place.board, time.monotonic() + wait_s
        text = f"{why} Trying again in {duration(wait_s)}."
        self._screen.say(f"error: {text}")
        tell_failure(board, text, unix_ms())
        told_s = wait_s
        while (left_s := until_s - time.monotonic()) > 0:
            if self._is_leaving or board.is_finish_asked():
                return False
            if told_s - left_s >= IDLE_S:  # else its status would grow old, as that of an agent that hangs
                tell_failure(board, f"{why} Trying again in {duration(left_s)}.", unix_ms())
                told_s = left_s
            time.sleep(min(left_s, POLL_S))
        return True

    def _make(self, identity: Identity) -> Agent:
        from shared.mqtt import MqttTransport

        config, board, say = self._place.config, self._place.board, self._screen.say
        owner = Owner(identity.broker, identity.run, identity.device)
        state_dir = board.folder.parent
        keepalive_s = byte_budget.keepalive_s(config.budget, config.broker.keepalive_s)
        broker = msgspec.structs.replace(config.broker, keepalive_s=keepalive_s)
        transport = MqttTransport(broker, identity.device, will=session.will(identity), session_expiry_s=AWAY_S)
        budget = Ledger(
            transport,
            datetime.now,
            limits=config.budget,
            keepalive_s=keepalive_s,
            folder=state_dir,
            owner=owner,
            say=say,
        )
        kept = KeptSteps(state_dir, owner, say, time.monotonic)
        gradient = KeptGradient(state_dir, owner, identity.agent, say, time.monotonic)
        late = _LateTrainer(identity.device, config, self._screen, gradient)
        return Agent(
            identity,
            transport,
            ResumingTrainer(late, kept, identity.agent, say),
            clock=Clock(time.monotonic, unix_ms),
            screen=self._screen,
            gate=Gate(config.gate, self._machine.read, wish=board.wish),
            memory_bytes=process_memory_bytes,
            energy_j=self._machine.energy.total_j,
            rest_s=config.caps.rest_s,
            is_asked_to_finish=board.is_finish_asked,
            teller=Teller(board, config.gate, self._machine.read, say, self._started_at_ms),
            metrics=self._metrics,
            outbox=Outbox(state_dir, owner, say),
            ledger=budget,
            begun=kept.begun(),
            refused=gradient.take_back,
        )


def _free_model() -> None:
    """A model refers to itself, so only the collector frees it, which an agent that does little may never call."""
    if "torch" in sys.modules:
        from edge_client.shortage import release

        release()


class _LateTrainer:
    """`edge_client.trainer`, imported when the model is: torch and transformers take seconds that a typo need not."""

    def __init__(self, device: str, config: EdgeConfig, screen: Screen, gradient: KeptGradient) -> None:
        self._device = device
        self._config = config
        self._screen = screen
        self._kept = gradient

    def load(self, run: Run) -> ModelReady:
        from edge_client.first_order import GradientSettings
        from edge_client.trainer import ModelTrainer

        config = self._config
        self._trainer = ModelTrainer(
            self._device,
            config.data,
            model=config.model,
            kernel=config.kernel,
            say=self._screen.say,
            gradient=GradientSettings(
                config.model.estimator, self._kept, config.budget.round_bytes, config.data.max_length
            ),
        )
        return self._trainer.load(run)

    def rebuild(self, version: int, coefficients: bytes) -> bytes:
        return self._trainer.rebuild(version, coefficients)

    def train(self, plan: Plan, model_digest: bytes, done: tuple[Report, ...] = ()) -> Job:
        return self._trainer.train(plan, model_digest, done)

    def evaluate(self, version: int) -> Job:
        return self._trainer.evaluate(version)


def unix_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


def process_memory_bytes() -> int:
    """Resident set of this process."""
    return int(psutil.Process().memory_info().rss)
