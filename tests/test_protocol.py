"""PROTOCOL.md against the code: fields in order, limits, kind numbers, topics. Receipt codes: test_refusals."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

import shared
from shared import messages, ranges, seeds, wire
from shared.topics import KINDS, PER_DEVICE, Topic

TEXT = (Path(shared.__file__).parent / "PROTOCOL.md").read_text("utf-8")
CHAPTERS = re.split(r"^### 5\.\d ", TEXT.split("\n## 6.")[0], flags=re.MULTILINE)[1:]
SECTIONS = dict(zip((*KINDS, "change"), CHAPTERS, strict=True))
TYPES = {kind: getattr(messages, kind.capitalize()) for kind in SECTIONS}


@pytest.mark.parametrize("kind", SECTIONS)
def test_fields_stand_in_the_specification_in_order(kind):
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", SECTIONS[kind], re.MULTILINE)
    assert [name for _, name in rows] == list(TYPES[kind].__struct_fields__)
    assert [int(number) for number, _ in rows] == list(range(len(rows)))


@pytest.mark.parametrize("choice", [messages.StepRule, messages.Participation])
def test_choices_stand_in_the_specification_with_their_fields(choice):
    rows = re.findall(r"^\| (`\w+`)? ?\| (?:none|(\w+): \w+)", SECTIONS["plan"], re.MULTILINE)
    written: dict[str, list[str]] = {}
    for name, field in rows:
        if name:
            written[name.strip("`")] = []
        written[list(written)[-1]] += [field] if field else []
    for alternative in typing.get_args(choice):
        assert written[alternative.__struct_config__.tag] == list(alternative.__struct_fields__)


@pytest.mark.parametrize("kind", KINDS)
def test_kind_numbers_and_limits_are_those_of_the_specification(kind):
    title = SECTIONS[kind].split("\n")[0]
    number, limit = re.match(r"\w+ — kind (\d), at most ([0-9,]+) bytes", title).groups()
    assert (int(number), int(limit.replace(",", ""))) == (wire.KIND_NUMBERS[kind], wire.LIMIT_BYTES[kind])
    assert f"{kind} {number}" in TEXT.split("## 5.")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_topics_are_those_of_the_specification(kind):
    device = "<device>" if kind in PER_DEVICE else None
    assert f"| `{Topic('<run>', kind, device)}` | {kind} |" in TEXT


def test_numbers_named_in_the_specification_are_those_of_the_code():
    assert f"sum is {seeds.level_weights().sum()}" in TEXT
    assert f"at most {ranges.MAX_LISTED_DEVICES:,} ids" in TEXT
    assert f"1 to {ranges.MAX_MANIFEST_BYTES:,} bytes" in TEXT
    assert f"1 to {ranges.MAX_LOCAL_STEPS:,}" in TEXT and f"1 to {ranges.MAX_BATCH_SIZE:,}" in TEXT
    assert f"at most {ranges.MAX_DEADLINE_S:,.0f} " in TEXT
    for longest in (ranges.MAX_NAME, ranges.MAX_REASON, ranges.MAX_DETAIL, ranges.MAX_NOTE):
        assert f"at most {longest} characters" in TEXT
