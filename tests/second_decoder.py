"""A second reader of the wire, written from PROTOCOL.md alone: it imports nothing of kseed, numpy or msgpack.

`outcome(kind, payload, context)` gives what section 11 calls `expect`. Sections are PROTOCOL.md's.
"""

from __future__ import annotations

import math
import re

from second_changes import WIDTHS, finite
from second_changes import read as read_change
from second_msgpack import Refused, need, unpack

LIMITS = {  # section 5
    "run": 1_052_672,
    "plan": 399_360,
    "snapshot": 262_208,
    "update": 262_224,
    "receipt": 4_096,
    "presence": 4_096,
}
KIND_NUMBERS = {"run": 1, "plan": 2, "snapshot": 3, "update": 4, "receipt": 5, "presence": 6}
CODES = {0, 1, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24, 25, 30, 31, 32, 33, 34, 35, 36, 37, 40, 41}  # section 6
POOLS = {1 << bits for bits in range(8, 17)}


def outcome(kind, payload, context):
    """What reading `payload` from a topic of `kind` comes to, knowing `context`."""
    try:
        message = read(kind, payload, context.get("limit_bytes"))
        return {"message": in_json(message), **numbers(kind, message, context)}
    except Refused as refused:
        return {"refusal": refused.args[0]}


def read(kind, payload, limit=None):
    """Section 4, steps 1 to 6: {field: value}."""
    need(len(payload) <= min(LIMITS[kind], LIMITS[kind] if limit is None else limit), "OVERSIZED")
    need(payload)
    need(payload[0] == 1, "UNSUPPORTED_VERSION")
    need(len(payload) >= 2)
    need(payload[1] == KIND_NUMBERS[kind], "WRONG_KIND")
    value, end = unpack(payload, 2, 0)
    need(end == len(payload))
    message = typed(value, FIELDS[kind])
    check_finite(message)
    RANGES[kind](message)
    return message


# Section 5: fields and types.

INT, FLOAT, BOOL, TEXT, BYTES, TEXTS = "int", "float", "bool", "text", "bytes", "texts"
STEPS = {
    "plain": [("lr", FLOAT)],
    "normalised": [
        ("step_rms", FLOAT),
        ("clip", FLOAT),
        ("decay", FLOAT),
        ("prior_mean_square", FLOAT),
        ("prior_count", INT),
    ],
}
SELECTIONS = {"everyone": [], "threshold": [("below", INT)], "listed": [("devices", TEXTS)]}
CHANGE = ("record", [("seeds", [BYTES]), ("exponent", INT), ("values", BYTES)])
FORMATS = ("f32", "f16", "f8")
FIELDS = {
    "run": [
        ("run", TEXT),
        ("model", TEXT),
        ("dtype", ("bf16", "fp16", "fp32")),
        ("directions", ("hadamard", "rademacher", "gaussian")),
        ("seeds", INT),
        ("pool_key", INT),
        ("manifest", BYTES),
        ("manifest_digest", BYTES),
        ("base_digest", BYTES),
        ("scalar_format", FORMATS),
        ("change_format", FORMATS),
        ("first_order", BOOL),
    ],
    "plan": [
        ("round", INT),
        ("phase", ("open", "paused", "finished")),
        ("nonce", BYTES),
        ("local_steps", INT),
        ("one_sided", INT),
        ("batch_size", INT),
        ("eps", FLOAT),
        ("step", STEPS),
        ("participation", SELECTIONS),
        ("common_seeds", BOOL),
        ("levels", [BYTES]),
        ("evaluate", BOOL),
        ("published_at_ms", INT),
        ("deadline_s", FLOAT),
        ("reason", TEXT),
        ("change", [CHANGE]),
    ],
    "snapshot": [("version", INT), ("coefficients", BYTES)],
    "update": [
        ("round", INT),
        ("samples", INT),
        ("train_loss", FLOAT),
        ("held_out_loss", [FLOAT]),
        ("held_out_accuracy", [FLOAT]),
        ("model_digest", BYTES),
        ("scalars", BYTES),
        ("change", [CHANGE]),
    ],
    "receipt": [("round", INT), ("code", INT), ("detail", TEXT)],
    "presence": [
        ("online", BOOL),
        ("session", INT),
        ("protocol_min", INT),
        ("protocol_max", INT),
        ("agent", TEXT),
        ("note", TEXT),
    ],
}
PYTHON_TYPES = {INT: int, BOOL: bool, TEXT: str, BYTES: bytes}


def typed(values, fields):
    need(type(values) is list and len(values) == len(fields))
    return {name: convert(value, wanted) for value, (name, wanted) in zip(values, fields, strict=True)}


def convert(value, wanted):
    if type(wanted) is list:  # or nil
        return None if value is None else convert(value, wanted[0])
    if type(wanted) is tuple and wanted[0] == "record":
        return typed(value, wanted[1])
    if type(wanted) is tuple:  # one of these names
        need(type(value) is str and value in wanted)
        return value
    if type(wanted) is dict:  # a choice
        need(type(value) is list and value and type(value[0]) is str and value[0] in wanted)
        return {"tag": value[0], **typed(value[1:], wanted[value[0]])}
    if wanted == FLOAT:
        need(type(value) in (int, float))
        return float(value)
    if wanted == TEXTS:
        need(type(value) is list and all(type(item) is str for item in value))
        return value
    need(type(value) is PYTHON_TYPES[wanted])
    return value


def check_finite(message):
    for value in message.values():
        if type(value) is dict:
            check_finite(value)
        need(type(value) is not float or math.isfinite(value), "NON_FINITE")


# Section 5: ranges.


def is_id(value):
    return re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?", value) is not None


def check_run(run):
    need(is_id(run["run"]) and len(run["model"]) <= 256)
    need(run["seeds"] in POOLS and run["pool_key"] >= 0)
    need(1 <= len(run["manifest"]) <= 1_048_576)
    need(len(run["manifest_digest"]) == len(run["base_digest"]) == 32)


def check_plan(plan):
    need(0 <= plan["round"] <= 2**32 - 2 and len(plan["nonce"]) == 16)
    need(1 <= plan["local_steps"] <= 16_384 and 1 <= plan["batch_size"] <= 4_096)
    need(plan["one_sided"] == 0 or (2 <= plan["one_sided"] <= 64 and plan["local_steps"] % plan["one_sided"] == 0))
    need(1e-30 <= plan["eps"] <= 1)
    step, selection = plan["step"], plan["participation"]
    if step["tag"] == "plain":
        need(0 < step["lr"] <= 1)
    else:
        need(0 < step["step_rms"] <= 1e6 and 0 < step["clip"] <= 1e6 and 0 <= step["decay"] < 1)
        need(step["prior_mean_square"] >= 0 and 0 <= step["prior_count"] < 2**32)
        need(step["prior_count"] > 0 or step["prior_mean_square"] == 0)
    if selection["tag"] == "threshold":
        need(0 <= selection["below"] <= 2**32)
    elif selection["tag"] == "listed":
        need(len(selection["devices"]) <= 1_024 and all(map(is_id, selection["devices"])))
    need(plan["levels"] is None or len(plan["levels"]) in POOLS)
    need(0 <= plan["published_at_ms"] < 2**53 and 0 < plan["deadline_s"] <= 31_536_000)
    need(len(plan["reason"]) <= 512)
    check_change(plan["change"])


def check_snapshot(snapshot):
    need(0 <= snapshot["version"] < 2**32)
    need(len(snapshot["coefficients"]) in {4 * pool for pool in POOLS})


def check_change(change):
    if change is None:
        return
    seeds = change["seeds"] or b""
    need(len(seeds) % 2 == 0 and len(seeds) <= 131_072)
    need(-160 <= change["exponent"] <= 127 and len(change["values"]) <= 262_144)


def check_update(update):
    need(0 <= update["round"] <= 2**32 - 2)
    need(1 <= update["samples"] < 2**32, "WEIGHT_OUT_OF_RANGE")
    need(update["held_out_accuracy"] is None or 0 <= update["held_out_accuracy"] <= 1)
    need(len(update["model_digest"]) == 16)
    check_change(update["change"])
    need(update["change"] is None or not update["scalars"])
    need(update["change"] is not None or update["scalars"], "SCALAR_COUNT")
    need(len(update["scalars"]) <= 65_536)


def check_receipt(receipt):
    need(0 <= receipt["round"] < 2**32 and receipt["code"] in CODES and len(receipt["detail"]) <= 512)


def check_presence(presence):
    need(presence["session"] >= 0 and 1 <= presence["protocol_min"] <= presence["protocol_max"] <= 255)
    need(len(presence["agent"]) <= 256 and len(presence["note"]) <= 256)


RANGES = {
    "run": check_run,
    "plan": check_plan,
    "snapshot": check_snapshot,
    "update": check_update,
    "receipt": check_receipt,
    "presence": check_presence,
}


# Section 4, step 7, and section 11.


def numbers(kind, message, context):
    pool, form = context.get("seeds"), context.get("change_format" if kind == "plan" else "scalar_format")
    if message.get("change") is not None:
        if pool is None or form is None:
            return {}
        known = context.get("known_seeds") if kind == "plan" else None
        return dict(zip(("seeds", "values"), read_change(message["change"], form, pool, known), strict=True))
    if kind == "update" and form is not None:
        need(len(message["scalars"]) % WIDTHS[form] == 0)
        need(len(message["scalars"]) // WIDTHS[form] <= context.get("local_steps", 16_384 * 4), "SCALAR_COUNT")
        return {"scalars": finite(message["scalars"], form)}
    if kind == "snapshot" and pool is not None:
        need(len(message["coefficients"]) == 4 * pool, "COEFFICIENT_COUNT")
        return {"coefficients": finite(message["coefficients"], "f32")}
    return {}


def in_json(value):
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: in_json(item) for name, item in value.items()}
    return value
