"""Whether two hosts have the same model: a few words about a model's files that are cheap to find out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .names import part_names

HEAD_BYTES = 1 << 20
PIECES, PIECE_BYTES = 64, 4096  # of each file, evenly spread
_MEANINGFUL = (".safetensors", ".json", ".model", ".gguf", ".txt", ".jinja")


def fingerprint(path: Path) -> str:
    """Files, bytes and a hash of a .gguf file (with all its parts) or of a model's folder. The hash is of the sizes, of
    each file's beginning and of pieces of the rest, so it takes milliseconds and misses a change between the pieces."""
    digest, total, files = hashlib.sha256(), 0, _files(path)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.suffix if len(files) == 1 else file.name}\0{size}\0".encode())
        with open(file, "rb") as data:
            digest.update(data.read(HEAD_BYTES))
            for piece in range(1, PIECES + 1):
                digest.update(os.pread(data.fileno(), PIECE_BYTES, max(0, size * piece // PIECES - PIECE_BYTES)))
        total += size
    return f"{len(files)} file{'s' * (len(files) > 1)} of {total} bytes, hash {digest.hexdigest()[:16]}"


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and file.suffix in _MEANINGFUL)
    return [path.parent / name for name in part_names(path.name)]
