"""The wire's golden vectors against `second_decoder`, written from PROTOCOL.md alone, and both decoders on noise."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from second_decoder import outcome as second_outcome

from tools.vectors_wire import outcome as first_outcome

VECTORS = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted((Path(__file__).parents[1] / "shared" / "vectors" / "wire").glob("*.json"))
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_second_decoder_agrees(name):
    vector = VECTORS[name]
    found = second_outcome(vector["kind"], bytes.fromhex(vector["payload_hex"]), vector["context"])
    assert found == vector["expect"]


SECOND = ["second_changes", "second_decoder", "second_maths", "second_msgpack", "second_worth"]


@pytest.mark.parametrize("module", SECOND)
def test_the_second_implementation_stands_alone(module):
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text("utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names <= {"second_changes", "second_msgpack"}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_both_decoders_agree_on_damaged_payloads(data):
    vector = VECTORS[data.draw(st.sampled_from(sorted(VECTORS)))]
    payload = bytearray.fromhex(vector["payload_hex"])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(payload) - 1)))
        payload[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    damaged = bytes(payload)
    expected = second_outcome(vector["kind"], damaged, vector["context"])
    assert first_outcome(vector["kind"], damaged, vector["context"]) == expected
