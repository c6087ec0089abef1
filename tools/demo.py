"""`kseed demo`: the main job on one machine, with the programs that people run.

A broker, the aggregator and up to three agents as processes of their own, each agent with its own data file; this
process watches, and measures the model before and after on examples that no agent has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from aggregator.reports import RoundReport
from edge_client.tally import RoundMetrics
from shared.errors import UnavailableError, UserError
from tools.broker import RunningBroker, start_broker
from tools.demo_report import Report, cost_of, progress_line, read_lines
from tools.fetch_model import HUB_ID, fetch_model
from tools.out_folder import RunFolder, prepare_folder
from tools.processes import Child, Crew, crew, flags, script

RUN = "demo"
DATA = Path(__file__).parent / "demo_data"
DEVICES = ("cafes", "gadgets", "travel")  # a data file and an agent of each name
TEMPLATE = "Review: {text}\nSentiment:"
BATCH_SIZE = 8
STEP_RMS = 2e-3
HELD_OUT = 0.2  # of each device's 80 examples
POLL_S = 0.5
STALL_S = 300.0  # without a closed round: something is wrong
ENDING_S = 60.0
# One core each: three agents share a machine, and torch's threads would only wait for each other.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """What a person can choose. Raises UserError where that is impossible."""

    out: Path
    model: str | None  # None: SmolLM2-135M-Instruct, fetched
    rounds: int
    local_steps: int
    agents: int
    seeds: int

    def __post_init__(self) -> None:
        if not 1 <= self.agents <= len(DEVICES):
            raise UserError(f"--agents is {self.agents}; the demo has data for 1 to {len(DEVICES)}.")
        if self.rounds < 2:
            raise UserError(f"--rounds is {self.rounds}; the demo needs 2 or more, to tell what a round costs.")

    @property
    def devices(self) -> tuple[str, ...]:
        """The ids of the devices."""
        return DEVICES[: self.agents]


class Files(RunFolder):
    """Where the demo keeps what."""

    @property
    def rounds(self) -> Path:
        """The aggregator's metrics."""
        return self.out / "aggregator.jsonl"

    @property
    def state(self) -> Path:
        """What agents keep over a kill."""
        return self.out / "state"

    @property
    def delta(self) -> Path:
        """The tuned model."""
        return self.out / f"{RUN}.kseed"

    @property
    def plot(self) -> Path:
        """The picture."""
        return self.out / f"{RUN}.png"

    def device(self, name: str) -> Path:
        """An agent's metrics."""
        return self.out / f"{name}.jsonl"

    def log(self, name: str) -> Path:
        """A process's output."""
        return self.out / f"{name}.log"


def run_demo(settings: DemoSettings, say: Say) -> Report:
    """Run the demo and return what it showed; its files are in `settings.out`.

    Raises UserError for settings that cannot work, UnavailableError where a process fails (with the tail of its log).
    """
    from tools.demo_bench import Bench, choose_dtype  # these need the extra "demo": before anything is done
    from tools.plot import plot_run

    began_s = time.monotonic()
    files = Files(settings.out)
    prepare_folder(settings.out, "demo")
    model, name = (settings.model, settings.model) if settings.model else (_fetched(say), HUB_ID)
    dtype, reason = choose_dtype()
    say(f"model {model} in {dtype}: {reason}")
    bench = Bench(model, dtype, DATA / "test.jsonl", TEMPLATE)
    bench.write_base(files.base, name)
    before = bench.score()
    say(f"before: held-out loss {before.loss:.3f}, accuracy {before.accuracy:.1%}")
    tuning_began_s = time.monotonic()
    _tune(settings, model, files, say)
    tuning_s = time.monotonic() - tuning_began_s
    after = bench.tuned_score(files.delta)
    devices = {name: read_lines(files.device(name), RoundMetrics) for name in settings.devices}
    plot_run(files.plot, read_lines(files.rounds, RoundReport), devices)
    cost = cost_of(list(devices.values()))
    report = Report(
        model=name,
        dtype=dtype,
        devices=settings.agents,
        rounds=settings.rounds,
        local_steps=settings.local_steps,
        batch_size=BATCH_SIZE,
        examples=bench.examples,
        question=bench.question,
        before=before,
        after=after,
        per_round=cost.per_round,
        joining=cost.joining,
        client_rounds=cost.client_rounds,
        tuning_s=tuning_s,
        total_s=time.monotonic() - began_s,
        files={
            f"delta, {files.delta.stat().st_size} bytes": str(files.delta),
            "metrics": ", ".join(str(path) for path in (files.rounds, *map(files.device, settings.devices))),
            "plot": str(files.plot),
            "report": str(files.report),
        },
    )
    files.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return report


def _fetched(say: Say) -> str:
    return str(fetch_model(say))


def _tune(settings: DemoSettings, model: str, files: Files, say: Say) -> None:
    """The run itself: ends when the aggregator has finished and every agent has left."""
    with ExitStack() as stack:
        broker = start_broker(files.out / "broker")
        stack.callback(broker.stop)
        members = stack.enter_context(crew())
        say(f"broker: {broker.kind} {broker.version} on port {broker.port}")
        create = members.start("kseed-aggregator create", create_command(settings, files), files.log("create"), {})
        members.finish(create, ENDING_S)
        aggregator = members.start(
            "kseed-aggregator serve", serve_command(broker, files), files.log("aggregator"), ONE_THREAD
        )
        agents = [
            members.start(f"agent {name}", join_command(name, model, broker, files), files.log(name), ONE_THREAD)
            for name in settings.devices
        ]
        say(f"aggregator and agents {', '.join(settings.devices)} started; logs in {files.out}")
        follow(members, aggregator, agents, files.rounds, lambda report: say(progress_line(report, settings.rounds)))
        members.finish(aggregator, ENDING_S)
        for agent in agents:
            members.finish(agent, ENDING_S)
        write = [*script("kseed-aggregator"), "coefficients", RUN, "--output", str(files.delta)]
        write += ["--store", str(files.store)]
        members.finish(members.start("kseed-aggregator coefficients", write, files.log("coefficients"), {}), ENDING_S)


def follow(
    members: Crew, aggregator: Child, agents: Sequence[Child], rounds: Path, show: Callable[[RoundReport], None]
) -> None:
    """Show each closed round as it comes, until the aggregator's process ends.

    Raises UnavailableError when a process fails, or no round closes for `STALL_S` seconds.
    """
    shown, changed_s = 0, time.monotonic()
    while True:
        is_over = aggregator.process.poll() is not None
        reports = read_lines(rounds, RoundReport)
        for report in reports[shown:]:
            show(report)
            changed_s = time.monotonic()
        shown = len(reports)
        members.check()
        if is_over:
            return
        if time.monotonic() - changed_s > STALL_S:
            tails = "\n".join(f"--- {child.log}\n{child.tail()}" for child in (aggregator, *agents))
            raise UnavailableError(f"no round was closed for {STALL_S:.0f} s; the logs end with:\n{tails}")
        time.sleep(POLL_S)


def create_command(settings: DemoSettings, files: Files) -> list[str]:
    """The command line that creates the run."""
    options: Mapping[str, object] = {
        "base": files.base,
        "store": files.store,
        "seeds": settings.seeds,
        "rounds": settings.rounds,
        "local-steps": settings.local_steps,
        "batch-size": BATCH_SIZE,
        "step-rms": STEP_RMS,
        "quorum": settings.agents,
        "min-updates": settings.agents,
    }
    return [*script("kseed-aggregator"), "create", RUN, *flags(options)]


def serve_command(broker: RunningBroker, files: Files) -> list[str]:
    """The command line of the aggregator."""
    options = {"broker": f"{broker.host}:{broker.port}", "store": files.store, "metrics": files.rounds}
    return [*script("kseed-aggregator"), "serve", RUN, *flags(options)]


def join_command(name: str, model: str, broker: RunningBroker, files: Files) -> list[str]:
    """The command line of an agent."""
    options = {
        "device": name,
        "broker": f"{broker.host}:{broker.port}",
        "model": model,
        "data": DATA / f"{name}.jsonl",
        "template": TEMPLATE,
        "held-out": HELD_OUT,
        "threads": 1,
        "metrics": files.device(name),
        "state-dir": files.state,
    }
    # Somebody waits for the demo to end: nothing pauses it.
    return [*script("kseed-edge"), "join", RUN, "--no-gate", "--nice", "0", *flags(options)]
