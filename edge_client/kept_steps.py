"""The local steps of the round under way, on disk, so that an agent killed in mid-round goes on where it was.

A step is its scalar and its loss; coefficients follow from the scalars by the step rule, seeds and batches from the
plan. The file is sealed lines that say what the steps belong to, then a record per report. Each record's checksum
covers all before it, so whatever the end of the file looks like, what is read is a beginning of what was written.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edge_client.events import Begun, ModelReady
from edge_client.jobs import HeldOutReport, Job, Outcome, Report, StepReport, Trainer
from edge_client.state_files import Disk, Owner, open_file, read_whole, sealed, set_aside, unsealed, write_whole
from shared.messages import Everyone, Plan, Run
from shared.wire import encode

KIND = "kseed steps 1"
SYNC_S = 10.0  # a kill loses no step that was written; a machine that loses its power, the steps of this long
_RECORD = struct.Struct("<IIdd")  # step (0: held-out evaluation), examples, then two numbers
_CHECKSUM = struct.Struct("<I")
RECORD_BYTES = _RECORD.size + _CHECKSUM.size


class KeptSteps:
    """The file of one device's steps, under `folder`. `say` tells people what went wrong; `now_s` is monotonic."""

    def __init__(
        self,
        folder: Path,
        owner: Owner,
        say: Callable[[str], None],
        now_s: Callable[[], float],
        disk: Disk | None = None,
    ) -> None:
        self._path = folder / owner.folder_name / "steps"
        self._owner = owner
        self._say = say
        self._now_s = now_s
        self._disk = disk or Disk()
        self._file: int | None = None

    def begin(self, work: bytes, steps: int, begun: Begun | None = None) -> tuple[Report, ...]:
        """The reports that an earlier life left of this `work` (a digest), of at most `steps` steps; then keep more.

        begun: the round, as the next life is to find it.
        """
        self.close()
        reports = self._read(work, steps)
        told: dict[str, object] = {} if begun is None else {"round": begun.round, "nonce": begun.nonce.hex()}
        header = sealed(self._owner, KIND, work=work.hex(), **told)
        self._checksum = zlib.crc32(header)
        self._synced_s = self._now_s()
        try:
            write_whole(self._disk, self._path, header + b"".join(map(self._record, reports)))
            self._file = open_file(self._path, os.O_APPEND)
        except OSError as error:
            self._give_up(error)
        return reports

    def begun(self) -> Begun | None:
        """The round that an earlier life began last; None where nothing readable tells (`begin` says what is wrong)."""
        try:
            data = read_whole(self._path)
            fields = {} if data is None else unsealed(self._owner, KIND, data)[0]
            number, nonce = fields["round"], bytes.fromhex(str(fields["nonce"]))
        except (OSError, ValueError, KeyError):
            return None
        return Begun(number, nonce) if isinstance(number, int) else None

    def add(self, report: Report) -> None:
        """Keep what was done; progress within an evaluation is nothing to keep."""
        if self._file is None or (isinstance(report, HeldOutReport) and report.loss is None):
            return
        if isinstance(report, StepReport) and report.scalar is None:
            return  # of exact gradients, which keep their own (`first_order_kept`)
        try:
            self._disk.write(self._file, self._record(report))
            if self._now_s() - self._synced_s >= SYNC_S:
                self._disk.sync(self._file)
                self._synced_s = self._now_s()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Let go of the file; it stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._say(
            f"warning: the steps of this round cannot be kept in {self._path}: {error.strerror}. "
            "The work goes on; an agent that is killed now begins the round again."
        )

    def _record(self, report: Report) -> bytes:
        if isinstance(report, StepReport):
            body = _RECORD.pack(report.step, report.steps, report.scalar, report.loss)
        else:
            loss, accuracy = (math.nan if value is None else value for value in (report.loss, report.accuracy))
            body = _RECORD.pack(0, report.examples, loss, accuracy)
        self._checksum = zlib.crc32(body, self._checksum)
        return body + _CHECKSUM.pack(self._checksum)

    def _read(self, work: bytes, steps: int) -> tuple[Report, ...]:
        try:
            data = read_whole(self._path)
            if data is None:
                return ()
            fields, header, rest = unsealed(self._owner, KIND, data)
        except OSError as error:
            self._say(f"warning: the steps kept in {self._path} cannot be read: {error.strerror}; beginning again")
            return ()
        except ValueError as error:
            self._say(f"warning: ignored the steps kept in {self._path}: {error}; {set_aside(self._path)}")
            return ()
        if fields.get("work") != work.hex():
            return ()  # of another round
        return tuple(_reports(rest, zlib.crc32(header), steps))


def _reports(data: bytes, checksum: int, steps: int) -> Iterator[Report]:
    """The reports of whole, undamaged records in order, up to the first that is not."""
    size = RECORD_BYTES
    done = -1
    for start in range(0, len(data) - size + 1, size):
        body = data[start : start + _RECORD.size]
        checksum = zlib.crc32(body, checksum)
        if _CHECKSUM.pack(checksum) != data[start + _RECORD.size : start + size]:
            return
        step, count, first, second = _RECORD.unpack(body)
        if step != done + 1 and (done, step) != (-1, 1):
            return
        done = step
        if step == 0:
            yield HeldOutReport(count, count, _number(first), _number(second))
        elif step <= steps and math.isfinite(first) and math.isfinite(second):
            yield StepReport(step, count, second, first)
        else:
            return


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


class ResumingTrainer:
    """A trainer whose local steps outlive the process. Satisfies `jobs.Trainer`."""

    def __init__(self, trainer: Trainer, kept: KeptSteps, agent: str, say: Callable[[str], None]) -> None:
        """agent: software and version; other software may take other steps."""
        self._trainer = trainer
        self._kept = kept
        self._agent = agent
        self._say = say

    def load(self, run: Run) -> ModelReady:
        """As the trainer does."""
        self._run = run
        ready = self._trainer.load(run)
        self._data_digest = ready.data_digest
        return ready

    def rebuild(self, version: int, coefficients: bytes) -> bytes:
        """As the trainer does."""
        return self._trainer.rebuild(version, coefficients)

    def evaluate(self, version: int) -> Job:
        """As the trainer does."""
        return self._trainer.evaluate(version)

    def train(self, plan: Plan, model_digest: bytes, done: tuple[Report, ...] = ()) -> Job:
        """As the trainer does, from where an earlier life of this agent was in the same work."""
        begun = Begun(plan.round, plan.nonce)
        done = done or self._kept.begin(self._work(plan, model_digest), plan.local_steps, begun)
        steps = sum(isinstance(report, StepReport) for report in done)
        if steps:
            self._say(f"round {plan.round}: going on after step {steps} of {plan.local_steps}, done before the restart")
        job = self._trainer.train(plan, model_digest, done)
        try:
            report = next(job)
            while True:
                self._kept.add(report)
                report = job.send((yield report))
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        finally:
            job.close()
            self._kept.close()

    def _work(self, plan: Plan, model_digest: bytes) -> bytes:
        return work_of(self._run, plan, model_digest, self._data_digest, self._agent)


def work_of(run: Run, plan: Plan, model_digest: bytes, data_digest: bytes, agent: str) -> bytes:
    """A digest of all that a round's steps depend on, but not of what an amended plan of the same round may change."""
    same = msgspec.structs.replace(
        plan, phase="open", participation=Everyone(), published_at_ms=0, deadline_s=1.0, reason="", change=None
    )
    parts = (encode(run), encode(same), model_digest, data_digest, agent.encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
