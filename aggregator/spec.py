"""What a run is, for its whole life: the facts that devices see, the settings, and the key of its nonces."""

from __future__ import annotations

import hashlib

import msgspec

from aggregator.config import RunConfig
from shared.errors import UserError
from shared.manifest import RunBase
from shared.messages import Everyone, Listed, Participation, Run, Threshold
from shared.topics import check_id
from shared.wire import encode, update_limit_bytes

KEY_BYTES = 32


class Spec(msgspec.Struct, frozen=True):
    """A run as `create` made it. Nothing in it ever changes."""

    facts: Run
    config: RunConfig
    nonce_key: bytes  # 32 random bytes; knowing them means knowing every later selection and draw

    @property
    def name(self) -> str:
        """The run's id."""
        return self.facts.run

    @property
    def update_limit_bytes(self) -> int:
        """The longest update that this run takes."""
        return update_limit_bytes(self.config.local_steps, self.facts)


def new_spec(name: str, base: RunBase, config: RunConfig, *, pool_key: int, nonce_key: bytes) -> Spec:
    """The run `name` on the model that `base` describes. The keys come from the caller: randomness is an argument.

    Raises UserError where the name, the dtype or the size of the manifest is impossible.
    """
    check_id("the run's name", name)
    if config.dtype not in (None, base.dtype):
        raise UserError(
            f"the run wants dtype {config.dtype}, the base file was made for {base.dtype}; "
            f"make it again with `kseed manifest --dtype {config.dtype}`, or create the run with --dtype {base.dtype}."
        )
    if len(nonce_key) != KEY_BYTES:
        raise UserError(f"the nonce key has {len(nonce_key)} bytes; it must have {KEY_BYTES}.")
    facts = Run(
        run=name,
        model=base.model,
        dtype=base.dtype,
        directions=config.directions,
        seeds=config.seeds,
        pool_key=pool_key,
        manifest=base.manifest.pack(),
        manifest_digest=base.manifest.digest(),
        base_digest=base.base_digest,
        scalar_format=config.scalar_format,
        change_format=config.change_format,
        first_order=config.first_order == "accept",
    )
    encode(facts)  # raises where the wire could not carry it
    return Spec(facts, config, nonce_key)


def nonce(spec: Spec, round_number: int) -> bytes:
    """The plan's nonce of a round: SHA-256(nonce key + round as u64, little-endian), first 16 bytes."""
    return hashlib.sha256(spec.nonce_key + round_number.to_bytes(8, "little")).digest()[:16]


def selected_part(config: RunConfig, online: int) -> float:
    """The part of the fleet that a new round selects, with so many devices online (0: nobody knows).

    Over-selection: `over_selection` times the quorum of those online, so that a round need not wait for the slowest.
    """
    if not config.over_selection:
        return config.participation
    return min(1.0, config.over_selection * config.quorum / online) if online else 1.0


def participation(config: RunConfig, part: float, extensions: int) -> Participation:
    """Who takes part in a round that selects `part` of the fleet, after so many extensions of the round.

    Each extension doubles the selected part of the fleet: the same nonce would select the same devices for ever,
    and those may be gone. Devices that were selected stay selected.
    """
    if config.devices:
        return Listed(config.devices)
    part *= 2.0 ** min(extensions, 64)
    return Everyone() if part >= 1.0 else Threshold(below=int(part * 2**32))
