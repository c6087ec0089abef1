"""Faults of the machine: a full or read-only disk, clocks that jump, a damaged file. Nothing accepted is ever lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aggregator import operations
from aggregator.store import Store
from aggregator.verification import verify
from shared.errors import UnavailableError, UserError
from shared.refusals import Refusal
from tests.aggregator_setting import Device, Setting
from tests.disks import fill
from tests.runs import START_MS, spec_of, update_of

ROOT = Path(__file__).parent.parent


def two_rounds(setting: Setting, disturb: object = None) -> None:
    devices = [Device(setting.network, name) for name in "ab"]
    setting.run(*devices)
    for number in (0, 1):
        for device in devices:
            device.send(update_of(number))
        setting.run(*devices)


# --- a full disk


def test_on_a_full_disk_devices_are_told_to_wait_and_with_room_again_nothing_is_lost(tiny_disk: Path) -> None:
    setting = Setting(tiny_disk, rounds=2)
    a, b = Device(setting.network, "a"), Device(setting.network, "b")
    setting.run(a, b)
    a.send(update_of())
    setting.run(a, b)
    before = setting.state
    filler = fill(tiny_disk)
    b.send(update_of())
    setting.run(a, b)
    assert b.codes == [Refusal.STORAGE]
    assert setting.state is before
    assert "WARNING: nothing can be stored" in setting.log
    assert "the disk is full" in setting.log
    with Store.open(setting.path, may_write=False) as reader:
        assert list(reader.state("night").updates) == ["a"]
    setting.clock.now_ms += 10**6  # even the deadline cannot close what cannot be stored
    setting.run(a, b)
    assert setting.state.progress.round == 0
    filler.unlink()
    b.send(update_of())
    setting.run(a, b)
    assert Refusal.ACCEPTED in a.codes + b.codes
    assert "the store works again" in setting.log
    assert setting.state.progress.round == 1
    assert verify(setting.store, "night").difference is None
    setting.store.close()


def test_an_aggregator_that_starts_on_a_full_disk_goes_on_when_there_is_room(tiny_disk: Path) -> None:
    setting = Setting(tiny_disk)
    a = Device(setting.network, "a")
    setting.run(a)
    a.send(update_of())
    setting.run(a)
    before = setting.state
    filler = fill(tiny_disk)
    setting.network.kill("aggregator")
    setting.store.close()
    try:
        setting.store = Store.open(setting.path)
    except UnavailableError as error:  # it needs a few pages to share; then it says so
        assert "full" in str(error) or "does not work" in str(error)
        filler.unlink()
        setting.store = Store.open(setting.path)
    setting.service = setting.start_service()
    filler.unlink(missing_ok=True)
    setting.run(a)
    assert setting.state == before
    setting.store.close()


def test_a_store_cannot_be_made_on_a_full_disk_and_the_error_says_why(tiny_disk: Path) -> None:
    fill(tiny_disk)
    with pytest.raises(UnavailableError, match="disk"), Store.open(tiny_disk / "new", may_create=True) as store:
        store.create(spec_of(), START_MS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_on_a_full_disk_does_not_end_the_aggregator() -> None:
    program = "import os; from aggregator.operations import log; log('no room'); log('for this'); os._exit(7)"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, cwd=ROOT, check=False)
    assert done.returncode == 7


# --- a read-only disk


def test_a_read_only_disk_is_named_at_the_start(tiny_disk: Path) -> None:
    with Store.open(tiny_disk / "s.sqlite3", may_create=True) as store:
        store.create(spec_of(), START_MS)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    command = [sys.executable, "-m", "aggregator.cli", "serve", "night", "--store", str(tiny_disk / "s.sqlite3")]
    done = subprocess.run([*command, "--broker", "127.0.0.1:1"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tiny_disk / 's.sqlite3'}: the store cannot be written or opened")


# --- clocks


@pytest.mark.parametrize("jump_ms", [-(10**10), -3600_000, 3600_000, 10**10])
def test_a_clock_that_jumped_between_two_lives_changes_no_coefficient(tmp_path: Path, jump_ms: int) -> None:
    calm = Setting(tmp_path / "calm", rounds=2)
    two_rounds(calm)
    setting = Setting(tmp_path / "jumps", rounds=2)
    a, b = Device(setting.network, "a"), Device(setting.network, "b")
    setting.run(a, b)
    a.send(update_of())
    setting.run(a, b)
    published_at_ms = setting.state.progress.published_at_ms
    setting.clock.now_ms += jump_ms
    setting.restart()
    setting.run(a, b)
    assert setting.state.progress.round == 0  # a deadline that nobody could meet closes nothing
    assert setting.state.progress.deadline_at_ms == setting.clock.now_ms + 60_000
    assert setting.state.progress.published_at_ms >= published_at_ms  # or devices would ignore the plan
    for device, number in ((b, 0), (a, 1), (b, 1)):
        device.send(update_of(number))
        setting.run(a, b)
    assert setting.state.progress.phase == "finished"
    assert setting.state.coefficients == calm.state.coefficients
    assert verify(setting.store, "night").difference is None


def test_the_systems_clock_may_jump_while_the_aggregator_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = operations.steady_clock()
    before = clock()
    monkeypatch.setattr(operations.time, "time_ns", lambda: 0)
    assert 0 <= clock() - before < 10_000


# --- a damaged file


def test_a_store_that_is_damaged_meanwhile_ends_serving_with_a_clear_error(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    a = Device(setting.network, "a")
    setting.run(a)
    setting.store._do("PRAGMA wal_checkpoint(TRUNCATE)")
    setting.store._do("PRAGMA cache_size = 0")
    data = bytearray(setting.path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    setting.path.write_bytes(data)
    a.send(update_of())
    with pytest.raises(UserError, match="the store is damaged") as raised:
        setting.run(a)
    assert raised.value.exit_code == 2
    a.listen()
    assert a.codes == [Refusal.STORAGE]  # the device keeps its update


def test_verify_names_a_damaged_file(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    two_rounds(setting)
    setting.store.close()
    with Store.open(setting.path) as store:
        store._do("PRAGMA wal_checkpoint(TRUNCATE)")
        store._do("PRAGMA writable_schema = ON")
        store._do("UPDATE sqlite_master SET rootpage = 2 WHERE name = 'updates_by_use'")
    with pytest.raises(UserError, match="the store is damaged"), Store.open(setting.path) as damaged:
        verify(damaged, "night")
