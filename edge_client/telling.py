"""What the agent tells its owner, and when: at once where its state changes, else now and then.

Files are written seldom, because an idle agent should not keep a disk awake: `IDLE_S`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from edge_client.board import Board
from edge_client.events import Finish
from edge_client.jobs import Report, StepReport
from edge_client.policy import Limits
from edge_client.progress import activity
from edge_client.state import Sending, State
from edge_client.status import Accepted, AgentStatus, Layers, Measure, ModelStatus, StateName
from edge_client.watching.machine import Readings
from shared.transport import Delivered

_DIED = (
    "warning: the last life of this agent ended without a word while it was at work: it was killed, the power went, or "
    "the system wanted its memory. If it is the memory, set memory_mb under [caps], or a higher memory_floor_mb under "
    "[gate]."
)
CHANGED_S, BUSY_S, IDLE_S = 0.5, 10.0, 60.0  # between two of them


@dataclass(frozen=True)
class View:
    """What the agent knows at one time."""

    state: State
    report: Report | None
    bytes_today: Layers
    budget_bytes: int  # of a day; 0: no limit
    energy_j: float | None
    digest: bytes | None  # of the model that was rebuilt in this round
    ending: Finish | None
    unix_ms: int


class NoTeller:
    """Tells nobody."""

    def answered(self, event: Delivered, unix_ms: int) -> None:
        """Leaves it."""

    def is_due(self, state: State, report: Report | None) -> bool:
        """Never."""
        return False

    def tell(self, view: View) -> None:
        """Tells nothing."""


class Teller(NoTeller):
    """Posts the status of one agent, from its start to its end. What the disk refuses is said once."""

    def __init__(
        self,
        board: Board,
        limits: Limits,
        read: Callable[[float], Readings],
        say: Callable[[str], None],
        started_at_ms: int,
    ) -> None:
        """limits: of the gate; read: the machine, at a time in monotonic seconds."""
        self._board, self._limits, self._read, self._say = board, limits, read, say
        self._started_at_ms = started_at_ms
        before = read_status(board)
        if before is not None and before.state == "working":
            say(_DIED)
        self._last_accepted = before.last_accepted if before else None
        self._accepted: int | None = None  # of this life
        self._round_trip: tuple[float, int] | None = None
        self._rebuilt: tuple[int, bytes] | None = None  # version and its digest
        self._told: tuple[object, ...] = ()
        self._told_s = float("-inf")
        self._is_refused = False

    def answered(self, event: Delivered, unix_ms: int) -> None:
        """The broker took a publication."""
        if event.took_s is not None:
            self._round_trip = (event.took_s, unix_ms)

    def is_due(self, state: State, report: Report | None) -> bool:
        """Whether it is time to `tell`."""
        since_s = state.now_s - self._told_s
        if self._key(state) != self._told:
            return since_s >= CHANGED_S
        return since_s >= (IDLE_S if report is None else BUSY_S)

    def tell(self, view: View) -> None:
        """Post the status."""
        self._told, self._told_s = self._key(view.state), view.state.now_s
        try:
            self._board.post(msgspec.json.encode(self._status(view)))
        except OSError as error:
            if not self._is_refused:
                self._say(f"warning: the status cannot be written to {self._board.folder}: {error.strerror}")
            self._is_refused = True

    def _key(self, state: State) -> tuple[object, ...]:
        plan = state.plan
        where = (state.link.is_connected, state.pause, state.model, state.is_leaving, state.is_finished)
        return (*where, type(state.work), state.accepted, self._round_trip, plan and (plan.round, plan.phase))

    def _status(self, view: View) -> AgentStatus:
        state, link = view.state, view.state.link
        self._note(view)
        name, text = _standing(view)
        since_s = state.now_s - link.connected_s
        return AgentStatus(
            written_at_ms=view.unix_ms,
            started_at_ms=self._started_at_ms,
            pid=os.getpid(),
            agent=state.identity.agent,
            run=state.identity.run,
            device=state.identity.device,
            broker=state.identity.broker,
            session=f"{state.identity.session:016x}",
            state=name,
            text=text,
            round=state.plan.round if state.plan else None,
            loss=view.report.loss if isinstance(view.report, StepReport) else None,
            last_accepted=self._last_accepted,
            queue=_queue(state),
            connected_since_ms=view.unix_ms - round(since_s * 1000) if link.is_connected else None,
            trouble=link.trouble,
            round_trip_s=self._round_trip[0] if self._round_trip else None,
            round_trip_at_ms=self._round_trip[1] if self._round_trip else None,
            bytes_today=view.bytes_today,
            budget_bytes=view.budget_bytes,
            energy_j=view.energy_j,
            model=self._model(state),
            readings=measures(self._read(state.now_s), self._limits),
        )

    def _note(self, view: View) -> None:
        """What is still worth telling when the state has forgotten it."""
        plan = view.state.plan
        if plan is not None and view.digest is not None:
            self._rebuilt = (plan.round, view.digest)
        accepted = view.state.accepted
        if accepted is not None and accepted != self._accepted:
            self._accepted, self._last_accepted = accepted, Accepted(accepted, view.unix_ms)

    def _model(self, state: State) -> ModelStatus | None:
        run = state.run
        if run is None:
            return None
        version, digest = self._rebuilt or (None, b"")
        digests = (run.base_digest.hex(), run.manifest_digest.hex())
        return ModelStatus(run.model, run.dtype, *digests, version, digest.hex() or None)


def read_status(board: Board) -> AgentStatus | None:
    """The status on the board; None where there is none that this version reads."""
    data = board.status()
    try:
        return None if data is None else msgspec.json.decode(data, type=AgentStatus)
    except ValueError:
        return None


def _standing(view: View) -> tuple[StateName, str]:
    state = view.state
    text = activity(state, view.report)
    if view.ending is not None:
        return ("failed" if view.ending.exit_code else "left"), view.ending.text
    if state.pause is not None:
        return "paused", text
    if state.model == "loading":
        return "working", "loading the model"
    if state.link.connects == 0:
        return ("unconnected" if state.link.trouble else "starting"), text
    if not state.link.is_connected and view.report is None:
        return "unconnected", text
    if state.is_leaving:
        text += "; leaving after this round"
    return ("waiting" if view.report is None else "working"), text


def _queue(state: State) -> tuple[str, ...]:
    update = state.work.update if isinstance(state.work, Sending) else state.kept.update if state.kept else None
    if update is None:
        return ()
    return (f"the update of round {update.round} ({len(update.scalars)} bytes of scalars) has no receipt yet",)


def measures(readings: Readings, limits: Limits) -> tuple[Measure, ...]:
    """The readings with the owner's limits, in the order in which they are watched."""
    said = _limits(limits) if limits.enabled else {}
    found = ((name, getattr(readings, name)) for name in readings.__dataclass_fields__)
    return tuple(Measure(name.replace("_", " "), one.value, str(one), said.get(name, "")) for name, one in found)


def _limits(limits: Limits) -> dict[str, str]:
    numbers = {
        "memory_available": (limits.memory_floor_mb, "floor {:.0f} MB"),
        "disk_free": (limits.disk_floor_mb, "floor {:.0f} MB"),
        "temperature": (limits.temperature_limit_c, "limit {:.0f} °C"),
        "battery": (limits.battery_floor_percent, "floor {:.0f} %"),
        "cpu_others": (limits.others_cpu_percent, "limit {:.0f} %"),
        "gpu_others": (limits.others_gpu_percent, "limit {:.0f} %"),
    }
    said = {name: text.format(limit) for name, (limit, text) in numbers.items() if limit}
    said |= {"on_battery": "pauses on it"} if limits.pause_on_battery else {}
    return said | ({"metered": "pauses on one that is"} if limits.pause_on_metered else {})


def tell_failure(board: Board, text: str, unix_ms: int) -> None:
    """Post that the agent waits to begin again, and why. What the disk refuses was said before."""
    status = read_status(board)
    if status is None:
        return
    told = msgspec.structs.replace(status, state="failed", text=text, written_at_ms=unix_ms, connected_since_ms=None)
    with suppress(OSError):
        board.post(msgspec.json.encode(told))
