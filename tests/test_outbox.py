"""An update without a receipt outlives its agent: the same bytes go out again, and no disk stops a round."""

from __future__ import annotations

import errno
import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aggregator.config import RunConfig
from edge_client import session
from edge_client.events import (
    EXIT_LEFT,
    CloseRound,
    Finish,
    Forget,
    Keep,
    Kept,
    Leave,
    LeaveAfterRound,
    LoadModel,
    Publish,
    Rebuild,
    Tick,
    Trained,
)
from edge_client.outbox import RETRY_S, Outbox
from edge_client.state import Sending, Settled, Waiting, waiting
from edge_client.state_files import MAX_FILE_BYTES, Disk, Owner, default_folder
from shared.faults import Fault, Faults, Hop, Strike
from shared.messages import Receipt, Update
from shared.refusals import Refusal
from shared.transport import Received
from shared.wire import decode, encode
from tests.driven_session import (
    IDENTITY,
    NEXT,
    PLAN,
    READY,
    UPDATE,
    UPDATE_TOPIC,
    Driven,
    finish,
    only,
    snapshot,
    texts,
)
from tests.small_fleet import LinearTrainer, SmallFleet
from tests.test_agent import CONFIG, said
from tests.test_faults import accepted_updates

OWNER = Owner("in-process", "demo", "ann")
KEPT = Kept(PLAN.nonce, UPDATE)


class FullDisk(Disk):
    """Half of every write fits."""

    def write(self, file: int, data: bytes) -> None:
        super().write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def outbox_in(folder: Path, disk: Disk | None = None, owner: Owner = OWNER) -> tuple[Outbox, list[str]]:
    lines: list[str] = []
    return Outbox(folder, owner, lines.append, disk), lines


def file_in(folder: Path) -> Path:
    return folder / OWNER.folder_name / "update"


def driven_with(kept: Kept) -> Driven:
    driven = Driven()
    driven.state = session.start(IDENTITY, 0.0, 1_000_000, kept)
    return driven


# The file.


def test_what_is_kept_is_read_by_the_next_process_until_it_is_forgotten(tmp_path):
    outbox, lines = outbox_in(tmp_path)
    assert outbox.read() is None
    outbox.keep(KEPT)
    again, _ = outbox_in(tmp_path)
    assert again.read() == KEPT
    again.keep(Kept(NEXT.nonce, UPDATE))
    assert outbox.read() == Kept(NEXT.nonce, UPDATE)
    outbox.forget()
    outbox.forget()
    assert again.read() is None
    assert lines == []
    if sys.platform != "win32":
        outbox.keep(KEPT)
        assert file_in(tmp_path).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", [replace(OWNER, broker="b"), replace(OWNER, run="x"), replace(OWNER, device="bob")])
def test_another_broker_run_or_device_has_an_outbox_of_its_own(tmp_path, other):
    outbox_in(tmp_path)[0].keep(KEPT)
    stranger, lines = outbox_in(tmp_path, owner=other)
    assert stranger.read() is None
    file_in(tmp_path).parent.rename(tmp_path / other.folder_name)
    assert stranger.read() is None
    assert "; set aside as update.set-aside" in lines[0]


def test_a_file_cut_or_changed_anywhere_is_set_aside_in_a_line(tmp_path):
    outbox, lines = outbox_in(tmp_path)
    outbox.keep(KEPT)
    whole = file_in(tmp_path).read_bytes()
    damaged = [whole[:size] for size in range(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    listed = b"[1]\n" + hashlib.sha256(b"[1]\n").hexdigest().encode() + b"\n"
    for data in (*damaged, whole + b"x", b"\x00" * 99, b"[1, 2]\n", listed):
        lines.clear()
        file_in(tmp_path).write_bytes(data)
        assert outbox.read() is None
        (line,) = lines
        assert line.startswith(f"warning: ignored the outbox {file_in(tmp_path)}: it")
        assert file_in(tmp_path).with_name("update.set-aside").read_bytes() == data
    file_in(tmp_path).write_bytes(whole)
    assert outbox.read() == KEPT


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    outbox, lines = outbox_in(tmp_path)
    outbox.keep(KEPT)
    with file_in(tmp_path).open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert outbox.read() is None
    assert f"it has {MAX_FILE_BYTES + 1} bytes; set aside" in lines[0]


def test_a_folder_in_the_files_place_stops_nothing(tmp_path):
    outbox, lines = outbox_in(tmp_path)
    (file_in(tmp_path) / "deep").mkdir(parents=True)
    assert outbox.read() is None
    outbox.keep(KEPT)
    outbox.forget()
    assert [line.split(str(tmp_path))[0] for line in lines] == [
        "warning: the outbox ",
        "warning: the update of round 3 cannot be written to ",
        "warning: the outbox ",
    ]


def test_on_a_full_disk_the_file_before_stays_whole_and_the_agent_says_what_it_does(tmp_path):
    outbox_in(tmp_path)[0].keep(KEPT)
    outbox, lines = outbox_in(tmp_path, FullDisk())
    outbox.keep(Kept(NEXT.nonce, UPDATE))
    assert lines == [
        f"warning: the update of round 3 cannot be written to {file_in(tmp_path)}: No space left on device. "
        "It is sent from memory, and lost if this agent ends before its receipt."
    ]
    assert outbox.read() == KEPT


class DiskThatIsFullFor(Disk):
    """So many writes fail, then there is room again."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def write(self, file: int, data: bytes) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(file, data)


def test_what_the_disk_refused_is_written_once_it_has_room_again(tmp_path):
    outbox, lines = outbox_in(tmp_path, DiskThatIsFullFor(2))
    outbox.keep(KEPT)
    outbox.retry(0.0)  # still full
    outbox.retry(RETRY_S - 0.1)  # not yet again
    assert outbox.read() is None
    outbox.retry(RETRY_S)
    assert outbox.read() == KEPT
    assert lines[1:] == [f"the update of round 3 is written to {file_in(tmp_path)} now"]


def test_what_is_settled_is_not_written_later(tmp_path):
    outbox, _ = outbox_in(tmp_path, DiskThatIsFullFor(1))
    outbox.keep(KEPT)
    outbox.forget()
    outbox.retry(RETRY_S)
    assert outbox.read() is None


def test_each_platform_has_its_own_place(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    assert default_folder({}, "linux") == Path("/home/ann/.local/state/kseed")
    assert default_folder({"XDG_STATE_HOME": "/var/ann"}, "linux") == Path("/var/ann/kseed")
    assert default_folder({}, "darwin") == Path("/home/ann/Library/Application Support/kseed")
    assert default_folder({"LOCALAPPDATA": "/local"}, "win32") == Path("/local/kseed")


def test_a_user_without_a_home_keeps_it_beside_the_work(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert default_folder({}, "linux") == Path(".kseed")


# The session.


def test_update_is_kept_before_it_is_sent_and_forgotten_with_its_receipt():
    driven = Driven().training()
    assert driven.on(Trained(UPDATE)) == [Keep(KEPT), Publish(UPDATE_TOPIC, UPDATE)]
    actions = driven.hear(Receipt(3, int(Refusal.ACCEPTED), ""))
    assert actions[0] == Forget()
    assert waiting(driven.state) is None


@pytest.mark.parametrize("code", [Refusal.BUSY, Refusal.STORAGE, Refusal.RUN_CLOSED, Refusal.UNSUPPORTED_VERSION])
def test_update_that_may_count_later_stays_in_the_outbox(code):
    driven = Driven().sending()
    actions = driven.hear(Receipt(3, int(code), ""))
    assert not only(actions, Forget)
    assert waiting(driven.state) == KEPT


def test_update_of_an_earlier_life_is_sent_without_waiting_for_the_model():
    driven = driven_with(KEPT).joined()
    actions = driven.hear(PLAN, is_retained=True)
    assert "round 3: sending the update that was made before this agent was started again" in texts(actions)
    assert not only(actions, LoadModel)
    assert driven.on(Tick(1.0, 1_000_000)) == [Publish(UPDATE_TOPIC, UPDATE)]
    assert driven.hear(Receipt(3, int(Refusal.DUPLICATE), ""))[0] == Forget()
    assert isinstance(driven.state.work, Settled)
    actions = driven.hear(NEXT)
    assert only(actions, LoadModel)
    driven.on(READY)
    assert only(driven.hear(snapshot(4)), Rebuild)


@pytest.mark.parametrize(
    "plan",
    [
        NEXT,
        msgspec.structs.replace(PLAN, nonce=b"another-run-of-3"),
        msgspec.structs.replace(NEXT, nonce=PLAN.nonce),
    ],
)
def test_update_of_a_round_that_is_over_is_dropped(plan):
    driven = driven_with(KEPT).joined()
    actions = driven.hear(plan)
    assert actions[0] == Forget()
    assert "round 3 is over; dropped its update, which never had a receipt" in texts(actions)
    assert driven.state.work == Waiting()
    assert only(actions, LoadModel)


def test_update_of_a_run_that_was_stopped_meanwhile_is_dropped():
    driven = driven_with(KEPT).joined()
    actions = driven.hear(msgspec.structs.replace(PLAN, phase="finished"))
    assert actions[0] == Forget()
    assert finish(actions).exit_code == EXIT_LEFT


def test_update_of_an_earlier_life_waits_while_the_run_is_paused():
    driven = driven_with(KEPT).joined()
    driven.hear(msgspec.structs.replace(PLAN, phase="paused"))
    assert not only(driven.on(Tick(1.0, 1_000_000)), Publish)
    driven.hear(msgspec.structs.replace(PLAN, published_at_ms=PLAN.published_at_ms + 1))
    assert only(driven.on(Tick(2.0, 1_000_000)), Publish) == [Publish(UPDATE_TOPIC, UPDATE)]


def test_plan_older_than_the_kept_update_decides_nothing():
    driven = driven_with(KEPT).joined()
    driven.hear(msgspec.structs.replace(PLAN, round=2, nonce=b"nonce-of-round-2"))
    assert waiting(driven.state) == KEPT
    driven.hear(PLAN)
    assert isinstance(driven.state.work, Sending)


def test_leaving_keeps_the_update():
    driven = driven_with(KEPT).joined()
    driven.hear(PLAN)
    assert not only(driven.on(Leave()), Forget)
    assert waiting(driven.state) == KEPT


def test_finish_sends_the_update_of_an_earlier_life_before_it_leaves():
    driven = driven_with(KEPT)
    assert not only(driven.on(LeaveAfterRound(True)), Finish)
    driven.joined()
    driven.hear(PLAN, is_retained=True)
    actions = driven.on(Tick(1.0, 1_000_000))
    assert actions == [Publish(UPDATE_TOPIC, UPDATE)]
    actions = driven.hear(Receipt(3, int(Refusal.ACCEPTED), ""))
    assert actions[0] == Forget()
    assert finish(actions).exit_code == EXIT_LEFT


def test_finish_does_not_wait_for_an_update_that_is_too_late():
    driven = driven_with(KEPT)
    driven.on(LeaveAfterRound(True))
    driven.joined()
    actions = driven.hear(NEXT)
    assert actions[0] == Forget()
    assert not only(actions, LoadModel)
    assert finish(actions).exit_code == EXIT_LEFT


def test_newer_plan_empties_the_outbox():
    driven = Driven().sending()
    actions = driven.hear(NEXT)
    assert actions[:2] == [Forget(), CloseRound(3, None)]
    assert waiting(driven.state) is None


# The agent.

ONE_ROUND = {**{name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__}, "rounds": 2, "deadline_s": 1000.0}


def sent_updates(fleet: SmallFleet) -> list[bytes]:
    """Everything that comes in on the update topic from now on, in the list that is returned."""
    watcher = fleet.network.transport("watcher")
    watcher.subscribe("kseed/demo/update/ann")
    watcher.start()
    seen: list[bytes] = []
    turn = fleet.turn

    def watched() -> None:
        turn()
        while (event := watcher.poll(0.0)) is not None:
            if isinstance(event, Received):
                seen.append(event.payload)

    fleet.turn = watched  # type: ignore[method-assign]
    return seen


def test_killed_agent_sends_the_same_bytes_again_and_they_count_once(tmp_path):
    lost = Strike(Fault.LOSE, topic_part="receipt/ann", hop=Hop.DOWN)
    fleet = SmallFleet(tmp_path, RunConfig(**{**ONE_ROUND, "quorum": 2}), faults=Faults(strikes=(lost,)))
    seen = sent_updates(fleet)
    agent = fleet.join("ann", outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_until(lambda: isinstance(agent.state.work, Sending) and bool(seen))
    for _ in range(20):
        fleet.turn()
    assert isinstance(agent.state.work, Sending)  # its receipt was lost
    fleet.kill("ann")
    trainer = LinearTrainer("ann")
    again = fleet.join("ann", trainer, outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_until(lambda: isinstance(again.state.work, Settled))
    assert "round 0: update duplicate" in said(fleet)
    assert trainer.loads == 0
    assert seen == [seen[0]] * 2
    fleet.join("bob")
    fleet.run_to_the_end()
    assert [sorted(updates) for updates in accepted_updates(fleet.store.path).values()] == [["ann", "bob"]] * 2
    assert not file_in(tmp_path / "state").exists()


def test_agent_killed_before_the_broker_had_the_update_brings_it_in_its_next_life(tmp_path):
    fleet = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    agent = fleet.join("ann", outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_until(lambda: activity_step(agent) == 5)
    fleet.network.stop_broker()
    for _ in range(20):
        fleet.turn()
    assert isinstance(agent.state.work, Sending)
    update = agent.state.work.update
    fleet.kill("ann")
    fleet.network.start_broker()
    fleet.join("ann", outbox=outbox_in(tmp_path / "state")[0])
    fleet.run_to_the_end()
    assert accepted_updates(fleet.store.path)[0]["ann"] == update


def activity_step(agent: object) -> int:
    return getattr(agent._jobs.report, "step", 0)  # type: ignore[attr-defined]


def test_full_disk_under_the_outbox_does_not_stop_the_training(tmp_path):
    calm = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    calm.join("ann")
    calm.run_to_the_end()
    (tmp_path / "full").mkdir()
    fleet = SmallFleet(tmp_path / "full", RunConfig(**ONE_ROUND))
    outbox, lines = outbox_in(tmp_path / "state", FullDisk())
    fleet.join("ann", outbox=outbox)
    fleet.run_to_the_end()
    assert len(lines) == 2
    assert np.array_equal(fleet.coefficients, calm.coefficients)


def test_an_agent_tries_again_to_write_its_update_while_it_waits_for_the_receipt(tmp_path):
    fleet = SmallFleet(tmp_path, RunConfig(**ONE_ROUND))
    outbox, lines = outbox_in(tmp_path / "state", DiskThatIsFullFor(1))
    agent = fleet.join("ann", outbox=outbox)
    fleet.run_until(lambda: bool(agent.state.plan))
    fleet.network.kill("aggregator")  # and nobody sends a receipt
    while not lines:
        agent.run_once(0.0)
    agent.run_once(0.0)
    assert lines[-1].endswith(" now")
    assert outbox.read() == waiting(agent.state)


def test_bytes_are_the_same_after_the_way_over_the_disk(tmp_path):
    update: Update = msgspec.structs.replace(UPDATE, held_out_loss=0.1, held_out_accuracy=1 / 3, train_loss=1e-300)
    outbox, _ = outbox_in(tmp_path)
    outbox.keep(replace(KEPT, update=update))
    read = outbox.read()
    assert read is not None
    assert encode(read.update) == encode(update)
    assert decode("update", encode(update)) == update
