"""What `list` and `show` print, for people or as JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from aggregator.attendance import Seen
from aggregator.lock import is_served
from aggregator.records import DeviceRow, RunRow
from aggregator.reports import RoundReport, Traffic, best, number
from aggregator.store import Store


def runs(store: Store, as_json: bool) -> str:
    """Every run, a line each."""
    facts = []
    for row in store.runs():
        reports = store.reports(row.spec.name)
        facts.append(_glance(store, row, [report for report, _ in reports]))
    if as_json:
        return _json(facts)
    if not facts:
        return f"no runs in {store.path}"
    head = ("RUN", "PHASE", "ROUND", "HELD-OUT LOSS", "MODEL")
    rows = [
        (
            one["run"],
            one["phase"] + (" (served)" if one["is_served"] else ""),
            f"{one['round']}/{one['rounds']}",
            f"{number(one['first_held_out_loss'])} -> {number(one['last_held_out_loss'])}",
            one["model"],
        )
        for one in facts
    ]
    return _table(head, rows)


def run(store: Store, name: str, as_json: bool, last: int) -> str:
    """One run: its rounds, devices, bytes and notes."""
    row = store.run(name)
    rounds, devices, notes = store.reports(name), store.devices(name), store.notes(name, last)
    present = store.presences(name)
    glance = _glance(store, row, [report for report, _ in rounds])
    waiting = [command.verb for command in store.commands(name)]
    if as_json:
        settings = msgspec.to_builtins(row.spec.config)
        reports = [
            {**msgspec.to_builtins(report), "traffic": msgspec.to_builtins(traffic)} for report, traffic in rounds
        ]
        return _json(
            {
                **glance,
                "waiting_commands": waiting,
                "settings": settings,
                "reports": reports,
                "devices": [asdict(device) for device in devices],
                "presences": [asdict(seen) for _, seen in sorted(present.items())],
                "notes": [{"at_ms": at_ms, "text": text} for at_ms, text in notes],
            }
        )
    served = "served now" if glance["is_served"] else "nobody serves it now"
    reason = f": {glance['reason']}" if glance["reason"] else ""
    lines = [
        f"run {name}: {glance['phase']}{reason}, round {glance['round']} of {glance['rounds']}, {served}",
        f"model {glance['model']} in {row.spec.facts.dtype}, {row.spec.facts.directions} directions, "
        f"K = {row.spec.facts.seeds}, {row.spec.config.algorithm}, created {_time(row.created_at_ms)}",
        *_losses(glance),
        *([f"asked for and not yet obeyed: {', '.join(waiting)}"] if waiting else []),
        *([f"excluded (another model): {', '.join(glance['excluded'])}"] if glance["excluded"] else []),
        "",
        _rounds_table(rounds[-last:]),
        "",
        _devices_table(devices, present, is_served=glance["is_served"]),
    ]
    if notes:
        lines += ["", *(f"{_time(at_ms)}  {text}" for at_ms, text in notes)]
    return "\n".join(lines)


def _glance(store: Store, row: RunRow, reports: Sequence[RoundReport]) -> dict[str, Any]:
    losses = [report.held_out_loss for report in reports if report.held_out_loss is not None]
    lowest = best(reports)
    return {
        "run": row.spec.name,
        "phase": row.progress.phase,
        "reason": row.progress.reason,
        "round": row.progress.round,
        "rounds": row.spec.config.rounds,
        "model": row.spec.facts.model,
        "is_served": is_served(store.path, row.spec.name),
        "excluded": [exclusion.device for exclusion in row.progress.excluded],
        "first_held_out_loss": losses[0] if losses else None,
        "last_held_out_loss": losses[-1] if losses else None,
        "best_held_out_loss": lowest.held_out_loss if lowest else None,
        "best_version": lowest.round if lowest else None,
        "update_bytes": sum(report.update_bytes for report in reports),
    }


def _losses(glance: Mapping[str, Any]) -> list[str]:
    """One line, or none before the first measurement."""
    if glance["best_version"] is None:
        return []
    first, last, lowest = (number(glance[f"{which}_held_out_loss"]) for which in ("first", "last", "best"))
    return [f"held-out loss {first} -> {last}, lowest {lowest} (version {glance['best_version']})"]


def _rounds_table(rounds: Sequence[tuple[RoundReport, Traffic | None]]) -> str:
    if not rounds:
        return "no round closed yet"
    head = ("ROUND", "UPDATES", "TRAIN LOSS", "HELD-OUT LOSS", "ACCURACY", "STEP", "UPDATE B", "SENT B", "SECONDS", "")
    rows = [
        (
            str(report.round),
            f"{report.counted}/{report.accepted}",
            number(report.train_loss),
            number(report.held_out_loss),
            number(report.held_out_accuracy),
            f"{report.step:.3g}",
            str(report.update_bytes),
            _sent(traffic),
            f"{report.seconds:.1f}",
            "" if report.outcome == "combined" else report.outcome,
        )
        for report, traffic in rounds
    ]
    return _table(head, rows)


def _devices_table(devices: Sequence[DeviceRow], present: Mapping[str, Seen], *, is_served: bool) -> str:
    """Those that sent something and those that are there; the others never took part.

    Where nobody serves the run, nobody hears who leaves.
    """
    known = {one.device: one for one in devices}
    names = sorted(set(known) | {seen.device for seen in present.values() if seen.is_online})
    if not names:
        return "no update yet, nobody online"
    presence = _presence if is_served else _last_presence
    head = ("DEVICE", "UPDATES", "LAST ROUND", "LAST UPDATE", "UPDATE B", "PRESENCE")
    rows = []
    for name in names:
        one = known.get(name)
        sent = ("0", "-", "-", "0")
        if one is not None:
            sent = (str(one.updates), str(one.last_round), _time(one.last_received_at_ms), str(one.update_bytes))
        rows.append((name, *sent, presence(present.get(name))))
    if not is_served:
        return f"nobody listens, so who is online is not known\n{_table(head, rows)}"
    online = [seen for seen in present.values() if seen.is_online]
    at_work = sum(not seen.note for seen in online)
    return f"devices online: {len(online)}, at work: {at_work}\n{_table(head, rows)}"


def _presence(seen: Seen | None) -> str:
    """Slow is not dead: a device that is online and says nothing is at work, or waits for the next plan."""
    if seen is None:
        return "never heard"
    if not seen.is_online:
        return f"offline since {_time(seen.heard_at_ms)}"
    return f"online, {seen.note}" if seen.note else "online, at work"


def _last_presence(seen: Seen | None) -> str:
    if seen is None or not seen.is_online:
        return _presence(seen)
    return f"online when last heard, {_time(seen.heard_at_ms)}"


def _sent(traffic: Traffic | None) -> str:
    if traffic is None:
        return "-"
    sent = traffic.socket_sent_bytes if traffic.ip_sent_bytes is None else traffic.ip_sent_bytes
    return str(traffic.payload_sent_bytes if sent is None else sent)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _time(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
