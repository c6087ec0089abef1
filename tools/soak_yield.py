"""`kseed soak-yield`: an agent at work on a machine whose owner comes and goes. Does it get out of the way, and back?

A real agent in a real run, seen from outside: its CPU time in /proc, its log, the file that grows with each step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from edge_client.state_files import Owner
from shared.errors import UnavailableError, UserError
from tools.broker import start_broker
from tools.demo import ONE_THREAD
from tools.manifest import write_manifest
from tools.out_folder import prepare_folder
from tools.processes import Child, crew
from tools.soak_check import read_metrics
from tools.soak_world import AGENTS, RUN, World, create_command, join_command, make_world, serve_command
from tools.yield_check import Cycle, Seen, has_two_steps, measure, violations
from tools.yield_loads import Loads, can_unplug
from tools.yield_report import YieldReport
from tools.yield_schedule import Kind, Load, schedule
from tools.yield_watch import Glance, Watch

POLL_S = 0.1
AFTER_S = 6.0  # of work after a load
PATIENCE_S = 300.0  # besides the quiet time, for the agent to be at work
SHORT_S = 60.0
AGENT = AGENTS[0]
ENDING_S = 180.0  # the step under way is finished first
TINY_MB, REAL_MB = 700.0, 6000.0  # that the agent takes at most
TINY_STEPS, REAL_STEPS = 2000, 20  # of a round: long enough that a load finds it half done

Say = Callable[[str], None]


@dataclass(frozen=True)
class YieldSettings:
    """What a person can choose. Raises UserError where that is impossible."""

    out: Path
    seed: int
    minutes: float
    quiet_s: float
    others_percent: float
    model: Path | None = None  # a folder; None: one so small that a step takes milliseconds
    kinds: tuple[Kind, ...] = ()  # of loads; (): all that this machine can have

    def __post_init__(self) -> None:
        for name, value, most in (("minutes", self.minutes, 10_000.0), ("quiet", self.quiet_s, 3600.0)):
            if not 0.0 < value <= most:
                raise UserError(f"--{name} is {value:g}; allowed: more than 0, to {most:g}.")
        if not 1.0 <= self.others_percent <= 100.0:
            raise UserError(f"--others-percent is {self.others_percent:g}; allowed: 1 to 100.")
        if self.model is not None and not self.model.is_dir():
            raise UserError(f"--model is {str(self.model)!r}; give the folder of a model, as `kseed fetch-model` does.")
        if unknown := set(self.kinds) - set(get_args(Kind)):
            raise UserError(f"--load is {sorted(unknown)[0]!r}; allowed: {', '.join(get_args(Kind))}.")
        if "mains" in self.kinds and not can_unplug():
            raise UserError("--load mains shows the agent another /sys/class/power_supply; that needs root on Linux.")
        if not Path("/proc/stat").exists():
            raise UserError("this soak reads /proc; it runs on Linux only.")
        if os.nice(0) > 0 and "cpu" in (self.kinds or get_args(Kind)):
            raise UserError(
                f"this runs at nice {os.nice(0)}, so its loads would be work that can wait; start it without nice."
            )

    @property
    def local_steps(self) -> int:
        """Of a round."""
        return TINY_STEPS if self.model is None else REAL_STEPS


def run_soak_yield(settings: YieldSettings, say: Say) -> YieldReport:
    """Run it and return what it showed; its files are in `settings.out`.

    Raises UserError for settings that cannot work, UnavailableError where the machine is too busy to tell anything.
    """
    world = World(settings.out.resolve())
    prepare_folder(world.out, "soak-yield")
    _make_world(world, settings)
    loads = Loads(world.out / "power_supply", TINY_MB if settings.model is None else REAL_MB)
    kinds = settings.kinds or tuple(kind for kind in get_args(Kind) if kind != "mains" or can_unplug())
    with ExitStack() as stack:
        broker = start_broker(world.out / "broker", kind="mosquitto")
        stack.callback(broker.stop)
        members = stack.enter_context(crew())
        address = f"{broker.host}:{broker.port}"
        create = create_command(world, settings.seed, deadline=86_400, local_steps=settings.local_steps, quorum=1)
        plain = {"KSEED_RUN_EVALUATE_EVERY": "0"}  # local steps alone
        members.finish(members.start("kseed-aggregator create", create, world.log("create", 1), plain), SHORT_S)
        serving = serve_command(world, address)
        members.start("aggregator", serving, world.log("aggregator", 1), {})
        command = [*join_command(world, AGENT, address, ("--gate",)), "--state-dir", str(world.out / "state")]
        if "mains" in kinds:
            command = loads.seen_by(command)
        agent = members.start(AGENT, command, world.log(AGENT, 1), _agent_settings(settings, loads))
        folder = world.out / "state" / Owner(address, RUN, AGENT).folder_name
        watch = Watch(agent.process.pid, agent.log, folder / "steps")
        say(f"seed {settings.seed}: agent {AGENT} at work; loads: {', '.join(kinds)}")
        plan = schedule(settings.seed, settings.minutes * 60, settings.quiet_s, kinds)
        cycles = []
        for load in plan:
            cycles.append(_cycle(load, settings, loads, watch, agent))
            say(_line(cycles[-1]))
        agent.process.terminate()
        members.finish(agent, ENDING_S)
    return _report(settings, world, cycles)


def _make_world(world: World, settings: YieldSettings) -> None:
    make_world(world, settings.seed)
    if settings.model is not None:
        world.model.rename(world.out / "tiny-model")
        world.model.symlink_to(settings.model.resolve(), target_is_directory=True)
        write_manifest(str(world.model), "bf16", world.base, name="soak")


def _agent_settings(settings: YieldSettings, loads: Loads) -> dict[str, str]:
    return {
        **ONE_THREAD,
        "KSEED_GATE_QUIET_S": str(settings.quiet_s),
        "KSEED_GATE_OTHERS_CPU_PERCENT": str(settings.others_percent),
        "KSEED_GATE_MEMORY_FLOOR_MB": str(loads.memory_floor_mb),
    }


def _cycle(load: Load, settings: YieldSettings, loads: Loads, watch: Watch, agent: Child) -> Cycle:
    seen = Seen(load, settings.others_percent, os.cpu_count() or 1, settings.local_steps, loads.memory_floor_mb)

    def look() -> Glance:
        time.sleep(POLL_S)
        if agent.process.poll() is not None:
            raise UnavailableError(f"the agent ended; its log {agent.log} ends with:\n{agent.tail()}")
        seen.glances.append(watch.glance(time.monotonic()))
        return seen.glances[-1]

    _wait_for_work(load.calm_s, settings.quiet_s, seen, look)
    seen.began_s = time.monotonic()
    with loads.on(load.kind):
        from_s = seen.began_s if load.kind != "memory" else _when_taken(seen, look)
        until_s = from_s + load.load_s
        # The step that is under way is starved by a load of the CPU. So a load waits a while for its end.
        while (glance := look()).at_s < until_s or (not glance.reason and glance.at_s < until_s + SHORT_S):
            pass
    seen.ended_s = time.monotonic()
    working_s: float | None = None
    until_s = seen.ended_s + settings.quiet_s + SHORT_S
    while (glance := look()).at_s < until_s:
        working_s = None if glance.reason else working_s or glance.at_s
        if working_s is not None and glance.at_s - working_s >= AFTER_S:
            break
    return measure(seen)


def _when_taken(seen: Seen, look: Callable[[], Glance]) -> float:
    """When there is less memory than the floor: it takes a while to take it."""
    while (glance := look()).free_mb >= seen.memory_floor_mb:
        if glance.at_s - seen.began_s > PATIENCE_S:
            raise UnavailableError(f"the load did not get below {seen.memory_floor_mb:.0f} MB of free memory")
    return glance.at_s


def _wait_for_work(calm_s: float, quiet_s: float, seen: Seen, look: Callable[[], Glance]) -> None:
    """Until the agent has taken steps for `calm_s` in a row; what was before is forgotten."""
    began_s = time.monotonic()
    while True:
        glance = look()
        if glance.reason or not glance.steps.work:
            seen.glances.clear()
            if glance.at_s - began_s > PATIENCE_S + quiet_s:
                why = glance.reason or "it takes no step"
                raise UnavailableError(f"the agent is not at work, so it cannot yield: {why}")
        elif glance.at_s - seen.glances[0].at_s >= calm_s and has_two_steps(seen.glances):
            return


def _line(cycle: Cycle) -> str:
    yielded = "never" if cycle.yielded_s is None else f"after {cycle.yielded_s:.1f} s"
    resumed = "never" if cycle.resumed_s is None else f"{cycle.resumed_s:.1f} s after its end"
    share = "?" if cycle.share_paused is None else f"{cycle.share_paused:.1f}%"
    disturbed = " (others needed the CPU, too)" if cycle.is_disturbed else ""
    return (
        f"{cycle.kind} for {cycle.load_s:.0f} s: paused {yielded}, {cycle.share_before:.0f}% of a core before and "
        f"{share} meanwhile; worked again {resumed}{disturbed}"
    )


def _report(settings: YieldSettings, world: World, cycles: list[Cycle]) -> YieldReport:
    found = [violation for cycle in cycles for violation in violations(cycle, settings.quiet_s)]
    rounds = [line for line in read_metrics(world.metrics(AGENT)) if line.receipt == "accepted"]
    found += [
        f"round {line.round}: {line.steps + line.steps_before} of {settings.local_steps} steps counted"
        for line in rounds
        if line.steps + line.steps_before != settings.local_steps
    ]
    report = YieldReport(
        seed=settings.seed,
        minutes=settings.minutes,
        quiet_s=settings.quiet_s,
        others_percent=settings.others_percent,
        cycles=cycles,
        rounds=len(rounds),
        violations=found,
    )
    world.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return report
