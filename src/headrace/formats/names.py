"""Names of model files: the parts of a split one, and what stays inside its folder."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ModelFileError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def part_of(name: str) -> tuple[int, int] | None:
    """(number from 1, count) of a GGUF file named `...-00001-of-00003.gguf`; None for other names."""
    match = _PART.fullmatch(name)
    return (int(match[2]), int(match[3])) if match and 1 <= int(match[2]) <= int(match[3]) else None


def part_names(name: str) -> list[str]:
    """The names of all parts of a split GGUF file, in order; the name itself where it is of no split file."""
    part, match = part_of(name), _PART.fullmatch(name)
    if part is None or match is None:
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, part[1] + 1)]


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder. What leads out of it is refused, but for the blobs of a Hugging Face cache."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not name or Path(name).name != name or "\0" in name or not name.endswith((".safetensors", ".json", ".gguf")):
        raise ModelFileError(
            folder, f"file name {name!r:.200}", "must be the plain name of a .safetensors file in the model's folder"
        )
    target = (root / name).resolve()
    if target.parent not in (root, blobs):
        raise ModelFileError(folder / name, "file", f"leads out of its folder, to {target}")
    return folder / name
