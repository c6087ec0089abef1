"""`kseed-edge`: take part in a run with this device's data. Each command parses, calls one function, prints one result.

Nothing heavy is imported before a command runs, so `--help` answers at once. Errors are one line on stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_client import owner_cli
from edge_client.threads import sleep_while_waiting
from shared.errors import PeerError, UserError

if TYPE_CHECKING:
    from edge_client.events import Finish

app = typer.Typer(
    name="kseed-edge",
    help="Tunes a language model on this device's private data, and sends scalars only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _commands() -> None:
    """Tunes a language model on this device's private data, and sends scalars only."""


@app.command()
def join(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="The run: a-z, 0-9 and '-'.")],
    data: Annotated[
        str | None, typer.Option(help="A JSONL or CSV file, a folder, or a dataset id (owner/name).")
    ] = None,
    broker: Annotated[str | None, typer.Option(help="MQTT broker, host or host:port [localhost:1883].")] = None,
    device: Annotated[
        str | None, typer.Option("--device", "--device-id", help="This device's id [the host's name].")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with [agent], [model], [kernel], [data], [gate], [caps], [budget], [broker]."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file [what the run names].")] = None,
    torch_device: Annotated[str | None, typer.Option(help="Where the model runs: cpu, cuda, mps [cpu].")] = None,
    load_in: Annotated[
        str | None, typer.Option(help="4bit or 8bit packs the linear layers; unpacked, auto [auto].")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="loaded into memory, streamed from disk, or auto: what fits [auto].")
    ] = None,
    estimator: Annotated[
        str | None,
        typer.Option(help="forward passes only, exact gradient, or auto: what run and memory allow [forward]."),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="auto, instruction, chat, label or question [auto].")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt with {field} in it [the shape's own].")] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template", help="Say the prompt through the tokenizer's chat template.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset of the hub [train].")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and response together [1024].")] = None,
    held_out: Annotated[float | None, typer.Option(help="Part of the data that is never trained on [0.1].")] = None,
    kernel: Annotated[str | None, typer.Option(help="auto, numba, torch or triton [auto].")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [torch's own choice].")] = None,
    memory_floor_mb: Annotated[float | None, typer.Option(help="Pause under so much free memory [500].")] = None,
    battery_floor: Annotated[float | None, typer.Option(help="Pause under this charge, percent [20].")] = None,
    on_battery: Annotated[
        bool | None, typer.Option("--on-battery/--mains-only", help="Also work on battery [--mains-only].")
    ] = None,
    hours: Annotated[str | None, typer.Option(help="Work at these local times alone: 22:00-07:00 [always].")] = None,
    gate: Annotated[
        bool | None, typer.Option("--gate/--no-gate", help="Pause as [gate] says, or never [--gate].")
    ] = None,
    nice: Annotated[int | None, typer.Option(help="Lower the priority, 0 to 19 [10].")] = None,
    cpu_percent: Annotated[float | None, typer.Option(help="Work this part of the time [100].")] = None,
    memory_cap_mb: Annotated[float | None, typer.Option(help="Allocate no more than this [no cap].")] = None,
    tls: Annotated[bool | None, typer.Option("--tls/--no-tls", help="Encrypt; the port is then 8883.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="Certificates to trust [the system's].")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="This device's certificate.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="And its key.")] = None,
    username: Annotated[str | None, typer.Option(help="Login at the broker.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="Its first line is the password.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="Append a line of JSON per round to this file.")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Keep what must survive a kill here [~/.local/state/kseed].")
    ] = None,
    wait: Annotated[bool | None, typer.Option("--wait", help="Wait for broker and run without end.")] = None,
    connect_timeout: Annotated[float | None, typer.Option(help="Seconds for the first connection [30].")] = None,
) -> None:
    """Take part in a run until it is finished; ctrl-C leaves after the step under way."""
    from edge_client import operations
    from shared.config import broker_flags

    flags = {key: context.params[name] for name, key in _SETTINGS.items()}
    if on_battery is not None:
        flags["gate.pause_on_battery"] = not on_battery
    flags |= {"agent.run": run, **broker_flags(broker)}
    _show_ending(operations.join(operations.read_config(config, flags, os.environ)))


def _show_ending(ending: Finish) -> None:
    if ending.exit_code:
        _fail(ending.text, ending.exit_code)
    typer.echo(ending.text)


@app.command()
def up(
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the settings; else they are KSEED_ variables.")
    ] = None,
) -> None:
    """Take part for good: wait for broker and run, stay when the run is over, come back after failures."""
    from edge_client import operations

    _show_ending(operations.up(operations.read_config(config, {}, os.environ)))


for command in (
    owner_cli.status,
    owner_cli.doctor,
    owner_cli.pause,
    owner_cli.resume,
    owner_cli.finish,
    owner_cli.logs,
):
    app.command()(command)


System = Annotated[bool, typer.Option("--system", help="A service of the machine, not of this user; needs root.")]
ServiceName = Annotated[str, typer.Option("--name", help="Of the service; more than one run needs more than one.")]
Force = Annotated[bool, typer.Option("--force", help="Even where somebody changed the unit.")]


@app.command("install-service")
def install_service(
    config: Annotated[Path, typer.Option(help="TOML file with all that `up` needs.")],
    system: System = False,
    user: Annotated[str | None, typer.Option(help="With --system: the login it runs under [kseed].")] = None,
    name: ServiceName = "kseed-edge",
    only_print: Annotated[bool, typer.Option("--print", help="Show the unit; write nothing.")] = False,
    force: Force = False,
) -> None:
    """Write a systemd unit that runs `kseed-edge up`, and say how to start it."""
    from edge_client.installing import agent_service
    from shared.service_unit import install

    service = agent_service(name, config, is_system=system, user=user)
    typer.echo(service.text() if only_print else install(service, os.environ, force=force), nl=not only_print)


@app.command("uninstall-service")
def uninstall_service(system: System = False, name: ServiceName = "kseed-edge", force: Force = False) -> None:
    """Remove what install-service wrote."""
    from shared.service_unit import uninstall

    typer.echo(uninstall(name, system, os.environ, force=force))


_SETTINGS = {
    "data": "data.source",
    "shape": "data.shape",
    "template": "data.template",
    "chat_template": "data.chat_template",
    "split": "data.split",
    "max_length": "data.max_length",
    "held_out": "data.held_out_fraction",
    "device": "agent.device",
    "metrics": "agent.metrics",
    "state_dir": "agent.state_dir",
    "wait": "agent.wait",
    "connect_timeout": "agent.connect_timeout_s",
    "model": "model.source",
    "load_in": "model.load_in",
    "form": "model.form",
    "estimator": "model.estimator",
    "torch_device": "model.device",
    "kernel": "kernel.name",
    "threads": "kernel.threads",
    "memory_floor_mb": "gate.memory_floor_mb",
    "battery_floor": "gate.battery_floor_percent",
    "hours": "gate.hours",
    "gate": "gate.enabled",
    "nice": "caps.nice",
    "cpu_percent": "caps.cpu_percent",
    "memory_cap_mb": "caps.memory_mb",
    "tls": "broker.tls",
    "ca_file": "broker.ca_file",
    "cert_file": "broker.cert_file",
    "key_file": "broker.key_file",
    "username": "broker.username",
    "password_file": "broker.password_file",
}


def main() -> None:
    """The console script."""
    sleep_while_waiting()
    try:
        app()
    except (UserError, PeerError) as error:
        _fail(str(error), error.exit_code)


def _fail(text: str, exit_code: int) -> None:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
