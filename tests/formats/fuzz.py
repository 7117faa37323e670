"""Damaged model files until the time is up: python tests/formats/fuzz.py --minutes 10 [--seed 1] [--keep FOLDER]

Each file is a whole small model (GGUF, in parts or not, or a Hugging Face folder, quantised or not) with a few changes,
opened as a user does: header, tokenizer, chat template, weights. No crash, no hang, no error without a type, no more
than twice its size in memory. What breaks a rule is kept and printed; the exit code is the number of rules broken, at
most 100.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.formats.hostile import Examiner, complaint, contents, size_of, write_folder, write_gguf
from tests.tiny import write_tiny

EDGES = [
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    33,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
JSON_BITS = [
    b"0",
    b"-1",
    b"9" * 30,
    b"1e999",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"[" * 2000,
    b'"a"',
    b",",
    b"}",
    b"NaN",
]
HEADER_BYTES = 16384  # where a GGUF's and a safetensors' structure is


def seeds(folder: Path) -> list[Path]:
    """Whole models: a GGUF in two types, one in parts, two folders."""
    paths = [
        write_tiny(folder / f"{kind}.gguf", kind, layers=1, heads=2, kv_heads=1, ffn=64) for kind in ("F16", "Q4_1")
    ]
    metadata, tensors = contents(paths[1])
    (folder / "parts").mkdir()
    names = list(tensors)
    for number, chosen in enumerate((names[:4], names[4:])):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        part = folder / "parts" / f"m-{number + 1:05d}-of-00002.gguf"
        write_gguf(part, metadata | split if number == 0 else split, {name: tensors[name] for name in chosen})
    return [*paths, folder / "parts", write_folder(folder / "plain"), write_folder(folder / "gptq", quantised=True)]


def change_bytes(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(min(len(data), HEADER_BYTES) if rng.random() < 0.9 else len(data))
    data[at : at + rng.randint(1, 4)] = rng.randbytes(rng.randint(1, 4))


def set_number(data: bytearray, rng: random.Random) -> None:
    at, value = rng.randrange(max(1, min(len(data), HEADER_BYTES) - 8)), rng.choice(EDGES)
    width, form = rng.choice([(8, "<Q"), (4, "<I"), (2, "<H")])
    data[at : at + width] = struct.pack(form, value % 2 ** (8 * width))


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def repeat(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randrange(min(len(data), HEADER_BYTES)), rng.choice([1, 4, 8, 64, 512])
    data[at:at] = data[at : at + size] * rng.choice([1, 2, 100])


def remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(min(len(data), HEADER_BYTES))
    del data[at : at + rng.choice([1, 4, 8, 64])]


def set_float(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, -0.0]))


def change_json(data: bytearray, rng: random.Random) -> None:
    places = [i for i in range(min(len(data), HEADER_BYTES)) if data[i : i + 1] in (b":", b",", b"[", b"{")]
    if places:
        at = rng.choice(places) + 1
        end = next((i for i in range(at, len(data)) if data[i : i + 1] in (b",", b"}", b"]")), at)
        data[at : end if rng.random() < 0.7 else at] = rng.choice(JSON_BITS)


CHANGES: list[Callable[[bytearray, random.Random], None]] = [
    change_bytes, change_bytes, set_number, set_number, set_number, cut, repeat, remove, set_float, change_json,
]  # fmt: skip


def damage(path: Path, rng: random.Random) -> None:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        text = file.suffix == ".json" or (file.suffix == ".safetensors" and rng.random() < 0.5)
        change = change_json if text and rng.random() < 0.8 else rng.choice(CHANGES)
        if data:
            change(data, rng)
        file.write_bytes(data)


def main(minutes: float, seed: int, keep: Path, limit: int | None = None) -> int:
    """The number of rules broken, in so many minutes or after `limit` files."""
    rng, broken, outcomes = random.Random(seed), 0, collections.Counter()
    with tempfile.TemporaryDirectory() as name, Examiner() as examiner:
        folder = Path(name)
        whole = seeds(folder)
        for path in whole:
            target = path / "m-00001-of-00002.gguf" if path.name == "parts" else path
            assert (answer := examiner.examine(target))["outcome"] == "loads", answer
        end, count, slowest, largest = time.monotonic() + 60 * minutes, 0, 0.0, 0
        while time.monotonic() < end and count != limit:
            count += 1
            original = rng.choice(whole)
            path = folder / "case" / original.name
            shutil.rmtree(path.parent, ignore_errors=True)
            path.parent.mkdir()
            (shutil.copytree if original.is_dir() else shutil.copy)(original, path)
            damage(path, rng)
            target = path / "m-00001-of-00002.gguf" if path.name == "parts" else path
            answer, size = examiner.examine(target), size_of(path)
            outcomes[answer["outcome"]] += 1
            slowest, largest = max(slowest, answer["seconds"]), max(largest, answer["bytes"] - 2 * size)
            if problem := complaint(answer, size):
                broken += 1
                kept = keep / f"{seed}-{count}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(path.parent, kept)
                print(f"{kept}: {problem}", flush=True)
    print(
        f"seed {seed}: {count} files, {broken} rules broken; {dict(outcomes)}; slowest {slowest:.2f} s, at most "
        f"{max(0, largest) >> 20} MiB over twice the size"
    )
    return min(broken, 100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-findings")
    given = parser.parse_args()
    sys.exit(main(given.minutes, given.seed, given.keep))
