"""`kseed-aggregator list` and `show`: what is in the store, for people and for programs."""

from __future__ import annotations

import json
import re

from aggregator.attendance import Seen
from aggregator.lock import RunLock
from aggregator.store import Store
from tests.aggregator_shell import Shell, serve_two_rounds, shell

__all__ = ["shell"]  # fixture


def test_list_and_show_print_what_is_in_the_store(shell: Shell) -> None:
    shell.create("night", "--local-steps", 3, "--deadline", 60)
    shell.create("day")
    serve_two_rounds(shell)
    code, out, _ = shell("list")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["RUN", "PHASE", "ROUND"]
    assert lines[1][:3] == ["day", "created", "0/50"]
    assert lines[2][:3] == ["night", "open", "2/50"]
    _, out, _ = shell("show", "night")
    assert "run night: open, round 2 of 50, nobody serves it now" in out
    assert [line.split()[:4] for line in out.splitlines() if line[:1] in ("0", "1")] == [
        ["0", "2/2", "2.0000", "3.0000"],
        ["1", "2/2", "2.0000", "3.0000"],
    ]
    assert "DEVICE  UPDATES  LAST ROUND" in out


def test_show_prints_json_for_programs(shell: Shell) -> None:
    shell.create("night", "--local-steps", 3)
    serve_two_rounds(shell)
    facts = json.loads(shell("show", "night", "--json")[1])
    assert [report["round"] for report in facts["reports"]] == [0, 1]
    assert [device["device"] for device in facts["devices"]] == ["a", "b"]
    assert facts["update_bytes"] == sum(device["update_bytes"] for device in facts["devices"]) > 0
    assert json.loads(shell("list", "--json")[1])[0]["run"] == "night"


def test_who_is_online_is_known_only_while_somebody_listens(shell: Shell) -> None:
    shell.create("night")
    with Store.open(shell.store, may_write=True) as store:
        store.keep_presences("night", [Seen("ann", True, "", "kseed", 1_700_000_000_000)])
    lock = RunLock.take(shell.store, "night")
    out = shell("show", "night")[1]
    assert "devices online: 1, at work: 1" in out
    lock.release()
    out = shell("show", "night")[1]
    assert "nobody listens, so who is online is not known" in out
    assert re.search(r"^ann .*online when last heard, 2023-11-1", out, re.MULTILINE)


def test_an_empty_store_is_said_to_be_empty(shell: Shell) -> None:
    Store.open(shell.store, may_create=True).close()
    assert shell("list") == (0, f"no runs in {shell.store}\n", "")
    assert shell("list", "--json")[1] == "[]\n"
