"""Who is there: how many devices are listed, and what the store keeps and a round is told of them."""

from __future__ import annotations

from pathlib import Path

from aggregator import listing
from aggregator.attendance import Attendance, Seen
from aggregator.lock import RunLock
from aggregator.store import Store
from shared.messages import Presence
from shared.wire import encode
from tests.aggregator_setting import Device, Setting
from tests.runs import START_MS


def presence(online: bool, note: str = "") -> bytes:
    return encode(Presence(online, 1, 1, 1, "kseed/0.1", note))


def test_presence_of_more_devices_than_fit_is_not_listed() -> None:
    attendance = Attendance(max_devices=3)
    for number in range(5):
        attendance.hear(f"d{number}", presence(True), START_MS)
    assert (attendance.online, attendance.unlisted, len(attendance.changes())) == (3, 2, 3)
    attendance.hear("d0", presence(False), START_MS + 1)
    attendance.hear("d1", presence(True, "on battery"), START_MS + 2)
    attendance.hear("d2", b"", START_MS + 3)
    attendance.hear("d1", b"\x01\x06noise", START_MS + 4)
    assert attendance.online == 1
    assert attendance.changes()[1] == Seen("d1", True, "on battery", "kseed/0.1", START_MS + 2)
    attendance.forget_changes()
    assert attendance.changes() == []


def test_who_is_there_is_kept_in_the_store_and_counts_for_over_selection(tmp_path: Path) -> None:
    setting = Setting(tmp_path, over_selection=2.0)
    names = [f"d{i}" for i in range(8)]
    for name in names:
        device = Device(setting.network, name)
        device.transport.publish(
            f"kseed/night/presence/{name}", presence(True, "on battery" * (name == "d3")), retain=True
        )
    setting.run(turns=2)
    setting.clock.now_ms += 5_000
    setting.run()
    lock = RunLock.take(setting.path, "night", wait_s=0)  # as the process that serves it holds it
    with Store.open(setting.path, may_write=False) as reader:
        assert sorted(reader.presences("night")) == names
        assert reader.presences("night")["d3"].is_online
        assert "devices online: 8, at work: 7" in (text := listing.run(reader, "night", False, 5))
        assert [line.split("  ")[-1].strip() for line in text.splitlines() if line.startswith("d3 ")] == [
            "online, on battery"
        ]
    lock.release()
    assert setting.state.progress.online == 8
    assert setting.state.progress.part == 1.0  # the first round began before anyone was heard
