"""The agent as a service: it owns the connection, the clock and the model, and does what `session` decides.

One thread. Training runs between polls, one local step at a time, so every message, the gate and ctrl-C are heard
within a step. The network has threads of its own, which only fill the queue that `poll` reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from typing_extensions import assert_never

from edge_client import session
from edge_client.events import (
    Abandon,
    Action,
    Begun,
    Broken,
    CloseRound,
    Conclude,
    Evaluate,
    Event,
    Finish,
    Forget,
    GateChanged,
    Keep,
    Leave,
    LeaveAfterRound,
    LoadModel,
    ModelAction,
    Publish,
    Rebuild,
    Rebuilt,
    Refused,
    Say,
    Subscribe,
    Tick,
    Train,
    Unsubscribe,
)
from edge_client.job_runner import JobRunner
from edge_client.jobs import StepReport, Trainer
from edge_client.ledger import Ledger
from edge_client.outbox import NoOutbox, Outbox
from edge_client.progress import Screen, Status, activity, status_line
from edge_client.reading import Sent, read
from edge_client.state import Identity
from edge_client.tally import MetricsFile, Tally, round_line
from edge_client.telling import NoTeller, Teller, View
from shared.errors import UserError
from shared.transport import Delivered, Received, Transport, Undelivered
from shared.transport import Event as TransportEvent
from shared.wire import encode

EXIT_BROKEN = 1  # as Python ends after an exception that nobody expected
IDLE_S = 1.0  # how long an idle agent sleeps at a time: ctrl-C and timeouts are heard this late


@dataclass(frozen=True)
class Clock:
    """Where time comes from."""

    now_s: Callable[[], float]  # monotonic
    unix_ms: Callable[[], int]


class Agent:
    """One device in one run. `run` is the whole life; `run_once` is one turn of it, for tests."""

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        trainer: Trainer,
        *,
        clock: Clock,
        screen: Screen,
        gate: Callable[[], str | None] = lambda: None,
        memory_bytes: Callable[[], int | None] = lambda: None,
        energy_j: Callable[[], float | None] = lambda: None,
        rest_s: Callable[[float], float] = lambda spent_s: 0.0,
        is_asked_to_finish: Callable[[], bool] = lambda: False,
        teller: Teller | None = None,
        metrics: MetricsFile | None = None,
        outbox: Outbox | None = None,
        ledger: Ledger | None = None,
        begun: Begun | None = None,
        refused: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.ending: Finish | None = None
        self._outbox = outbox or NoOutbox()
        self.state = session.start(identity, clock.now_s(), clock.unix_ms(), self._outbox.read(), begun)
        self._transport = transport
        self._trainer = trainer
        self._clock = clock
        self._screen = screen
        self._gate = gate
        self._memory_bytes = memory_bytes
        self._energy_j = energy_j
        self._is_asked_to_finish = is_asked_to_finish
        self._refused = refused
        self._teller = teller or NoTeller()
        self._jobs = JobRunner(clock.now_s, rest_s)
        self._metrics = metrics or MetricsFile(None)
        self._ledger = ledger or Ledger(transport, lambda: datetime.fromtimestamp(clock.unix_ms() / 1000))
        self._tally = Tally(transport.traffic(), energy_j())
        self._sent = Sent()
        self._is_leaving = False
        self._last_turn_s = clock.now_s()

    def start(self) -> None:
        """Begin connecting."""
        self._feed(LeaveAfterRound(self._is_asked_to_finish()))  # before a plan that comes in
        self._transport.start()

    def leave(self) -> None:
        """Stop after the step under way. May be called from a signal handler."""
        self._is_leaving = True

    def run(self) -> Finish:
        """Live until the run, the owner or another agent ends it; says how it ended."""
        self.start()
        try:
            while self.run_once(IDLE_S):
                pass
        except BaseException as error:
            self._feed(Leave())  # the offline presence goes out, whatever happened
            text = f"the agent broke: {type(error).__name__}: {' '.join(str(error).split())}"
            self.ending = Finish(EXIT_BROKEN, text)
            self._screen.say(f"error: {text}")
            raise
        finally:
            self.close()
        assert self.ending is not None
        return self.ending

    def close(self) -> None:
        """Let go of the model's work and of the connection."""
        self._jobs.drop()
        self._screen.end()
        self._transport.close()
        self._ledger.today()
        self._ledger.save()
        self._tell()

    def run_once(self, timeout_s: float) -> bool:
        """Hear what there is (idle: wait up to `timeout_s` seconds for it), then do one step; False at the end."""
        self._tick()
        if not self._may_work:
            self._look_at_gate()  # a plan that comes in now may load or rebuild the model
        wait_s = 0.0 if self._may_work or self._is_leaving else timeout_s
        if (rest_left_s := self._jobs.rest_left_s) > 0:
            wait_s = min(wait_s, rest_left_s)
        while (event := self._transport.poll(wait_s)) is not None:
            wait_s = 0.0
            self._hear(event)
        self._tick()
        self._feed(Leave() if self._is_leaving else LeaveAfterRound(self._is_asked_to_finish()))
        if self._may_work:
            self._look_at_gate()
        if self._may_work:
            self._work()
        if self._screen.is_due(now_s := self._clock.now_s()):
            self._screen.show(status_line(self._status()), now_s)
        if self._teller.is_due(self.state, self._jobs.report):
            self._tell()
        return not self.state.is_finished

    def _look_at_gate(self) -> None:
        reason = self._gate()
        spent = self._ledger.pause(self.state, is_held=reason is not None)
        self._feed(GateChanged(reason or spent, self._ledger.is_quiet))

    @property
    def _may_work(self) -> bool:
        return self._jobs.has_job and session.may_step(self.state) and self._jobs.rest_left_s <= 0

    def _tick(self) -> None:
        now_s = self._clock.now_s()
        if self.state.pause is not None:
            self._tally.paused_s += now_s - self._last_turn_s
        self._last_turn_s = now_s
        self._outbox.retry(now_s)
        self._feed(Tick(now_s, self._clock.unix_ms()))

    def _hear(self, event: TransportEvent) -> None:
        if isinstance(event, (Delivered, Undelivered)):
            if isinstance(event, Delivered):
                self._teller.answered(event, self._clock.unix_ms())
            if (outcome := self._sent.outcome(event)) is not None:
                self._feed(outcome)
            return
        self._feed(read(event) if isinstance(event, Received) else event)

    def _feed(self, event: Event) -> None:
        """Let the session decide, do what it says, and tell it what came of that."""
        events = deque([event])
        while events:
            self.state, actions = session.step(self.state, events.popleft())
            for action in actions:
                if (answer := self._perform(action)) is not None:
                    events += (Tick(self._clock.now_s(), self._clock.unix_ms()), answer)

    def _perform(self, action: Action) -> Event | None:
        match action:
            case Subscribe(topic):
                self._ledger.subscribe(topic)
            case Unsubscribe(topic):
                self._transport.unsubscribe(str(topic))
            case Publish(topic, message, retain):
                self._sent.add(topic.kind, self._transport.publish(str(topic), encode(message), retain=retain))
            case Say(text, is_warning):
                self._screen.say(f"warning: {text}" if is_warning else text)
            case Keep(kept):
                self._outbox.keep(kept)
            case Forget():
                self._outbox.forget()
            case Refused(number):
                self._refused(number)
            case CloseRound():
                self._close_round(action)
            case Finish():
                self.ending = action
            case _:
                try:
                    return self._perform_on_model(action)
                except UserError as error:
                    return Broken(error.exit_code, str(error))
        return None

    def _perform_on_model(self, action: ModelAction) -> Event | None:
        match action:
            case LoadModel(run):
                self._screen.say(f"run {run.run!r}: loading the model")
                self._tell()
                return self._trainer.load(run)
            case Rebuild(version, coefficients):
                began_s = self._clock.now_s()
                digest = self._trainer.rebuild(version, coefficients)
                self._tally.rebuilt(version, digest, self._clock.now_s() - began_s)
                return Rebuilt(version, digest)
            case Train(plan, digest):
                self._jobs.begin(self._trainer.train(plan, digest))
            case Evaluate(version):
                self._jobs.begin(self._trainer.evaluate(version))
            case Conclude():
                self._jobs.conclude()
            case Abandon():
                self._jobs.drop()
            case _:
                assert_never(action)
        return None

    def _work(self) -> None:
        outcome = self._jobs.step(self._tally)
        if outcome is not None:
            self._tick()
            self._feed(outcome)

    def _close_round(self, action: CloseRound) -> None:
        identity = self.state.identity
        metrics, self._tally = self._tally.close(
            run=identity.run,
            device=identity.device,
            round_number=action.round,
            receipt=action.receipt,
            traffic=self._transport.traffic(),
            unix_ms=self._clock.unix_ms(),
            energy_j=self._energy_j(),
        )
        self._ledger.round_over(metrics)
        self._screen.say(round_line(metrics))
        try:
            self._metrics.add(metrics)
        except UserError as error:  # a full disk is no reason to stop training
            self._screen.say(f"warning: {error}")

    def _tell(self) -> None:
        bytes_today, budget = self._ledger.today(), self._ledger.day_bytes
        now, digest = self._clock.unix_ms(), self._tally.digest
        self._teller.tell(
            View(self.state, self._jobs.report, bytes_today, budget, self._energy_j(), digest, self.ending, now)
        )

    def _status(self) -> Status:
        plan = self.state.plan
        return Status(
            run=self.state.identity.run,
            round=plan.round if plan is not None else None,
            activity=activity(self.state, self._jobs.report),
            loss=self._jobs.report.loss if isinstance(self._jobs.report, StepReport) else None,
            memory_bytes=self._memory_bytes(),
            traffic=self._transport.traffic(),
        )
