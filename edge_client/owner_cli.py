"""The commands of `kseed-edge` for the owner of a device whose agent is at work (`edge_client.cli` registers them)."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
Config = Annotated[Path | None, typer.Option(help="TOML file that the agent was started with.")]
StateDir = Annotated[Path | None, typer.Option(help="Where the agent keeps its files [~/.local/state/kseed].")]
RunOption = Annotated[str | None, typer.Option("--run", help="Where several agents work here: of this run.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="And of this device id.")]


def status(
    config: Config = None,
    state_dir: StateDir = None,
    run: RunOption = None,
    device: DeviceOption = None,
    json: Json = False,
) -> None:
    """What the agent is doing, and what it costs.

    Ends with 0 (at work, or waiting for its next round), 1 (paused), 4 (no broker, or waiting after a failure), 5 (not
    running), 6 (running, but silent for ten minutes).
    """
    from edge_client import owner
    from edge_client.status import lines

    seen = owner.see(owner.find_board(config, state_dir, run, device, os.environ), time.time())
    typer.echo(seen.as_json() if json else "\n".join(lines(seen)))
    raise typer.Exit(seen.exit_code)


def doctor(
    config: Config = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what needs torch.")] = False,
    json: Json = False,
) -> None:
    """Check everything the agent needs, one thing after the other, and say what to do about what fails.

    Ends with 1 where something failed.
    """
    from msgspec.json import encode

    from edge_client.doctor import check, checks

    findings = []
    for finding in checks.findings(config, os.environ, is_quick=quick):
        findings.append(finding)
        if not json:
            typer.echo("\n".join(check.lines(finding, checks.WIDTH)))
    typer.echo(encode(check.as_plain(findings)).decode() if json else check.summary(findings))
    raise typer.Exit(any(finding.verdict == "failed" for finding in findings))


def pause(
    duration: Annotated[str | None, typer.Option("--for", help="Such as 30min, 2h or 1d [until resume].")] = None,
    config: Config = None,
    state_dir: StateDir = None,
    run: RunOption = None,
    device: DeviceOption = None,
) -> None:
    """Stop working after the step under way, and keep what is done. It holds across restarts, until `resume`."""
    from edge_client import owner

    for_s = None if duration is None else owner.seconds(duration)
    typer.echo(owner.pause(owner.find_board(config, state_dir, run, device, os.environ), time.time(), for_s))


def resume(
    config: Config = None, state_dir: StateDir = None, run: RunOption = None, device: DeviceOption = None
) -> None:
    """End a pause; take back `finish`."""
    from edge_client import owner

    typer.echo(owner.resume(owner.find_board(config, state_dir, run, device, os.environ)))


def finish(
    config: Config = None, state_dir: StateDir = None, run: RunOption = None, device: DeviceOption = None
) -> None:
    """Finish the round under way, send it, then leave."""
    from edge_client import owner

    typer.echo(owner.finish(owner.find_board(config, state_dir, run, device, os.environ), time.time()))


def logs(
    count: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="And what comes, until ctrl-C.")] = False,
    config: Config = None,
    state_dir: StateDir = None,
    run: RunOption = None,
    device: DeviceOption = None,
) -> None:
    """The end of the agent's log."""
    from edge_client import owner

    board = owner.find_board(config, state_dir, run, device, os.environ)
    for line in owner.log_lines(board, count):
        typer.echo(line)
    with suppress(KeyboardInterrupt):
        for text in owner.log_from_now(board) if follow else ():
            typer.echo(text, nl=False)
