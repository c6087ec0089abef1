"""What the commands do: settings in, one result out. The clock and the randomness of the process start here."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aggregator.config import EDGE_SECTIONS, PRESETS, ServeConfig, StoreConfig, store_path
from aggregator.lock import RunLock, is_served
from aggregator.records import Verb
from aggregator.reports import best
from aggregator.service import Service
from aggregator.spec import KEY_BYTES, new_spec
from aggregator.state import coefficients_of
from aggregator.store import Store
from shared.config import load
from shared.delta import Delta, write_delta
from shared.errors import UserError
from shared.manifest import RunBase
from shared.topics import check_id

ANSWERS_IN_FLIGHT = 500  # a receipt per update: 20 would be 400 updates/s to a broker that is 50 ms away
AWAY_S = 7 * 86_400  # how long the broker keeps updates for an aggregator that is away


def create(
    name: str,
    base: Path,
    preset: str,
    config: Path | None,
    flags: Mapping[str, Any],
    store_flags: Mapping[str, Any],
    pool_key: int | None,
    env: Mapping[str, str],
) -> str:
    """Create a run in the store; returns what to tell the person. Raises UserError, and leaves no trace then."""
    check_id("the run's name", name)
    if preset not in PRESETS:
        raise UserError(f"--preset is {preset!r}; allowed are {', '.join(PRESETS)}.")
    if pool_key is not None and not 0 <= pool_key < 2**64:
        raise UserError(f"--pool-key is {pool_key}; allowed: 0 to 2^64 - 1.")
    others = ("aggregator", "broker", *EDGE_SECTIONS)
    settings = load(PRESETS[preset], file=config, env=env, flags=flags, other_sections=others).run
    spec = new_spec(
        name,
        RunBase.read(base),
        settings,
        pool_key=secrets.randbits(64) if pool_key is None else pool_key,
        nonce_key=secrets.token_bytes(KEY_BYTES),
    )
    path = _path(config, store_flags, env)
    with Store.open(path, may_create=True) as store:
        store.create(spec, unix_ms())
    facts = spec.facts
    return (
        f"run {name}: {facts.model} in {facts.dtype}, {facts.directions} directions, K = {facts.seeds}, "
        f"{settings.rounds} rounds of {settings.local_steps} steps, in {path}\n"
        f"serve it: kseed-aggregator serve {name} --broker HOST"
    )


def serve_config(config: Path | None, flags: Mapping[str, Any], env: Mapping[str, str]) -> ServeConfig:
    """The settings of `serve`."""
    return load(ServeConfig, file=config, env=env, flags=flags, other_sections=("run", *EDGE_SECTIONS))


def serve(name: str, config: ServeConfig, env: Mapping[str, str]) -> None:
    """Serve a run until it is finished, or this process is asked to leave (SIGTERM, ctrl-C)."""
    from shared.mqtt import MqttTransport

    path = store_path(config.aggregator, env.get("XDG_DATA_HOME"), Path.home())
    with Store.open(path) as store:
        store.run(name)
        lock = RunLock.take(path, name)
        try:
            transport = MqttTransport(
                config.broker,
                f"kseed-aggregator-{name}",
                manual_acknowledge=True,
                session_expiry_s=AWAY_S,
                most_in_flight=ANSWERS_IN_FLIGHT,
                saves_bytes=False,
            )
            service = Service(store, name, transport, steady_clock(), log, config.aggregator.metrics)
            with _leaving() as leave:
                try:
                    ending = service.serve(leave.is_set, wait_for_broker_s=config.aggregator.wait_for_broker_s)
                finally:
                    transport.close()
        finally:
            lock.release()
    state = service.state.progress
    if ending == "finished":
        log(f"run {name} is finished: {state.reason}; version {state.round}")
    else:
        log(f"leaving; run {name} is {state.phase} in round {state.round}; serve it again to go on")


def open_store(
    config: Path | None, store_flags: Mapping[str, Any], env: Mapping[str, str], *, may_write: bool
) -> Store:
    """The store that the settings name. Raises UserError where there is none."""
    return Store.open(_path(config, store_flags, env), may_write=may_write)


def command(store: Store, name: str, verb: Verb, reason: str) -> str:
    """Ask the process that serves a run to do something; returns what to tell the person."""
    progress = store.run(name).progress
    if progress.phase == "finished":
        raise UserError(f"run {name!r} is finished ({progress.reason}); nothing can be done with it.")
    store.command(name, verb, reason, unix_ms())
    when = "within a second" if is_served(store.path, name) else "when it is served again: nobody serves it now"
    return f"run {name}: {verb} takes effect {when}"


def write_coefficients(store: Store, name: str, version: int | None, output: Path, *, wants_best: bool = False) -> str:
    """Write a delta file; returns what to tell the person.

    version: None for the latest, or with `wants_best` for the one with the lowest held-out loss.
    """
    row = store.run(name)
    number = row.progress.round if version is None else version
    if wants_best:
        if version is not None:
            raise UserError(f"--version {version} and --best name two versions; give one of them.")
        lowest = best([report for report, _ in store.reports(name)])
        if lowest is None:
            raise UserError(
                f"run {name!r} has no held-out loss, so no version is known to be the best. Devices measure one in "
                "rounds that ask for it (evaluate_every, and held_out_fraction of [data]). Give --version instead."
            )
        number = lowest.round
    data = store.coefficients(name, number)
    write_delta(output, Delta.of(row.spec.facts, number, coefficients_of(data)))
    return f"run {name}, version {number}: {output} ({output.stat().st_size} bytes)"


def unix_ms() -> int:
    """The system's clock."""
    return time.time_ns() // 1_000_000


def steady_clock() -> Callable[[], int]:
    """Unix milliseconds from now on; a change of the system's clock does not move it."""
    began_ms, began_s = unix_ms(), time.monotonic()
    return lambda: began_ms + int((time.monotonic() - began_s) * 1000)


def log(text: str) -> None:
    """One line for people, with the time. A full disk or a closed pipe behind it must not end the aggregator."""
    with contextlib.suppress(OSError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


@contextlib.contextmanager
def _leaving() -> Iterator[threading.Event]:
    """While it lasts, ctrl-C and SIGTERM set the event; the second one ends the process at once."""
    leave = threading.Event()

    def ask(number: int, frame: object) -> None:
        leave.set()
        for one in before:
            signal.signal(one, signal.SIG_DFL)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32":
        numbers.append(signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.getsignal(number) for number in heard}
    try:
        for number in heard:
            signal.signal(number, ask)
        yield leave
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _path(config: Path | None, store_flags: Mapping[str, Any], env: Mapping[str, str]) -> Path:
    others = ("run", "broker", *EDGE_SECTIONS)
    settings = load(StoreConfig, file=config, env=env, flags=store_flags, other_sections=others)
    return store_path(settings.aggregator, env.get("XDG_DATA_HOME"), Path.home())
