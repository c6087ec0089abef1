"""`kseed soak`: a run of real processes over a bad network, in which everybody is killed again and again.

At the end everything must be as if nothing had happened: the coefficients are the fold of the accepted updates, every
receipt is in the journal, nothing counts twice, and all devices hold the same model.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from aggregator.store import Store
from shared.config import BrokerConfig
from shared.errors import UserError
from shared.mqtt import MqttTransport
from tools.broker import start_broker
from tools.certificates import Certificates, make_certificates
from tools.out_folder import prepare_folder
from tools.processes import Crew, crew
from tools.soak_check import check_fold, last_digest, retained_violations, violations
from tools.soak_crew import SoakCrew
from tools.soak_proxy import HOST, Proxy
from tools.soak_report import SoakReport
from tools.soak_schedule import AGGREGATOR, BROKER, WEATHERS, Change, Cut, Happening, Kill, schedule
from tools.soak_witness import Witness
from tools.soak_world import AGENTS, GROUP, RUN, World, create_command, make_world, stop_command

POLL_S = 0.1
LOOK_S = 1.0  # into the store
MOMENT_TIMEOUT_S = 3.0  # a kill that waits for a packet does not wait for longer
STAGE_TIMEOUT_S = 30.0  # nor does one that waits until its victim is at work
STALL_S = 180.0  # without a closed round: something is wrong
ENDING_S = 180.0
SHORT_S = 60.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class SoakSettings:
    """What a person can choose. Raises UserError where that is impossible."""

    out: Path
    seed: int
    minutes: float
    kills: int  # at least
    tls: bool = False  # between the proxy and everybody but the broker

    def __post_init__(self) -> None:
        if not 0.1 <= self.minutes <= 100_000.0:
            raise UserError(f"--minutes is {self.minutes:g}; allowed: 0.1 to 100000.")
        if not 0 <= self.kills <= self.minutes * 60:
            raise UserError(f"--kills is {self.kills}; allowed: 0 to one a second, {self.minutes * 60:.0f}.")


class Violation(Exception):
    """Something that must never happen has happened."""


def run_soak(settings: SoakSettings, say: Say) -> SoakReport:
    """Run the soak and return what it showed; its files are in `settings.out`.

    Raises UserError for settings that cannot work, UnavailableError where the soak itself cannot be run.
    """
    began_s = time.monotonic()
    world = World(settings.out.resolve())
    prepare_folder(world.out, "soak")
    make_world(world, settings.seed)
    witness = Witness()
    with ExitStack() as stack:
        broker = start_broker(world.out / "broker", kind="mosquitto")
        stack.callback(broker.stop)
        certificates = make_certificates(world.out / "certificates", [HOST]) if settings.tls else None
        proxy = Proxy(broker.port, settings.seed, WEATHERS[0], witness, _server_side(certificates))
        stack.callback(proxy.close)
        proxy.start()
        members = stack.enter_context(crew())
        command = create_command(world, settings.seed, one_sided=0 if settings.seed // 2 % 2 else GROUP)
        create = members.start("kseed-aggregator create", command, world.log("create", 1), {})
        members.finish(create, SHORT_S)
        agents = ", ".join(AGENTS)
        say(f"seed {settings.seed}: {broker.kind} {broker.version} behind a proxy, aggregator, agents {agents}")
        people = SoakCrew(world, members, broker, proxy.port, witness, certificates.ca if certificates else None)
        found: list[str] = []
        try:
            people.start()
            _storm(settings, world, people, proxy, witness, say)
            _calm(world, members, people, proxy, say)
            with closing(_newcomer(broker.port)) as newcomer:
                found += retained_violations(world, newcomer)
        except Violation as violation:
            found.append(str(violation))
    return _report(settings, world, people, proxy, witness, found, time.monotonic() - began_s)


def _server_side(certificates: Certificates | None) -> ssl.SSLContext | None:
    if certificates is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.cert, certificates.key)
    return context


def _newcomer(port: int) -> MqttTransport:
    return MqttTransport(BrokerConfig(host="127.0.0.1", port=port), "kseed-soak-newcomer", session_expiry_s=0)


class _Progress:
    """Watches that rounds close."""

    def __init__(self, world: World) -> None:
        self._store = world.store
        self._looked_s, self._moved_s = float("-inf"), time.monotonic()
        self.round = 0

    def look(self, people: SoakCrew) -> None:
        """Raises Violation when somebody has died by himself, or no round closes for `STALL_S`."""
        if (died := people.died()) is not None:
            raise Violation(
                f"{died.name} ended by itself with exit code {died.exit_code}; its log ends with:\n{died.tail}"
            )
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        with Store.open(self._store, may_write=False) as store:
            number = store.run(RUN).progress.round
        if number != self.round:
            self.round, self._moved_s = number, now_s
        elif now_s - self._moved_s > STALL_S:
            raise Violation(f"no round was closed for {STALL_S:.0f} s; the logs end with:\n{people.tails()}")


def _storm(settings: SoakSettings, world: World, people: SoakCrew, proxy: Proxy, witness: Witness, say: Say) -> None:
    """Everything on the schedule, whose clock stands still while a kill waits for its time; so long as that is allowed.

    A slow machine thus gets the same soak, up to twice as long.
    """
    plan: Sequence[Happening] = schedule(settings.seed, settings.minutes * 60, settings.kills, AGENTS)
    progress = _Progress(world)
    _wait_for(lambda: progress.round > 0, progress, people)  # the first round closes in peace: everybody is there
    began_s = told_s = time.monotonic()
    waited_s = 0.0
    for happening in plan:
        at_s = began_s + waited_s + happening.at_s
        _wait_for(lambda at_s=at_s: time.monotonic() >= at_s, progress, people)  # type: ignore[misc]
        if isinstance(happening, Change):
            proxy.change(happening.weather)
        elif isinstance(happening, Cut):
            proxy.cut(happening.share, happening.is_torn)
        else:
            since_s = time.monotonic()
            _kill(happening, people, witness, progress, since_s + settings.minutes * 60 - waited_s)
            waited_s += time.monotonic() - since_s
        if time.monotonic() - told_s > SHORT_S:
            told_s = time.monotonic()
            say(f"{(told_s - began_s) / 60:.1f} min: {people.kills.total()} kills, {progress.round} rounds")
    _wait_for(lambda: time.monotonic() - began_s - waited_s >= settings.minutes * 60, progress, people)


def _wait_for(is_done: Callable[[], bool], progress: _Progress, people: SoakCrew) -> None:
    while not is_done():
        people.bring_back(time.monotonic())
        progress.look(people)
        time.sleep(POLL_S)


def _kill(kill: Kill, people: SoakCrew, witness: Witness, progress: _Progress, until_s: float) -> None:
    """Wait for the victim's stage and for the moment, but not past `until_s`; then kill."""
    until_s = min(until_s, time.monotonic() + STAGE_TIMEOUT_S)
    _wait_for(lambda: time.monotonic() >= until_s or people.has_reached(kill.target, kill.stage), progress, people)
    if kill.moment != "now" and (left_s := until_s - time.monotonic()) > 0:
        witness.wait_for(kill.moment, min(left_s, MOMENT_TIMEOUT_S))
        time.sleep(kill.lag_s)
    people.kill(kill.target, time.monotonic(), kill.away_s)


def _calm(world: World, members: Crew, people: SoakCrew, proxy: Proxy, say: Say) -> None:
    """No more trouble: a last round closes, the run is stopped, and everybody leaves by himself."""
    say("the storm is over; the run is stopped when one more round has closed")
    proxy.change(WEATHERS[0])
    people.bring_back(float("inf"))
    progress = _Progress(world)
    progress.look(people)
    last = progress.round
    _wait_for(lambda: progress.round > last, progress, people)
    members.finish(members.start("kseed-aggregator stop", stop_command(world), world.log("stop", 1), {}), SHORT_S)
    for name in (AGGREGATOR, *AGENTS):
        if (wrong := people.finish(name, ENDING_S)) is not None:
            raise Violation(f"after the run was stopped: {wrong}")


def _report(
    settings: SoakSettings,
    world: World,
    people: SoakCrew,
    proxy: Proxy,
    witness: Witness,
    found: list[str],
    seconds: float,
) -> SoakReport:
    fold = check_fold(world)
    found = [*found, *violations(world, witness, fold)]
    version, digest = last_digest(world)
    kills = people.kills
    report = SoakReport(
        seed=settings.seed,
        minutes=settings.minutes,
        seconds=seconds,
        kills={
            AGGREGATOR: kills[AGGREGATOR],
            BROKER: kills[BROKER],
            "agent": sum(kills[name] for name in AGENTS),
        },
        network=asdict(proxy.count),
        messages=witness.passed(),
        rounds=fold.rounds,
        accepted=fold.updates,
        counted=fold.counted,
        late=fold.late,
        receipts=dict(sorted(witness.receipts.items())),
        version=version,
        coefficients_sha256=fold.sha256,
        model_digest=digest,
        violations=found,
    )
    world.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return report
