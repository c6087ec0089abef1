"""A round's steps outlive the agent, and going on with them gives the update of a round that nothing happened to."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aggregator.config import RunConfig
from edge_client.events import Trained
from edge_client.jobs import HeldOutReport, Report, StepReport
from edge_client.kept_steps import SYNC_S, KeptSteps, ResumingTrainer
from edge_client.state_files import Disk
from shared.messages import Listed, NormalisedStep, Plan, Update
from shared.wire import coefficients_to_bytes, encode
from tests.agents import ONE_ROUND, said, steps_of
from tests.outboxes import OWNER, FullDisk, outbox_in
from tests.small_fleet import LinearTrainer, SmallFleet
from tests.test_faults import accepted_updates
from tests.test_trainer import SEEDS, played, run_of, trainer_of
from tests.test_trainer import WORK as PLAIN

WORK = b"w" * 32
REPORTS = (
    HeldOutReport(40, 40, 1.25, None),
    StepReport(1, 3, 0.1, float(np.float32(1 / 3))),
    StepReport(2, 3, 1e-300, -0.0),
    StepReport(3, 3, 2.0, 65504.0),
)
NORMALISED = NormalisedStep(step_rms=1e-3, clip=3.0, decay=0.9, prior_mean_square=0.0, prior_count=0)
PLAN: Plan = msgspec.structs.replace(PLAIN, evaluate=True, step=NORMALISED)
GROUPS: Plan = msgspec.structs.replace(PLAN, local_steps=6, one_sided=3)
VERSION = coefficients_to_bytes(np.linspace(-1e-3, 1e-3, SEEDS, dtype=np.float32))


def kept_in(folder: Path, disk: Disk | None = None, now_s: float = 0.0) -> tuple[KeptSteps, list[str]]:
    lines: list[str] = []
    return KeptSteps(folder, OWNER, lines.append, lambda: now_s, disk), lines


def file_in(folder: Path) -> Path:
    return folder / OWNER.folder_name / "steps"


def written(folder: Path, reports: tuple[Report, ...] = REPORTS) -> bytes:
    kept, _ = kept_in(folder)
    kept.begin(WORK, 3)
    for report in reports:
        kept.add(report)
    kept.close()
    return file_in(folder).read_bytes()


# The file.


def test_reports_come_back_as_they_were_and_more_are_added(tmp_path):
    written(tmp_path, REPORTS[:2])
    kept, lines = kept_in(tmp_path)
    assert kept.begin(WORK, 3) == REPORTS[:2]
    kept.add(HeldOutReport(16, 40))  # progress, not a result
    for report in REPORTS[2:]:
        kept.add(report)
    kept.close()
    again, _ = kept_in(tmp_path)
    read = again.begin(WORK, 3)
    assert read == REPORTS
    assert np.signbit(read[2].scalar)  # type: ignore[union-attr]
    assert lines == []


def test_steps_of_other_work_are_dropped(tmp_path):
    written(tmp_path)
    kept, lines = kept_in(tmp_path)
    assert kept.begin(b"x" * 32, 3) == ()
    kept.close()
    assert kept_in(tmp_path)[0].begin(WORK, 3) == ()
    assert lines == []


def test_more_steps_than_the_plan_has_are_not_believed(tmp_path):
    written(tmp_path)
    assert kept_in(tmp_path)[0].begin(WORK, 2) == REPORTS[:3]


def test_a_file_cut_or_changed_anywhere_gives_a_beginning_of_what_was_written(tmp_path):
    whole = written(tmp_path)
    header = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    damaged = {size: whole[:size] for size in range(len(whole))}
    flipped = {at: whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))}
    for at, data in (*damaged.items(), *flipped.items()):
        file_in(tmp_path).write_bytes(data)
        kept, lines = kept_in(tmp_path)
        read = kept.begin(WORK, 3)
        kept.close()
        assert read == REPORTS[: max(0, at - header) // ((len(whole) - header) // len(REPORTS))]
        assert bool(lines) == (at < header)
        assert not lines or "; set aside as steps.set-aside" in lines[0]


def test_records_of_another_file_are_not_taken_for_steps_of_this_one(tmp_path):
    ours, other = written(tmp_path / "ours"), written(tmp_path / "other", REPORTS[1:])
    size = len(ours) - len(other)
    file_in(tmp_path / "ours").write_bytes(ours[:-size] + other[-size:])
    assert kept_in(tmp_path / "ours")[0].begin(WORK, 3) == REPORTS[:3]


class CountingDisk(Disk):
    """Counts what reaches the disk."""

    syncs = 0

    def sync(self, file: int) -> None:
        self.syncs += 1
        super().sync(file)


def test_steps_reach_the_disk_every_ten_seconds_and_not_each(tmp_path):
    disk, now = CountingDisk(), [0.0]
    kept = KeptSteps(tmp_path, OWNER, print, lambda: now[0], disk)
    kept.begin(WORK, 1000)
    begun = disk.syncs
    for step in range(1, 101):
        now[0] += SYNC_S / 40
        kept.add(StepReport(step, 1000, 1.0, 1.0))
    assert disk.syncs - begun == 2
    kept.close()


def test_full_disk_is_said_once_a_round_and_stops_no_step(tmp_path):
    kept, lines = kept_in(tmp_path, FullDisk())
    assert kept.begin(WORK, 3) == ()
    for report in REPORTS:
        kept.add(report)
    assert lines == [
        f"warning: the steps of this round cannot be kept in {file_in(tmp_path)}: No space left on device. "
        "The work goes on; an agent that is killed now begins the round again."
    ]


# A real model.


def life(
    folder: Path, plan: Plan, steps: int | None, digest: bytes = b"d" * 16, left_out: int = 0
) -> tuple[list[Report], object]:
    """An agent's work on `plan`, killed after `steps` steps where that is a number; `left_out`: rows of its data."""
    lines: list[str] = []
    trainer = ResumingTrainer(trainer_of(folder), kept_in(folder / "state")[0], "kseed test", lines.append)
    (data,) = folder.glob("*.jsonl")
    data.write_text("".join(data.read_text().splitlines(keepends=True)[left_out:]))
    trainer.load(run_of())
    trainer.rebuild(3, VERSION)
    job = trainer.train(plan, digest)
    if steps is None:
        return played(job)
    reports = []
    while sum(isinstance(report, StepReport) for report in reports) < steps:
        reports.append(next(job))
    job.close()
    return reports, lines


def bytes_of(end: object) -> bytes:
    assert isinstance(end, Trained)
    return encode(end.update)


@pytest.mark.parametrize("deaths", [(1,), (4,), (2, 1, 2), (0, 5)])
@pytest.mark.parametrize("plan", [PLAN, GROUPS], ids=["pairs", "groups"])
def test_round_that_was_interrupted_gives_the_update_of_one_that_was_not(tmp_path, plan, deaths):
    (tmp_path / "calm").mkdir()
    reports, end = life(tmp_path / "calm", plan, None)
    left = [report for report in reports if not isinstance(report, HeldOutReport) or report.loss is not None]
    for number in deaths:
        done, _ = life(tmp_path, plan, number)
        assert [report for report in done if isinstance(report, StepReport)] == left[1 : 1 + number]
        left = left[:1] + left[1 + number :]
    rest, resumed = life(tmp_path, plan, None)
    assert [report for report in rest if isinstance(report, StepReport)] == left[1:]
    assert bytes_of(resumed) == bytes_of(end)
    assert deaths[0] == 0 or not any(isinstance(report, HeldOutReport) for report in rest)  # not evaluated twice


@pytest.mark.parametrize(
    ("change", "steps_left"),
    [
        ({}, 3),
        ({"published_at_ms": 5_000_000, "deadline_s": 9.0, "participation": Listed(("ann",))}, 3),
        ({"nonce": b"another nonce..."}, 5),
        ({"round": 4}, 5),
        ({"eps": 2e-3}, 5),
        ({"step": PLAIN.step}, 5),
        ({"batch_size": 1}, 5),
        ({"one_sided": 5}, 5),
    ],
)
def test_steps_go_on_in_the_same_round_only(tmp_path, change, steps_left):
    life(tmp_path, PLAN, 2)
    reports, _ = life(tmp_path, msgspec.structs.replace(PLAN, **change), None)
    assert sum(isinstance(report, StepReport) for report in reports) == steps_left


def test_steps_from_another_version_or_other_data_are_dropped(tmp_path):
    life(tmp_path, PLAN, 2)
    reports, _ = life(tmp_path, PLAN, None, digest=b"e" * 16)
    assert sum(isinstance(report, StepReport) for report in reports) == 5
    life(tmp_path, PLAN, 2)
    reports, _ = life(tmp_path, PLAN, None, left_out=2)
    assert sum(isinstance(report, StepReport) for report in reports) == 5


# The agent.


def resuming(folder: Path, trainer: LinearTrainer) -> ResumingTrainer:
    kept, lines = kept_in(folder / "state")
    return ResumingTrainer(trainer, kept, "kseed test", lines.append)


def update_in(fleet: SmallFleet, number: int) -> Update:
    return accepted_updates(fleet.store.path)[number]["ann"]


def test_killed_agent_takes_only_the_steps_that_were_left(tmp_path):
    settings = {**ONE_ROUND, "rounds": 1, "evaluate_every": 1}
    (tmp_path / "calm").mkdir()
    calm = SmallFleet(tmp_path / "calm", RunConfig(**settings))
    calm.join("ann")
    calm.run_to_the_end()
    fleet = SmallFleet(tmp_path, RunConfig(**settings))
    agent = fleet.join("ann", resuming(tmp_path, LinearTrainer("ann")), outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_until(lambda: steps_of(agent) == 4)
    fleet.kill("ann")
    trainer = LinearTrainer("ann")
    metrics = tmp_path / "metrics.jsonl"
    fleet.join("ann", resuming(tmp_path, trainer), outbox=outbox_in(tmp_path / "state")[0], metrics=metrics)
    fleet.run_to_the_end()
    assert trainer.steps_taken == 2
    first = json.loads(metrics.read_text().splitlines()[0])
    assert (first["round"], first["steps"], first["steps_before"]) == (0, 2, 4)
    assert "accepted, 2 steps after 4 before the restart" in fleet.screens["ann"].getvalue()
    assert update_in(fleet, 0) == update_in(calm, 0)
    assert np.array_equal(fleet.coefficients, calm.coefficients)


def test_agent_that_comes_back_after_its_round_drops_the_steps(tmp_path):
    fleet = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    agent = fleet.join("ann", resuming(tmp_path, LinearTrainer("ann")))
    fleet.run_until(lambda: steps_of(agent) == 4)
    fleet.kill("ann")
    fleet.join("bob")
    fleet.run_until(lambda: fleet.service.state.progress.round == 1)
    fleet.kill("bob")
    trainer = LinearTrainer("ann")
    fleet.join("ann", resuming(tmp_path, trainer))
    fleet.run_to_the_end()
    assert trainer.steps_taken == 6
    assert "going on" not in said(fleet)
