"""The job under way: taken step by step between two polls, with a rest after each; what it spent goes to the tally."""

from __future__ import annotations

from collections.abc import Callable

from edge_client.jobs import Job, Outcome, Report, StepReport
from edge_client.tally import Tally


class JobRunner:
    """At most one job at a time."""

    def __init__(self, now_s: Callable[[], float], rest_s: Callable[[float], float]) -> None:
        """now_s: monotonic. rest_s: how long to rest after so many seconds of work."""
        self._now_s, self._rest_s = now_s, rest_s
        self._job: Job | None = None
        self._is_concluding = False
        self._rest_until_s = now_s()
        self.report: Report | None = None  # the last one of the job under way

    @property
    def has_job(self) -> bool:
        """Is one under way?"""
        return self._job is not None

    @property
    def rest_left_s(self) -> float:
        """Until the next step may start; not above 0 where it may."""
        return self._rest_until_s - self._now_s()

    def begin(self, job: Job) -> None:
        """`job` takes the place of what was under way."""
        self.drop()
        self._job, self._is_concluding = job, False

    def conclude(self) -> None:
        """Ask the job to end its local steps with those that are done."""
        self._is_concluding = True

    def drop(self) -> None:
        """Let go of the job; its work is lost."""
        if self._job is not None:
            self._job.close()
        self._job = self.report = None

    def step(self, tally: Tally) -> Outcome | None:
        """One local step, or one stretch of the held-out split; the outcome where the job ends instead."""
        assert self._job is not None
        began_s = self._now_s()
        try:
            # A fresh generator takes nothing in; one that is to conclude before its first step is dropped instead.
            self.report = next(self._job) if self.report is None else self._job.send(self._is_concluding)
        except StopIteration as end:
            self._job = self.report = None
            outcome: Outcome = end.value
            return outcome
        now_s = self._now_s()
        spent_s = now_s - began_s
        self._rest_until_s = now_s + self._rest_s(spent_s)
        if isinstance(self.report, StepReport):
            tally.stepped(self.report.step, self.report.loss, spent_s)
        else:
            tally.evaluated(self.report.loss, self.report.accuracy, spent_s)
        return None
