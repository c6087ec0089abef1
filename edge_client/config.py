"""Settings of the agent: [agent], [model], [kernel], [data], [gate], [caps], [budget], [broker]; frozen, read once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from edge_client.byte_budget import ByteLimits
from edge_client.caps import Caps
from edge_client.data.settings import DataConfig
from edge_client.policy import Limits as GateLimits
from shared.config import BrokerConfig
from shared.errors import UserError
from shared.topics import check_id

AGGREGATOR_SECTIONS = ("run", "aggregator")  # of the same file, read by kseed-aggregator
MAX_THREADS = 1024


class AgentConfig(msgspec.Struct, frozen=True):
    """Who this device is, and how patient."""

    run: str = ""  # which to take part in; "": `join` names it
    device: str = ""  # "": made from the host's name
    metrics: Path | None = None  # a line of JSON per round is appended here
    state_dir: Path | None = None  # what must survive a kill; None: where this platform keeps such files
    wait: bool = False  # for broker and run, without end
    connect_timeout_s: float = 30.0  # for the first connection
    run_timeout_s: float = 15.0  # for the run's description, once connected

    def __post_init__(self) -> None:
        """Check the values."""
        if self.run:
            check_id("the run's name", self.run)
        if self.device:
            check_id("device", self.device)
        for name in ("connect_timeout_s", "run_timeout_s"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; give more than 0 seconds, or set wait = true.")


class ModelConfig(msgspec.Struct, frozen=True):
    """Which model this device loads."""

    source: str = ""  # hub id, folder or GGUF file; "": what the run names
    device: str = "cpu"  # of torch: cpu, cuda, cuda:1, mps
    # 4bit, 8bit: linear layers stay packed (bitsandbytes); unpacked: never; auto: as the checkpoint has them
    load_in: Literal["auto", "4bit", "8bit", "unpacked"] = "auto"
    # loaded: weights in memory; streamed: read from their files in every step; auto: what fits, loaded if it does
    form: Literal["auto", "loaded", "streamed"] = "auto"
    # forward: two losses per step; gradient: exact ones, by backprop; auto: gradient where the run takes them
    estimator: Literal["forward", "gradient", "auto"] = "forward"


class KernelConfig(msgspec.Struct, frozen=True):
    """How weights are rebuilt."""

    name: Literal["auto", "numba", "torch", "triton"] = "auto"
    threads: int = 0  # of torch and the kernel; 0: torch's own choice

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.threads <= MAX_THREADS:
            raise UserError(f"threads is {self.threads}; allowed are 0 (torch's own choice) to {MAX_THREADS}.")


class EdgeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `kseed-edge` reads."""

    data: DataConfig
    agent: AgentConfig = AgentConfig()
    model: ModelConfig = ModelConfig()
    kernel: KernelConfig = KernelConfig()
    gate: GateLimits = GateLimits()
    caps: Caps = Caps()
    budget: ByteLimits = ByteLimits()
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)


def device_of(host: str) -> str:
    """A device id from a host's name: its first label, in lower case, with '-' for what an id may not hold."""
    label = re.sub(r"[^a-z0-9]+", "-", host.split(".")[0].lower()).strip("-")
    return label[:64].rstrip("-") or "device"
