"""`kseed-aggregator`: create, serve and look at runs. Each command parses, calls one function, prints one result.

Nothing heavy is imported before a command runs, so `--help` answers at once. Errors are one line on stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.errors import PeerError, UserError

if TYPE_CHECKING:
    from aggregator.records import Verb
    from aggregator.store import Store

app = typer.Typer(
    name="kseed-aggregator",
    help="Coordinates federated tuning: publishes plans, combines the devices' scalars, keeps every version.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="The run: a-z, 0-9 and '-'.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with [run], [aggregator], [broker].")]
StoreFile = Annotated[Path | None, typer.Option("--store", help="The store's sqlite file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Reason = Annotated[str, typer.Option("--reason", help="Told to the devices.")]


@app.command()
def create(
    context: typer.Context,
    name: Name,
    base: Annotated[Path, typer.Option(help="What `kseed manifest` wrote about the base model.")],
    preset: Annotated[
        str, typer.Option(help="Defaults: default, upper (for such a base), paper (FedKSeed).")
    ] = "default",
    config: ConfigFile = None,
    store: StoreFile = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32 [the base file's].")] = None,
    directions: Annotated[str | None, typer.Option(help="hadamard, rademacher or gaussian.")] = None,
    seeds: Annotated[int | None, typer.Option(help="K, a power of two, 256 to 65536 [4096].")] = None,
    rounds: Annotated[int | None, typer.Option(help="The run is finished after so many [50].")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Steps of a device in a round [20].")] = None,
    one_sided: Annotated[int | None, typer.Option(help="0, or the size of groups measured on one side [0].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step [8].")] = None,
    eps: Annotated[float | None, typer.Option(help="Size of a probe, in weight units [0.001].")] = None,
    step: Annotated[str | None, typer.Option(help="Step rule, normalised or plain.")] = None,
    step_rms: Annotated[float | None, typer.Option(help="normalised: RMS change per step [0.001].")] = None,
    lr: Annotated[float | None, typer.Option(help="plain: learning rate.")] = None,
    server_scale: Annotated[str | None, typer.Option(help="Of n devices: mean, sqrt or sum [mean].")] = None,
    scalar_format: Annotated[str | None, typer.Option(help="Numbers in updates: f32, f16 or f8 [f16].")] = None,
    change_format: Annotated[str | None, typer.Option(help="Numbers in changes: f32, f16 or f8 [f16].")] = None,
    first_order: Annotated[str | None, typer.Option(help="accept or refuse changes as updates [refuse].")] = None,
    algorithm: Annotated[str | None, typer.Option(help="fedkseed or fedkseed-pro.")] = None,
    quorum: Annotated[int | None, typer.Option(help="Close a round at so many updates [2].")] = None,
    min_updates: Annotated[int | None, typer.Option(help="At the deadline, with no fewer [1].")] = None,
    deadline_s: Annotated[float | None, typer.Option("--deadline", help="Of a round, seconds [600].")] = None,
    participation: Annotated[float | None, typer.Option(help="Part of the fleet in a round [1.0].")] = None,
    over_selection: Annotated[
        float | None, typer.Option(help="Select so many times the quorum, of those online.")
    ] = None,
    late: Annotated[str | None, typer.Option(help="refuse late updates, or fold them in for less [refuse].")] = None,
    max_staleness: Annotated[int | None, typer.Option(help="fold: at most so many rounds late [2].")] = None,
    pool_key: Annotated[int | None, typer.Option(help="Key of the directions, u64 [random].")] = None,
) -> None:
    """Create a run. More settings: [run] of --config, or KSEED_RUN_<SETTING> (see docs)."""
    from aggregator import operations

    flags = {f"run.{key}": value for key, value in context.params.items() if key not in _NOT_SETTINGS}
    created = operations.create(name, base, preset, config, flags, _store_flags(store), pool_key, os.environ)
    typer.echo(created)


_NOT_SETTINGS = {"name", "base", "preset", "config", "store", "pool_key"}


@app.command()
def serve(
    name: Name,
    broker: Annotated[str | None, typer.Option(help="MQTT broker, host or host:port [localhost:1883].")] = None,
    config: ConfigFile = None,
    store: StoreFile = None,
    tls: Annotated[bool | None, typer.Option("--tls/--no-tls", help="Encrypt; the port is then 8883.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="Certificates to trust [the system's].")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="This client's certificate.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="And its key.")] = None,
    username: Annotated[str | None, typer.Option(help="Login at the broker.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="Its first line is the password.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="Append a line of JSON per round to this file.")] = None,
    wait: Annotated[float | None, typer.Option(help="Seconds to wait for the broker at first [30].")] = None,
) -> None:
    """Serve a run until it is finished; go on exactly where it was."""
    from aggregator import operations
    from shared.config import broker_flags

    flags: dict[str, Any] = {
        "broker.tls": tls,
        "broker.ca_file": ca_file,
        "broker.cert_file": cert_file,
        "broker.key_file": key_file,
        "broker.username": username,
        "broker.password_file": password_file,
        "aggregator.metrics": metrics,
        "aggregator.wait_for_broker_s": wait,
        **broker_flags(broker),
        **_store_flags(store),
    }
    operations.serve(name, operations.serve_config(config, flags, os.environ), os.environ)


@app.command(name="list")
def list_runs(config: ConfigFile = None, store: StoreFile = None, as_json: Json = False) -> None:
    """List the runs in the store."""
    from aggregator import listing

    with _opened(config, store) as opened:
        typer.echo(listing.runs(opened, as_json))


@app.command()
def show(
    name: Name,
    config: ConfigFile = None,
    store: StoreFile = None,
    as_json: Json = False,
    last: Annotated[int, typer.Option(min=1, help="Rounds and notes to print.")] = 20,
) -> None:
    """Show a run: its rounds, losses, devices and bytes."""
    from aggregator import listing

    with _opened(config, store) as opened:
        typer.echo(listing.run(opened, name, as_json, last))


@app.command()
def verify(name: Name, config: ConfigFile = None, store: StoreFile = None, as_json: Json = False) -> None:
    """Fold the accepted updates again and compare every version, bit for bit; exit code 1 where one differs."""
    import msgspec

    from aggregator import verification

    with _opened(config, store) as opened:
        found = verification.verify(opened, name)
    typer.echo(msgspec.json.encode(found).decode() if as_json else verification.text(found))
    if found.difference is not None:
        raise typer.Exit(1)


@app.command()
def pause(name: Name, reason: Reason = "", config: ConfigFile = None, store: StoreFile = None) -> None:
    """Pause a run: devices stop working on it."""
    _command(name, "pause", reason, config, store)


@app.command()
def resume(name: Name, config: ConfigFile = None, store: StoreFile = None) -> None:
    """Go on with a paused run."""
    _command(name, "resume", "", config, store)


@app.command()
def stop(name: Name, reason: Reason = "", config: ConfigFile = None, store: StoreFile = None) -> None:
    """Finish a run for good, with the updates that it has."""
    _command(name, "stop", reason, config, store)


@app.command()
def coefficients(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="The delta file to write.")],
    version: Annotated[int | None, typer.Option(min=0, help="Which version [the latest].")] = None,
    best: Annotated[bool, typer.Option("--best", help="The version with the lowest held-out loss.")] = False,
    config: ConfigFile = None,
    store: StoreFile = None,
) -> None:
    """Write a version of the tuned model as a delta file (16 KB at K = 4096)."""
    from aggregator import operations

    with _opened(config, store) as opened:
        typer.echo(operations.write_coefficients(opened, name, version, output, wants_best=best))


@app.command("broker-config")
def broker_config(
    runs: Annotated[list[str] | None, typer.Argument(help="The runs whose aggregators may publish.")] = None,
    users: Annotated[Path | None, typer.Option(help="mosquitto's password file; then there is an access list.")] = None,
    cert: Annotated[Path | None, typer.Option(help="The broker's certificate, PEM; with --key: TLS.")] = None,
    key: Annotated[Path | None, typer.Option(help="And its key.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="[8883 with TLS, 1883 without].")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder for mosquitto's database [mosquitto's own].")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(),
) -> None:
    """Write a configuration for mosquitto with the limits that kseed needs, and the access list."""
    from aggregator.broker_config import BrokerFiles, write_broker_config

    typer.echo(write_broker_config(BrokerFiles(output, tuple(runs or ()), users, cert, key, port, data)))


System = Annotated[bool, typer.Option("--system", help="A service of the machine, not of this user; needs root.")]
ServiceName = Annotated[str | None, typer.Option("--name", help="Of the service [kseed-aggregator-RUN].")]
Force = Annotated[bool, typer.Option("--force", help="Even where somebody changed the unit.")]


@app.command("install-service")
def install_service(
    run: Annotated[str, typer.Argument(help="The run to serve.")],
    config: Annotated[Path, typer.Option(help="TOML file with all that `serve` needs.")],
    system: System = False,
    user: Annotated[str | None, typer.Option(help="With --system: the login it runs under [kseed].")] = None,
    name: ServiceName = None,
    only_print: Annotated[bool, typer.Option("--print", help="Show the unit; write nothing.")] = False,
    force: Force = False,
) -> None:
    """Write a systemd unit that serves a run, and say how to start it."""
    from aggregator.installing import aggregator_service
    from shared.service_unit import install

    service = aggregator_service(run, name or f"kseed-aggregator-{run}", config, is_system=system, user=user)
    typer.echo(service.text() if only_print else install(service, os.environ, force=force), nl=not only_print)


@app.command("uninstall-service")
def uninstall_service(
    run: Annotated[str, typer.Argument(help="The run that it serves.")],
    system: System = False,
    name: ServiceName = None,
    force: Force = False,
) -> None:
    """Remove what install-service wrote."""
    from shared.service_unit import uninstall

    typer.echo(uninstall(name or f"kseed-aggregator-{run}", system, os.environ, force=force))


def main() -> None:
    """The console script."""
    try:
        app()
    except (UserError, PeerError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


def _command(name: str, verb: Verb, reason: str, config: Path | None, store: Path | None) -> None:
    from aggregator import operations

    with _opened(config, store, may_write=True) as opened:
        typer.echo(operations.command(opened, name, verb, reason))


def _opened(config: Path | None, store: Path | None, *, may_write: bool = False) -> Store:
    from aggregator import operations

    return operations.open_store(config, _store_flags(store), os.environ, may_write=may_write)


def _store_flags(store: Path | None) -> dict[str, Any]:
    return {"aggregator.store": store}


if __name__ == "__main__":
    main()
