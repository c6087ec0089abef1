"""May the next step start? A pure function of readings, the owner's limits, the time, and what was decided before.

The defaults are those of BOINC and Folding@home, which people let run on their own machines: nothing on battery,
nothing while other programs use over 25% of the processor or within three minutes after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

import msgspec

from edge_client import hours
from edge_client.watching.machine import Readings
from edge_client.watching.reading import Reading
from shared.errors import UserError

# Work starts again a margin on the good side of its limit, so that it does not flap around it.
MEMORY_FACTOR = 1.1
DISK_FACTOR = 1.1
CHARGE_MARGIN = 5.0  # percentage points
HEAT_MARGIN_C = 10.0

Cause = Literal["memory", "disk", "heat", "mains", "charge", "hours", "metered", "cpu", "gpu", "owner"]


class Limits(msgspec.Struct, frozen=True):
    """What the owner allows. An unknown reading never pauses."""

    enabled: bool = True  # False: work whatever the machine says
    memory_floor_mb: float = 500.0  # free memory to leave to others, in 10^6 bytes; 0: no floor
    disk_floor_mb: float = 500.0  # free disk to leave to others, in 10^6 bytes; 0: no floor
    temperature_limit_c: float = 85.0  # of the hottest sensor; 0: no limit
    pause_on_battery: bool = True
    battery_floor_percent: float = 20.0  # no work under this charge, not even while charging; 0: no floor
    others_cpu_percent: float = 25.0  # of all cores, taken by other programs; 0: no limit
    others_gpu_percent: float = 25.0  # of the GPU's time, taken by other programs; 0: no limit
    quiet_s: float = 180.0  # work goes on when others have stayed under these limits for so long
    hours: str = ""  # local times at which work is allowed, such as "22:00-07:00"; "": always
    pause_on_metered: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        for name, usual in (("memory_floor_mb", 500), ("disk_floor_mb", 500), ("quiet_s", 180)):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more, usual is {usual}.")
        for name in ("battery_floor_percent", "others_cpu_percent", "others_gpu_percent"):
            if not 0 <= getattr(self, name) <= 100:
                raise UserError(f"{name} is {getattr(self, name)}; allowed are 0 to 100.")
        if self.temperature_limit_c != 0 and not 30 <= self.temperature_limit_c <= 150:
            raise UserError(f"temperature_limit_c is {self.temperature_limit_c}; allowed are 0 (no limit), 30 to 150.")
        hours.spans(self.hours)


class Wish(msgspec.Struct, frozen=True):
    """What the owner asked the agent to do, until they ask for something else. Times in unix seconds."""

    kind: Literal["pause", "finish"]  # finish: leave when the round under way is finished and sent
    asked_at_s: float
    until_s: float | None = None  # of a pause; None: until it is resumed


@dataclass(frozen=True)
class Moment:
    """A point in time."""

    now_s: float  # monotonic
    local: datetime  # of the wall clock where the machine stands


@dataclass(frozen=True)
class Pause:
    """Why no step starts, and what lets work go on, as sentences."""

    cause: Cause
    reason: str
    resumes_when: str

    def __str__(self) -> str:
        return f"{self.reason} {self.resumes_when}"


@dataclass(frozen=True)
class Standing:
    """What was decided, and what the next decision has to know."""

    pause: Pause | None = None
    cpu_needed_s: float | None = None  # when others last used more of it than allowed, monotonic
    gpu_needed_s: float | None = None


def decide(readings: Readings, limits: Limits, moment: Moment, before: Standing) -> Standing:
    """Whether the next step may start. While its cause lasts, a pause is kept as it was: with fresh numbers in it, it
    would be news to everyone at every reading.
    """
    if not limits.enabled:
        return Standing()
    standing = replace(
        before,
        cpu_needed_s=_needed_s(readings.cpu_others, limits.others_cpu_percent, moment, before.cpu_needed_s),
        gpu_needed_s=_needed_s(readings.gpu_others, limits.others_gpu_percent, moment, before.gpu_needed_s),
    )
    now = next((found for rule in RULES if (found := rule(readings, limits, moment, standing))), None)
    if now and before.pause and now.cause == before.pause.cause:
        now = before.pause
    return replace(standing, pause=now)


def owners_pause(wish: Wish | None, moment: Moment) -> Pause | None:
    """The pause that the owner asked for, while it lasts. It holds where the limits are switched off too."""
    now_s = moment.local.timestamp()
    if wish is None or wish.kind != "pause" or (wish.until_s is not None and now_s >= wish.until_s):
        return None
    until = "" if wish.until_s is None else f" at {_time_text(wish.until_s, moment)}, or"
    asked = _time_text(wish.asked_at_s, moment)
    return Pause("owner", f"Its owner paused it at {asked}.", f"Work goes on{until} with kseed-edge resume.")


def _time_text(unix_s: float, moment: Moment) -> str:
    local = datetime.fromtimestamp(unix_s)
    return f"{local:%H:%M}" if local.date() == moment.local.date() else f"{local:%Y-%m-%d %H:%M}"


def _needed_s(load: Reading[float], limit: float, moment: Moment, before_s: float | None) -> float | None:
    return moment.now_s if limit and load.value is not None and load.value > limit else before_s


def _is_paused(standing: Standing, cause: Cause) -> bool:
    return standing.pause is not None and standing.pause.cause == cause


def _memory(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    free, floor = readings.memory_available, limits.memory_floor_mb
    enough = floor * MEMORY_FACTOR
    if free.value is None or free.value >= (enough if _is_paused(standing, "memory") else floor):
        return None
    return Pause(
        "memory",
        f"Free memory is {free.value:.0f} MB ({free.source}), under the floor of {floor:.0f} MB.",
        f"Work goes on at {enough:.0f} MB.",
    )


def _disk(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    free, floor = readings.disk_free, limits.disk_floor_mb
    enough = floor * DISK_FACTOR
    if free.value is None or free.value >= (enough if _is_paused(standing, "disk") else floor):
        return None
    return Pause(
        "disk",
        f"Free disk space is {free.value:.0f} MB, under the floor of {floor:.0f} MB.",
        f"Work goes on at {enough:.0f} MB.",
    )


def _heat(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    heat, limit = readings.temperature, limits.temperature_limit_c
    cool = limit - HEAT_MARGIN_C
    if not limit or heat.value is None or heat.value <= (cool if _is_paused(standing, "heat") else limit):
        return None
    return Pause(
        "heat",
        f"The machine is at {heat.value:.0f} °C ({heat.source}), above the limit of {limit:.0f} °C.",
        f"Work goes on at {cool:.0f} °C.",
    )


def _mains(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    if not (limits.pause_on_battery and readings.on_battery.value):
        return None
    charge = readings.battery.value
    at = f" at {charge:.0f}%" if charge is not None else ""
    return Pause(
        "mains",
        f"The machine runs on its battery{at} ({readings.on_battery.source}).",
        "Work goes on when it is plugged in, or with pause_on_battery = false.",
    )


def _charge(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    charge, floor = readings.battery.value, limits.battery_floor_percent
    enough = min(100.0, floor + CHARGE_MARGIN)
    if charge is None or floor == 0 or charge >= (enough if _is_paused(standing, "charge") else floor):
        return None
    return Pause(
        "charge",
        f"The battery is at {charge:.0f}%, under the floor of {floor:.0f}%.",
        f"Work goes on at {enough:.0f}%.",
    )


def _hours(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    allowed, minute = hours.spans(limits.hours), moment.local.hour * 60 + moment.local.minute
    if hours.is_allowed(allowed, minute):
        return None
    return Pause(
        "hours",
        f"It is {moment.local:%H:%M}, outside the allowed hours {limits.hours}.",
        f"Work goes on at {hours.next_start(allowed, minute)}.",
    )


def _metered(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    if not (limits.pause_on_metered and readings.metered.value):
        return None
    return Pause(
        "metered",
        f"The network link costs money ({readings.metered.source}).",
        "Work goes on on another link, or with pause_on_metered = false.",
    )


def _cpu(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    return _needed("cpu", "CPU", readings.cpu_others, limits.others_cpu_percent, standing.cpu_needed_s, limits, moment)


def _gpu(readings: Readings, limits: Limits, moment: Moment, standing: Standing) -> Pause | None:
    return _needed("gpu", "GPU", readings.gpu_others, limits.others_gpu_percent, standing.gpu_needed_s, limits, moment)


def _needed(
    cause: Cause, name: str, load: Reading[float], limit: float, last_s: float | None, limits: Limits, moment: Moment
) -> Pause | None:
    """The processor is others' from when they need it until `quiet_s` after."""
    is_over = load.value is not None and load.value > limit
    if last_s is None or not (is_over or moment.now_s - last_s < limits.quiet_s):
        return None
    used = f"{load.value:.0f}%" if is_over else f"more than {limit:.0f}%"
    return Pause(
        cause,
        f"Other programs use {used} of the {name}, and {limit:.0f}% is the limit.",
        f"Work goes on when they have stayed under it for {_duration(limits.quiet_s)}.",
    )


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes >= 2 and minutes == int(minutes) else f"{seconds:.0f} seconds"


Rule = Callable[[Readings, Limits, Moment, Standing], "Pause | None"]
RULES: tuple[Rule, ...] = (_memory, _disk, _heat, _mains, _charge, _hours, _metered, _cpu, _gpu)  # by weight
