"""Golden vectors of the wire, one scenario per file under shared/vectors/wire/ (PROTOCOL.md, section 11).

What a scenario must come to is stated by hand, in `tools.vectors_wire_accepted` and `tools.vectors_wire_refused`;
making a vector checks that this code agrees.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.changes import read_change
from shared.errors import PeerError
from shared.messages import Change, Message, NumberFormat, Plan, Snapshot, Update
from shared.numbers import NUMBER_BYTES
from shared.refusals import Refusal
from shared.topics import Kind
from shared.wire import coefficients_from_bytes, decode, scalars_from_bytes
from tools.vectors_wire_accepted import accepted
from tools.vectors_wire_form import Json, Scenario
from tools.vectors_wire_refused import refused


def outcome(kind: Kind, payload: bytes, context: Json) -> Json:
    """What reading `payload` comes to, as `expect` in a vector."""
    try:
        message = decode(kind, payload, limit_bytes=context.get("limit_bytes"))
        return {"message": plain(message), **_numbers(message, context)}
    except PeerError as error:
        return {"refusal": error.refusal.name}


def plain(value: object) -> Any:
    """`value` in JSON's types: bytes as hex, messages as objects, choices with their tag."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, msgspec.Struct):
        fields = {name: plain(getattr(value, name)) for name in value.__struct_fields__}
        tag = value.__struct_config__.tag
        return fields if tag is None else {"tag": tag, **fields}
    return value


def wire_vectors() -> dict[str, object]:
    """File name under shared/vectors/wire/ -> its content."""
    vectors: dict[str, object] = {}
    for scenario in (*accepted(), *refused()):
        if f"{scenario.name}.json" in vectors:
            raise ValueError(f"two vectors are named {scenario.name}")
        vectors[f"{scenario.name}.json"] = _vector(scenario)
    return vectors


def _vector(scenario: Scenario) -> Json:
    expect = outcome(scenario.kind, scenario.payload, scenario.context)
    if scenario.refusal is not None:
        agrees = expect == {"refusal": scenario.refusal.name}
    else:
        agrees = expect.get("message") == plain(scenario.message)
    if not agrees:
        raise AssertionError(f"vector {scenario.name} came to {str(expect)[:300]}")
    vector: Json = {
        "name": scenario.name,
        "about": scenario.about,
        "kind": scenario.kind,
        "payload_hex": scenario.payload.hex(),
        "context": scenario.context,
        "expect": expect,
    }
    if not scenario.is_canonical:
        vector["canonical"] = False
    return vector


def _numbers(message: Message, context: Json) -> Json:
    """The numbers in bytes fields (section 4, step 7), as far as the context lets them be read."""
    if isinstance(message, Update) and message.change is not None:
        return _change(message.change, context.get("scalar_format"), context, None)
    if isinstance(message, Plan) and message.change is not None:
        return _change(message.change, context.get("change_format"), context, context.get("known_seeds"))
    if isinstance(message, Update) and "scalar_format" in context:
        return {"scalars": _scalars(message.scalars, context).tolist()}
    if isinstance(message, Snapshot) and "seeds" in context:
        return {"coefficients": coefficients_from_bytes(message.coefficients, context["seeds"]).tolist()}
    return {}


def _change(change: Change, form: NumberFormat | None, context: Json, known: list[int] | None) -> Json:
    if form is None or "seeds" not in context:
        return {}
    seeds, values = read_change(change, form, context["seeds"], None if known is None else np.array(known, np.int64))
    return {"seeds": seeds.tolist(), "values": values.tolist()}


def _scalars(data: bytes, context: Json) -> NDArray[np.float32]:
    size = NUMBER_BYTES[context["scalar_format"]]
    if len(data) % size == 0 and len(data) // size > context.get("local_steps", len(data)):
        raise PeerError(Refusal.SCALAR_COUNT, "more scalars than local steps")
    return scalars_from_bytes(data, context["scalar_format"])
