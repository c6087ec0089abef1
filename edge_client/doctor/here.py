"""What an agent needs of its own machine: data, a place for its files, sensors, a clock, kernels that work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from edge_client.config import EdgeConfig
from edge_client.doctor.check import Seen, Trouble
from edge_client.fit import fit_of
from edge_client.gate import Gate
from edge_client.operations import check_data
from edge_client.telling import measures
from edge_client.watching.machine import Machine, free_disk
from shared.messages import Plan, Run

KERNEL_S = 300.0  # importing torch on a small board, and compiling
CLOCK_MARGIN_S = 60.0


def data(config: EdgeConfig) -> Seen:
    """As the agent reads it, but for the tokenizer."""
    return Seen(f"{config.data.source}: {check_data(config.data)} records of a known shape")


def disk(folder: Path, config: EdgeConfig) -> Seen:
    """Can the state folder be written, and does the disk hold what it says it holds?"""
    began_s = time.perf_counter()
    probe = folder / "doctor"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        remedy = "Free some space there" if error.errno == errno.ENOSPC else "Make it writable for this user"
        raise Trouble(
            f"{folder} cannot be written: {error.strerror}", f"{remedy}, or set state_dir under [agent]."
        ) from error
    took_ms = (time.perf_counter() - began_s) * 1000
    free, floor = free_disk(folder), config.gate.disk_floor_mb
    text = f"{folder}: writing and syncing 4 KB took {took_ms:.3g} ms; {free.value or 0:.0f} MB free"
    if free.value is not None and free.value < floor and config.gate.enabled:
        return Seen(
            f"{text}, under the floor of {floor:.0f} MB", "Free some space, or lower disk_floor_mb under [gate]."
        )
    return Seen(text)


def sensors(machine: Machine, config: EdgeConfig) -> Seen:
    """What is watched, from where, and whether the agent would pause just now."""
    now_s = time.monotonic()
    readings = measures(machine.read(now_s), config.gate)
    known = sum(one.value is not None for one in readings)
    details = tuple(f"{one.name}: {one.text}" + (f"; {one.limit}" if one.limit else "") for one in readings)
    text = f"{known} of {len(readings)} readings are known; what is unknown never pauses"
    if pause := Gate(config.gate, machine.read)():
        return Seen(f"{text}. An agent would pause now: {pause}", "See [gate] for the limits.", details)
    return Seen(text, details=details)


def model(config: EdgeConfig, run: Run | None) -> Seen:
    """Does a step fit into the memory that is free, in which form, and how many sequences at once?"""
    wanted, source = config.model, config.model.source or (run.model if run else "")
    if not source:
        return Seen(
            "which one is not known before the run is", "Ask again when the run is there, or set [model] source."
        )
    dtype = run.dtype if run else "bf16"
    found = fit_of(source, dtype, wanted.device, load_in=wanted.load_in, max_length=config.data.max_length)
    if found is None:
        return Seen(f"{source}: its files are not here yet, or do not say how large it is (GGUF)")
    return Seen(found.why)


def clock(found: Plan | None, now_s: float) -> Seen:
    """MQTT tells no time. What can be known: the aggregator's last plan is in the past, and what the system says."""
    synchronised = _is_synchronised()
    text = f"{datetime.fromtimestamp(now_s, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    if found is not None and (ahead_s := found.published_at_ms / 1000 - now_s) > CLOCK_MARGIN_S:
        raise Trouble(
            f"{text}; the plan of round {found.round} was published {ahead_s:.0f} s later than that",
            "Set this machine's clock (or the aggregator's): deadlines and certificates are judged by it.",
        )
    if found is not None:
        text += f", after the plan of round {found.round}"
    if synchronised is False:
        return Seen(f"{text}; the system says that it is not synchronised", "timedatectl set-ntp true")
    return Seen(f"{text}, {'synchronised' if synchronised else 'whether it is synchronised is not known'}")


def _is_synchronised() -> bool | None:
    program = shutil.which("timedatectl")
    if program is None:
        return None
    command = [program, "show", "--property=NTPSynchronized", "--value"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"yes": True, "no": False}.get(answer)


def kernel(config: EdgeConfig) -> Seen:
    """The kernels at work, in a process of their own."""
    device, name, load_in = config.model.device, config.kernel.name, config.model.load_in
    command = [sys.executable, "-m", "edge_client.smoke", device, name, load_in]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=KERNEL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Trouble(f"no answer in {KERNEL_S:.0f} s", f"Run it by hand: {' '.join(command)}") from error
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode < 0:
        what = signal.Signals(-done.returncode).name
        raise Trouble(
            f"it died of {what}: {last}",
            "torch or bitsandbytes was built for another machine; install one for this one.",
        )
    if done.returncode:
        raise Trouble(last, "pip install 'kseed[edge]' installs what is missing; on a Jetson see docs/jetson.md.")
    found = json.loads(done.stdout.splitlines()[-1])
    text = f"{found['kernel']} ({found['why']}) on {device} gives the bits of the definition"
    if found["packed"] is not None:
        raise Trouble(
            f"{text}, but bitsandbytes cannot be used: {found['packed']}",
            'Install or build bitsandbytes for this machine, or set load_in = "unpacked" under [model].',
        )
    return Seen(f"{text}; bitsandbytes works" if load_in in ("4bit", "8bit") else text)
