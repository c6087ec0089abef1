"""What a check is, what it finds, and in which order checks are made. No I/O of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from shared.errors import UserError

Verdict = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a check found. `details`: lines for who wants to know more."""

    name: str
    verdict: Verdict
    text: str
    remedy: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What a check returns where nothing failed; with a `remedy` it is a warning."""

    text: str
    remedy: str = ""
    details: tuple[str, ...] = ()


class Trouble(Exception):
    """What a check raises: what is wrong, and what to do about it."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


@dataclass(frozen=True)
class Check:
    """One check. It is made where all that it `needs` did not fail."""

    name: str
    look: Callable[[], Seen]
    needs: tuple[str, ...] = ()


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """The findings, in order, each as soon as it is there."""
    missing: set[str] = set()
    for check in checks:
        finding = _found(check, [name for name in check.needs if name in missing])
        if finding.verdict in ("failed", "skipped"):
            missing.add(check.name)
        yield finding


def _found(check: Check, missing: list[str]) -> Finding:
    if missing:
        return Finding(check.name, "skipped", f"it needs what failed above: {', '.join(missing)}")
    try:
        seen = check.look()
    except Trouble as trouble:
        return Finding(check.name, "failed", str(trouble), trouble.remedy)
    except UserError as error:
        return Finding(check.name, "failed", str(error))
    except Exception as error:  # one check that breaks must not hide the others
        text = f"the check itself broke: {type(error).__name__}: {' '.join(str(error).split())}"
        return Finding(check.name, "failed", text, "Report this, with the line above.")
    return Finding(check.name, "warning" if seen.remedy else "ok", seen.text, seen.remedy, seen.details)


def lines(finding: Finding, width: int) -> list[str]:
    """For people. width: of the names."""
    margin = " " * (9 + width)
    shown = [
        f"{finding.verdict:9}{finding.name:{width}}{finding.text}",
        *(f"{margin}  {line}" for line in finding.details),
    ]
    return [*shown, f"{margin}-> {finding.remedy}"] if finding.remedy else shown


def summary(findings: Sequence[Finding]) -> str:
    """How many of each."""
    counts = {
        verdict: sum(one.verdict == verdict for one in findings) for verdict in ("failed", "warning", "skipped", "ok")
    }
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def as_plain(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs."""
    return {"failed": sum(one.verdict == "failed" for one in findings), "findings": [asdict(one) for one in findings]}
