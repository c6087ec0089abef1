"""The aggregator's loop, on one thread: read what came, decide, commit, send, acknowledge; in this order.

Messages that wait together are decided together and share one transaction. If it fails, the state is what it was
before, and the devices are told to send again. Nothing that a peer sends ends the loop or fills the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Union

from aggregator import events as happenings
from aggregator.answers import Answers
from aggregator.attendance import Attendance
from aggregator.broker_config import packet_limit_error
from aggregator.events import Action, Event, KeepProgress, KeepUpdate, KeepVersion, Note, Publish, SendReceipt
from aggregator.intake import Intake, acknowledge, round_of
from aggregator.records import Command
from aggregator.rounds import step
from aggregator.state import State
from aggregator.store import Store
from aggregator.telling import Telling
from shared.errors import PeerError, UnavailableError, UserError
from shared.messages import Receipt, Update
from shared.refusals import Refusal
from shared.topics import Topic, every_device, parse_topic
from shared.transport import Connected, Delivered, Disconnected, Received, Transport, Undelivered
from shared.wire import decode, encode, kind_of

MAX_BATCH = 512  # messages that share a transaction
MAX_EVENTS = 2048  # of the transport, in one turn
ATTENDANCE_EVERY_MS = 5_000
COMMANDS_EVERY_MS = 500
POLL_S = 0.25

Ending = Literal["finished", "asked to leave"]
Uplink = Union[happenings.UpdateArrived, happenings.BadUplink]


@dataclass
class _Turn:
    """What one turn of the loop has decided so far. Nothing of it counts before it is committed."""

    state: State
    actions: list[Action] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    senders: dict[str, int] = field(default_factory=dict)  # device -> round of what it sent
    commands: list[Command] = field(default_factory=list)

    def decide(self, event: Event) -> None:
        """Step."""
        self.state, actions = step(self.state, event)
        self.actions.extend(actions)


class Service:
    """Serves one run. The caller holds the run's lock, and closes transport and store."""

    def __init__(
        self,
        store: Store,
        run: str,
        transport: Transport,
        clock: Callable[[], int],
        log: Callable[[str], None],
        metrics: Path | None = None,
    ) -> None:
        """`clock` gives unix milliseconds and never goes back. Raises UserError for an unknown run or damaged store."""
        self._store = store
        self._run = run
        self._transport = transport
        self._clock = clock
        self._log = log
        self._telling = Telling(run, log, metrics)
        self._answers = Answers(run, transport)
        self.state = store.state(run)
        self._is_connected = False
        self._was_connected = False
        self._commands_at_ms = 0
        self._must_begin = False
        self._is_store_down = False
        self._intake = Intake(self._answers)
        self._attendance = Attendance()
        self._attendance_at_ms = 0
        self._counted = transport.traffic()
        self._ignored = 0

    def serve(self, should_leave: Callable[[], bool], *, wait_for_broker_s: float) -> Ending:
        """Serve until the run is finished or `should_leave`.

        Raises UnavailableError if the broker is not reached within `wait_for_broker_s` at first, or is lost for good,
        UserError where the broker's limits are too low for the run, or the store is damaged: the devices keep what
        they sent, and are told so.
        """
        self.start()
        give_up_at_ms = self._clock() + int(wait_for_broker_s * 1000)
        reason = "no answer"
        while not should_leave():
            lost = self.turn(POLL_S)
            reason = lost or reason
            if self._was_connected and self.state.progress.phase == "finished":
                return "finished"
            if not self._was_connected and self._clock() >= give_up_at_ms:
                raise UnavailableError(
                    f"the broker could not be reached within {wait_for_broker_s:g} s: {reason}. "
                    "Check --broker and that the broker runs."
                )
        return "asked to leave"

    def start(self) -> None:
        """Subscribe and begin connecting."""
        progress = self.state.progress
        self._log(
            f"run {self._run}: {progress.phase}, round {progress.round} of {self.state.spec.config.rounds}, "
            f"{len(self.state.updates)} updates of this round in the store"
        )
        self._transport.subscribe(every_device(self._run, "update"))
        self._transport.subscribe(every_device(self._run, "presence"))
        self._transport.start()

    def turn(self, timeout_s: float) -> str | None:
        """One turn: wait for something up to `timeout_s`, then deal with all that waits.

        Returns why the connection was lost, if it was. Raises UnavailableError where it is lost for good.
        """
        turn = _Turn(self.state)
        lost: str | None = None
        if self._must_begin and self._is_connected:  # it could not be stored
            turn.decide(happenings.Begin(self._clock()))
        event, polled = self._transport.poll(timeout_s), 1
        while event is not None:
            if isinstance(event, Received):
                self._arrived(event)
            elif isinstance(event, Connected):
                self._connected(event)
                turn.decide(happenings.Begin(self._clock()))
            elif isinstance(event, Disconnected):
                lost = self._lost(event)
            else:
                self._settled(event)
            has_enough = polled >= MAX_EVENTS or self._intake.is_full
            event, polled = None if has_enough else self._transport.poll(0.0), polled + 1
        while len(turn.received) < MAX_BATCH and (message := self._intake.take(len(turn.received))) is not None:
            turn.received.append(message)
            self._take(turn, message)
        if self._is_connected:
            self._attend(turn)
            self._obey(turn)
            turn.decide(happenings.Tick(self._clock()))
        self._finish(turn)
        return lost

    # --- reading

    def _arrived(self, message: Received) -> None:
        """Queue it, or tell the device that it must wait."""
        topic = parse_topic(message.topic) if "/presence/" in message.topic else None
        if topic is not None and topic.kind == "presence" and topic.run == self._run and topic.device is not None:
            self._attendance.hear(topic.device, message.payload, self._clock())
            acknowledge([message])
        elif self._intake.offer(message) == "busy":
            topic = parse_topic(message.topic)
            if topic is not None and topic.kind == "update" and topic.device is not None:
                self._answers.send(topic.device, Receipt(round_of(message, self.state), int(Refusal.BUSY), ""))
            acknowledge([message])

    def _settled(self, event: Delivered | Undelivered) -> None:
        self._answers.settled()
        if isinstance(event, Undelivered):
            self._log(f"WARNING: the broker did not take a publication: {event.reason}")

    def _connected(self, event: Connected) -> None:
        self._log(f"connected to the broker ({event.protocol})")
        unfit = packet_limit_error(self.state.spec, event.largest_packet_bytes)
        if unfit is not None:
            raise unfit
        self._is_connected = self._was_connected = self._must_begin = True

    def _lost(self, event: Disconnected) -> str:
        self._is_connected = False
        self._intake.clear()
        if event.is_final:
            raise UnavailableError(f"the connection to the broker is gone for good: {event.reason}. Serve again.")
        self._log(f"not connected to the broker: {event.reason}; trying again")
        return event.reason

    def _take(self, turn: _Turn, message: Received) -> None:
        topic = parse_topic(message.topic)
        if topic is None or topic.kind != "update" or topic.device is None:
            self._ignored += 1
            if self._ignored == 1:
                self._log(f"WARNING: ignoring messages on foreign topics, such as {message.topic[:80]!r}")
            return
        if not message.payload:  # MQTT's way to delete a retained message, and no message of ours
            return
        device = topic.device
        try:
            event = self._event_of(turn, topic.run, device, message)
            turn.decide(event)
        except Exception as error:  # a bug of ours: the peer must not be able to end the loop with it
            self._log(f"BUG: an update of {device} raised {error!r}; it is refused. Please report this.")
            event = happenings.BadUplink(device, Refusal.MALFORMED, "the aggregator could not deal with it")
            turn.decide(event)
        if isinstance(event, happenings.UpdateArrived):
            turn.senders[device] = event.update.round
        else:
            turn.senders[device] = turn.state.progress.round

    def _event_of(self, turn: _Turn, run: str, device: str, message: Received) -> Uplink:
        if run != self._run:
            return happenings.BadUplink(device, Refusal.UNKNOWN_RUN, run)
        if message.is_retained:
            return happenings.BadUplink(device, Refusal.RETAINED, "")
        try:
            update = decode("update", message.payload, limit_bytes=turn.state.spec.update_limit_bytes)
        except PeerError as error:
            return happenings.BadUplink(device, error.refusal, error.detail)
        assert isinstance(update, Update)
        return happenings.UpdateArrived(device, update, message.payload, self._clock())

    def _attend(self, turn: _Turn) -> None:
        """Keep who is there, now and then. It is no part of any round, so its failure is none."""
        now_ms = self._clock()
        changes = self._attendance.changes()
        if not changes or now_ms - self._attendance_at_ms < ATTENDANCE_EVERY_MS:
            return
        self._attendance_at_ms = now_ms
        turn.decide(happenings.Online(self._attendance.online))
        try:
            self._store.keep_presences(self._run, changes)
        except UserError:  # told by the next commit
            return
        self._attendance.forget_changes()

    def _obey(self, turn: _Turn) -> None:
        """Take the operator's commands out of the store, now and then."""
        now_ms = self._clock()
        if now_ms - self._commands_at_ms < COMMANDS_EVERY_MS:
            return
        self._commands_at_ms = now_ms
        try:
            turn.commands = self._store.commands(self._run)
        except UserError as error:
            self._log(f"WARNING: cannot read the operator's commands: {error}")
        for command in turn.commands:
            if command.verb == "pause":
                turn.decide(happenings.Pause(now_ms, command.reason))
            elif command.verb == "resume":
                turn.decide(happenings.Resume(now_ms))
            else:
                turn.decide(happenings.Stop(now_ms, command.reason))

    # --- committing and sending

    def _finish(self, turn: _Turn) -> None:
        keeps = [a for a in turn.actions if isinstance(a, (KeepUpdate, KeepVersion, KeepProgress, Note))]
        reports = [keep.report for keep in keeps if isinstance(keep, KeepVersion)]
        count = self._transport.traffic() if reports else self._counted
        traffic = count.since(self._counted)
        if keeps or turn.commands:
            try:
                done = [command.id for command in turn.commands]
                self._store.commit(self._run, keeps, self._clock(), traffic=traffic if reports else None, done=done)
            except UserError as error:
                self._give_back(turn, error)
                if not isinstance(error, UnavailableError):  # damage: waiting does not mend it
                    raise
                return
        if self._is_store_down:
            self._log("the store works again")
        self._is_store_down = self._must_begin = False
        self.state, self._counted = turn.state, count
        for keep in keeps:
            if isinstance(keep, Note):
                self._log(keep.text)
            elif isinstance(keep, KeepVersion):
                self._telling.closed(keep.report, self.state.spec.config.rounds, traffic, self._answers.take_refused())
        for action in turn.actions:
            if isinstance(action, SendReceipt):
                self._answers.send(action.device, action.receipt)
            elif isinstance(action, Publish):
                topic = Topic(self._run, kind_of(action.message))
                self._answers.publish(str(topic), encode(action.message), is_retained=True)
        acknowledge(turn.received)

    def _give_back(self, turn: _Turn, error: UserError) -> None:
        """The store failed: be as if nothing had come, and ask for it again.

        Every sender is asked, whatever its update was worth: the round may have closed in what could not be stored.
        """
        if not self._is_store_down:
            self._log(f"WARNING: nothing can be stored: {error} Until then, devices are told to send again.")
        self._is_store_down = True
        for device, round_number in turn.senders.items():
            self._answers.send(device, Receipt(round_number, int(Refusal.STORAGE), ""))
        acknowledge(turn.received)
