"""What the fuzzer has found worth keeping, played again, and a short fuzz of its own (docs/fuzzing.md)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fuzz.mutations import mutated
from fuzz.targets import TARGETS, frame

from shared.refusals import Refusal
from shared.topics import KINDS
from tools.vectors_wire import outcome

FOLDER = Path(__file__).with_name("fuzz") / "corpus"
CORPUS = {path.stem: [bytes.fromhex(text) for text in json.loads(path.read_text())] for path in FOLDER.glob("*.json")}
CORPUS["both"] = CORPUS["wire"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_of_the_corpus_holds(target):
    assert CORPUS[target]
    for data in CORPUS[target]:
        TARGETS[target](data)


@pytest.mark.parametrize("target", ["wire", "both"])
def test_mutations_of_the_corpus_hold(target):
    rng = random.Random(2)
    for data in CORPUS[target] * 12:
        TARGETS[target](mutated(data, rng) or data[: rng.randrange(len(data) + 1)])


def test_the_corpus_reaches_every_kind_and_every_way_to_refuse_a_payload():
    found = [(kind, outcome(kind, payload, context)) for kind, payload, context in map(frame, CORPUS["wire"])]
    assert {kind for kind, came_to in found if "message" in came_to} == set(KINDS)
    by_rounds = {"ACCEPTED", "DUPLICATE", "RETAINED", "UNKNOWN_RUN", "STALE_ROUND", "FUTURE_ROUND", "NOT_SELECTED"}
    by_rounds |= {"CONFLICT", "RUN_CLOSED", "DIVERGED", "BUSY", "STORAGE", "FIRST_ORDER", "LARGE_CHANGE"}
    assert {came_to.get("refusal") for _, came_to in found} - {None} == {code.name for code in Refusal} - by_rounds


def test_the_corpus_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
