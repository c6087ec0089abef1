"""The fuzzer: `python tests/fuzz/run.py --TARGET FOLDER [libFuzzer options]`. docs/fuzzing.md says how to use it.

Needs atheris (`pip install atheris`, Linux), which kseed does not depend on. FOLDER is filled from the committed corpus
and the golden vectors first. With `keep` as its only option, what covers most in FOLDER becomes the committed corpus.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

# Instrumented code is slow: for each target, what there is to find in it.
INSTRUMENTED = {
    "wire": ["shared.wire", "shared.ranges", "shared.numbers", "shared.changes"],
    "both": ["shared.wire", "shared.ranges", "shared.numbers", "shared.changes", "second_decoder", "second_msgpack"],
    "manifest": ["shared.manifest", "second_maths"],
    "delta": ["shared.delta"],
    "topic": ["shared.topics", "fuzz.targets"],
}
WIRE = ("wire", "both")  # they share a corpus
with atheris.instrument_imports(include=INSTRUMENTED[sys.argv[1].lstrip("-")]):
    from fuzz.mutations import mutated
    from fuzz.targets import FRAMED, TARGETS, WITH_FORMAT, WITH_POOL, WITH_STEPS

    from shared import delta
    from shared.topics import KINDS

VECTORS = HERE.parents[1] / "shared" / "vectors"
MAX_BYTES = 2400
TOPICS = [f"kseed/a-1/{kind}{'/b' if i > 3 else ''}".encode() for i, kind in enumerate(KINDS)]
MANIFESTS = [bytes((way, 0)) + b"lm.embed\t49152,576\nlm.norm\t576\nx\t\n" for way in (1, 2, 3)]
MANIFESTS.append(b"\0\0" + zlib.compress(b"a\t1,2\n", 9))
HEADER = (
    b'{"format":1,"run":"night","version":3,"model":"tiny","dtype":"bf16","directions":"hadamard","seeds":256,'
    b'"pool_key":"0123456789abcdef","manifest_digest":"%064d","base_digest":"%064d","coefficients_sha256":"SHA"}'
) % (0, 0)
DELTAS = [way + b"\0\0" + HEADER.replace(b":256", seeds) for way, seeds in ((b"\0", b":256"), (b"\6", b":255"))]
DELTAS += [b"\0\x80\x7f" + HEADER, b"\1" + delta.MAGIC + bytes((2, 0, 0, 0)) + b"{}"]


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with: the committed corpus and, for the wire, every golden vector."""
    committed = HERE / "corpus" / f"{'wire' if target in WIRE else target}.json"
    found = [bytes.fromhex(text) for text in json.loads(committed.read_text())] if committed.exists() else []
    found += {"topic": TOPICS, "manifest": MANIFESTS, "delta": DELTAS}.get(target, [])
    if target in WIRE:
        for path in sorted((VECTORS / "wire").glob("*.json")):
            vector = json.loads(path.read_text("utf-8"))
            payload, kind = bytes.fromhex(vector["payload_hex"]), KINDS.index(vector["kind"])
            if len(payload) > MAX_BYTES - 2:
                continue
            found.append(bytes((kind, 0)) + payload)
            if payload[:2] == bytes((1, kind + 1)):
                found.append(bytes((kind, FRAMED | WITH_POOL | WITH_FORMAT | WITH_STEPS)) + payload[2:])
    return found


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the mutations are libFuzzer's own, half know MessagePack."""
    rng = random.Random(seed)
    changed = mutated(data, rng) if rng.random() < 0.5 else None
    return changed if changed is not None and len(changed) <= max_size else atheris.Mutate(data, max_size)


def keep(target: str, folder: Path) -> None:
    """Minimise FOLDER (libFuzzer's merge, in a process of its own) into the committed corpus."""
    with tempfile.TemporaryDirectory() as smaller:
        subprocess.run([sys.executable, __file__, f"--{target}", smaller, "-merge=1", str(folder)], check=True)
        found = sorted({path.read_bytes() for path in Path(smaller).iterdir()}, key=lambda data: (len(data), data))
    name = "wire" if target in WIRE else target
    text = json.dumps([data.hex() for data in found], indent=0) + "\n"
    (HERE / "corpus").mkdir(exist_ok=True)
    (HERE / "corpus" / f"{name}.json").write_text(text)
    print(f"{len(found)} inputs, {sum(map(len, found))} bytes")


def main() -> None:
    flag, folder, *options = sys.argv[1:]
    target = flag.lstrip("-")
    if options == ["keep"]:
        keep(target, Path(folder))
        return
    if not Path(folder).is_file() and not any(option.startswith("-merge") for option in options):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for data in seeds(target):
            (Path(folder) / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    custom = {"custom_mutator": mutate} if target in WIRE else {}
    # A merge starts the first of these again, in a shell; libFuzzer leaves what begins with -- alone.
    atheris.Setup(
        [f"{sys.executable} {__file__}", flag, folder, f"-max_len={MAX_BYTES}", *options], TARGETS[target], **custom
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
