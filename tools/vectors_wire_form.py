"""What the golden vectors of the wire are made of: a scenario, and one good message of most kinds.

Zlib streams are written by hand: compressors differ between builds of zlib.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field
from typing import Any

from shared.messages import Everyone, Message, NormalisedStep, Plan, Presence, Run, Update
from shared.refusals import Refusal
from shared.topics import Kind
from shared.wire import scalars_to_bytes

Json = dict[str, Any]
NONCE = bytes(range(16))
MODEL_DIGEST = bytes(range(0xA0, 0xB0))
MANIFEST_TEXT = b"embed.weight\t11,3\nnorm.weight\t3\n"
MANIFEST_DIGEST = hashlib.sha256(MANIFEST_TEXT).digest()
BASE_DIGEST = bytes(range(0x40, 0x60))


@dataclass(frozen=True)
class Scenario:
    """A payload, what its reader knows, and what it must come to: `message` or `refusal`."""

    name: str
    about: str
    kind: Kind
    payload: bytes
    message: Message | None = None
    refusal: Refusal | None = None
    context: Json = field(default_factory=dict)
    is_canonical: bool = True  # encode(message) gives these very bytes


def stored(text: bytes) -> bytes:
    """A zlib stream of `text` without compression."""
    length = len(text).to_bytes(2, "little")
    inverted = (len(text) ^ 0xFFFF).to_bytes(2, "little")
    return b"\x78\x01\x01" + length + inverted + text + zlib.adler32(text).to_bytes(4, "big")


RUN = Run(
    run="first-run",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    dtype="bf16",
    directions="hadamard",
    seeds=4096,
    pool_key=0x0123_4567_89AB_CDEF,
    manifest=stored(MANIFEST_TEXT),
    manifest_digest=MANIFEST_DIGEST,
    base_digest=BASE_DIGEST,
    scalar_format="f16",
    change_format="f16",
    first_order=True,
)
PLAN = Plan(
    round=7,
    phase="open",
    nonce=NONCE,
    local_steps=200,
    one_sided=0,
    batch_size=8,
    eps=1e-3,
    step=NormalisedStep(step_rms=1e-3, clip=3.0, decay=0.99, prior_mean_square=2.25, prior_count=600),
    participation=Everyone(),
    common_seeds=False,
    levels=None,
    evaluate=True,
    published_at_ms=1_760_000_000_000,
    deadline_s=120.0,
    reason="",
    change=None,
)
UPDATE = Update(
    round=7,
    samples=812,
    train_loss=2.5,
    held_out_loss=2.625,
    held_out_accuracy=0.75,
    model_digest=MODEL_DIGEST,
    scalars=scalars_to_bytes([1.5, -0.25, 0.0], "f16"),
    change=None,
)
PRESENCE = Presence(
    online=True, session=0xFEDC_BA98_7654_3210, protocol_min=1, protocol_max=1, agent="kseed 0.1.0", note=""
)
