from __future__ import annotations

import json
from pathlib import Path

import pytest

import shared
from shared.errors import UserError
from shared.refusals import Refusal
from shared.topics import KINDS
from tools.vectors import vector_files, vectors

COMMITTED = Path(shared.__file__).parent / "vectors"
FILES = vector_files()
WIRE = {path: json.loads(content) for path, content in FILES.items() if path.startswith("wire/")}


def run(*, check: bool, out: Path | None) -> tuple[int, list[str]]:
    said: list[str] = []
    return vectors(check=check, out=out, say=said.append), said


def test_committed_vectors_are_those_of_this_version():
    assert run(check=True, out=None) == (0, [f"{len(FILES)} vectors are as in {COMMITTED}"])


def test_check_names_each_file_that_drifted_and_changes_nothing(tmp_path):
    assert run(check=False, out=tmp_path)[0] == 0
    changed, missing, stranger = (
        tmp_path / "wire/plan-paper.json",
        tmp_path / "wire/run.json",
        tmp_path / "maths/x.json",
    )
    changed.write_bytes(changed.read_bytes().replace(b"3e-07", b"4e-07"))
    missing.unlink()
    stranger.write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    code, said = run(check=True, out=tmp_path)
    assert code == 1
    assert said == [
        "differs: wire/plan-paper.json",
        "missing: wire/run.json",
        "not a vector of this version: maths/x.json",
        f"3 of {len(FILES)} vectors drifted from {tmp_path}",
    ]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_writing_mends_what_drifted_but_deletes_nothing_of_the_user(tmp_path):
    (tmp_path / "wire").mkdir()
    (tmp_path / "wire/run.json").write_text("{}")
    (tmp_path / "wire/mine.json").write_text("{}")
    assert run(check=False, out=tmp_path) == (0, [f"{len(FILES)} vectors in {tmp_path}"])
    assert (tmp_path / "wire/run.json").read_bytes() == FILES["wire/run.json"]
    assert (tmp_path / "wire/mine.json").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "wire").write_text("a file where a folder must be")
    with pytest.raises(UserError, match=r"cannot use .*wire.*Choose another --out\."):
        run(check=False, out=tmp_path)


def test_at_least_half_of_the_wire_vectors_are_refusals():
    assert 2 * sum("refusal" in vector["expect"] for vector in WIRE.values()) >= len(WIRE)


def test_wire_vectors_cover_every_kind_and_every_code_that_reading_can_give():
    assert {vector["kind"] for vector in WIRE.values() if "message" in vector["expect"]} == set(KINDS)
    given_by_rounds = {
        "RETAINED",
        "UNKNOWN_RUN",
        "STALE_ROUND",
        "FUTURE_ROUND",
        "NOT_SELECTED",
        "CONFLICT",
        "RUN_CLOSED",
    }
    given_by_rounds |= {"ACCEPTED", "DUPLICATE", "DIVERGED", "BUSY", "STORAGE", "FIRST_ORDER", "LARGE_CHANGE"}
    found = {vector["expect"].get("refusal") for vector in WIRE.values()} - {None}
    assert found == {code.name for code in Refusal} - given_by_rounds


def test_a_vector_carries_its_file_name():
    assert all(path == f"wire/{vector['name']}.json" for path, vector in WIRE.items())
