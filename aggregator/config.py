"""Settings of a run (`[run]`) and of a serving aggregator (`[aggregator]`, `[broker]`): frozen, checked once.

`shared.config.load` fills them from flags, environment, a TOML file and the defaults here. A preset is the same
struct with other defaults.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from shared.config import BrokerConfig
from shared.errors import UserError
from shared.messages import DirectionKind, NumberFormat, WeightDtype
from shared.ranges import (
    MAX_BATCH_SIZE,
    MAX_DEADLINE_S,
    MAX_EPS,
    MAX_GROUP,
    MAX_LISTED_DEVICES,
    MAX_LOCAL_STEPS,
    MAX_LR,
    MAX_STEP,
    MAX_U32,
    MIN_EPS,
    MIN_GROUP,
    is_group,
    is_seed_count,
)
from shared.topics import check_id

AlgorithmName = Literal["fedkseed", "fedkseed-pro"]
Weighting = Literal["samples", "equal"]
ServerScale = Literal["mean", "sqrt", "sum"]
LatePolicy = Literal["refuse", "fold"]

EDGE_SECTIONS = ("agent", "budget", "caps", "data", "gate", "kernel", "model")  # of the same file, read by kseed-edge


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a run works, for its whole life. Raises UserError where a value is impossible."""

    # The model state.
    directions: DirectionKind = "hadamard"
    seeds: int = 4096  # K
    dtype: WeightDtype | None = None  # None: as the base file says
    # The wire.
    scalar_format: NumberFormat = "f16"  # of the numbers in updates
    change_format: NumberFormat = "f16"  # of the numbers in plans' changes; what rounding leaves over is carried on
    first_order: Literal["refuse", "accept"] = "refuse"  # updates that carry a change of coefficients, not scalars
    # A device's work in one round.
    rounds: int = 50
    local_steps: int = 20
    one_sided: int = 0  # 0: both sides of each direction; n: groups of n share a batch and are measured on one side
    batch_size: int = 8
    eps: float = 1e-3  # the probe's step in weight units
    common_seeds: bool = False
    evaluate_every: int = 1  # ask for held-out loss every so many rounds, and at the end; 0: never
    # The step rule.
    step: Literal["normalised", "plain"] = "normalised"
    lr: float = 3e-7  # plain: a[k] -= lr * g
    step_rms: float = 1e-3  # normalised: RMS change of a weight per step, at the start
    clip: float = 3.0  # normalised: in running RMS of the scalars
    decay: float = 0.99  # normalised: of the running mean square, per step
    kept_promise: float = 0.4  # normalised: step_rms is steered until this part of the promised fall comes; 0: never
    promise_limit: float = 4.0  # normalised: a round that promises to lower the loss by more times itself is shortened
    # The combination.
    algorithm: AlgorithmName = "fedkseed"
    weighting: Weighting = "samples"
    server_scale: ServerScale = "mean"  # n forward-only devices: 1, sqrt(n) or n times the average of their changes
    # When a round ends, and who is in it.
    quorum: int = 2  # close as soon as so many updates count
    min_updates: int = 1  # at the deadline, close with no fewer
    deadline_s: float = 600.0
    participation: float = 1.0  # part of the fleet that a plan selects
    over_selection: float = 0.0  # not 0: select so many times the quorum of the devices online, instead
    late: LatePolicy = "refuse"  # fold: count an update of an earlier round too, with weight / sqrt(1 + rounds late)
    max_staleness: int = 2  # fold: rounds that an update may be late
    devices: tuple[str, ...] = ()  # not empty: these devices take part, and no others
    max_samples: int = 1_000_000  # the largest weight a device may claim

    def __post_init__(self) -> None:
        """Check every value and those that must agree."""
        _check_numbers(self)
        if not is_group(self.one_sided, self.local_steps):
            raise UserError(
                f"one_sided is {self.one_sided}, local_steps {self.local_steps}; allowed are 0, and {MIN_GROUP} to "
                f"{MAX_GROUP} where local_steps is a multiple of it. Correct either."
            )
        for device in self.devices:
            check_id("a name in devices", device)
        if len(set(self.devices)) != len(self.devices) or len(self.devices) > MAX_LISTED_DEVICES:
            raise UserError(f"devices names {len(self.devices)}; allowed: up to {MAX_LISTED_DEVICES}, each once.")
        if self.devices and self.participation != 1.0:
            raise UserError("devices and participation are both given; choose devices by name or by part, not both.")
        if self.over_selection and (self.devices or self.participation != 1.0):
            raise UserError("over_selection chooses how many take part; leave devices and participation out with it.")
        if 0.0 < self.over_selection < 1.0:
            raise UserError(f"over_selection is {self.over_selection}; allowed: 0, or 1 to 1000 times the quorum.")
        if self.quorum < self.min_updates:
            raise UserError(f"quorum is {self.quorum}, min_updates {self.min_updates}; quorum cannot be the smaller.")
        if self.first_order == "accept" and self.step == "plain":
            raise UserError(
                "first_order is accept and step plain, which bounds no change; choose step normalised, or refuse."
            )
        if self.devices and self.quorum > len(self.devices):
            raise UserError(f"quorum is {self.quorum}, but devices names only {len(self.devices)}; lower quorum.")


class UpperRunConfig(RunConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults for a base of `kseed manifest --scope upper` and data with labels: that part bears longer steps.

    The 40 directions cost the 40 forward passes of 20 steps on both sides; more of them, each noisier, bear a shorter
    step each. For text take all weights and the other defaults: the upper third alone has little to learn it with
    (docs/benchmarks.md).
    """

    local_steps: int = 40
    one_sided: int = 8
    eps: float = 2e-3
    step_rms: float = 4e-3
    server_scale: ServerScale = "sum"  # `promise_limit` keeps it from leaping away


class PaperRunConfig(RunConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults of the FedKSeed paper (arXiv 2312.06353, section 5.1): 10 of 200 clients, 200 steps of batch 1."""

    directions: DirectionKind = "gaussian"
    dtype: WeightDtype | None = "fp16"
    scalar_format: NumberFormat = "f32"
    change_format: NumberFormat = "f32"
    rounds: int = 40
    local_steps: int = 200
    batch_size: int = 1
    eps: float = 5e-4
    step: Literal["normalised", "plain"] = "plain"
    lr: float = 3e-7
    quorum: int = 10
    participation: float = 0.05


def server_factor(scale: ServerScale, devices: int) -> float:
    """What the average of so many devices' changes is multiplied by."""
    return {"mean": 1.0, "sqrt": math.sqrt(devices), "sum": float(devices)}[scale]


def _check_numbers(config: RunConfig) -> None:
    if not is_seed_count(config.seeds):
        raise UserError(f"seeds is {config.seeds}; allowed are the powers of two from 256 to 65536, such as 4096.")
    ranges: dict[str, tuple[float, float]] = {
        "rounds": (1, MAX_U32 - 1),
        "local_steps": (1, MAX_LOCAL_STEPS),
        "batch_size": (1, MAX_BATCH_SIZE),
        "eps": (MIN_EPS, MAX_EPS),
        "evaluate_every": (0, MAX_U32),
        "lr": (1e-30, MAX_LR),
        "step_rms": (1e-12, MAX_STEP),
        "clip": (1e-3, MAX_STEP),
        "decay": (0.0, 0.9999),
        "kept_promise": (0.0, 1.0),
        "promise_limit": (0.0, 1000.0),
        "quorum": (1, MAX_U32),
        "min_updates": (1, MAX_U32),
        "deadline_s": (1e-3, MAX_DEADLINE_S),
        "participation": (1e-6, 1.0),
        "over_selection": (0.0, 1000.0),
        "max_staleness": (1, 16),
        "max_samples": (1, MAX_U32),
    }
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:  # NaN fails too
            raise UserError(f"{name} is {value}; allowed: {low:.12g} to {high:.12g}. Correct the value.")


class CreateConfig(msgspec.Struct, frozen=True):
    """What `create` reads."""

    run: RunConfig = RunConfig()


class UpperCreateConfig(msgspec.Struct, frozen=True):
    """What `create --preset upper` reads."""

    run: UpperRunConfig = UpperRunConfig()


class PaperCreateConfig(msgspec.Struct, frozen=True):
    """What `create --preset paper` reads."""

    run: PaperRunConfig = PaperRunConfig()


PRESETS: dict[str, type[CreateConfig] | type[UpperCreateConfig] | type[PaperCreateConfig]] = {
    "default": CreateConfig,
    "upper": UpperCreateConfig,
    "paper": PaperCreateConfig,
}


class AggregatorConfig(msgspec.Struct, frozen=True):
    """What an aggregator on this machine needs, whatever it serves."""

    store: Path | None = None  # sqlite file; None: `store_path` chooses
    metrics: Path | None = None  # one line of JSON per round is appended here
    wait_for_broker_s: float = 30.0  # for the first connection; later ones are waited for without end

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0.0 <= self.wait_for_broker_s <= MAX_DEADLINE_S:
            raise UserError(f"wait_for_broker_s is {self.wait_for_broker_s}; allowed: 0 to {MAX_DEADLINE_S:.12g}.")


class ServeConfig(msgspec.Struct, frozen=True):
    """What `serve` reads."""

    aggregator: AggregatorConfig = AggregatorConfig()
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)


class StoreConfig(msgspec.Struct, frozen=True):
    """What the commands that only look at the store read."""

    aggregator: AggregatorConfig = AggregatorConfig()


def store_path(config: AggregatorConfig, data_home: str | None, home: Path) -> Path:
    """The store's file: the configured one, else below `data_home` (XDG_DATA_HOME) or `home`."""
    if config.store is not None:
        return config.store
    folder = Path(data_home) if data_home else home / ".local" / "share"
    return folder / "kseed" / "aggregator.sqlite3"
