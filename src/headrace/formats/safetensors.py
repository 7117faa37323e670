"""Hugging Face checkpoints: safetensors files, single or in shards, as named tensors, and the JSON beside them.

    header length (8 bytes) | JSON: {name: {dtype, shape, data_offsets}, "__metadata__": {...}} | data, without gaps

Checkpoints that are pickles (.bin, .pt, .pth) can run any code when they are read, so they are refused.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from .names import inside
from .tensor import STORED_TYPES, Tensor, make_tensor, map_file

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
MAX_DIMS = 8
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE_REFUSAL = (
    "is a pickle, which can run any code when it is read; convert it once, where you trust it: load it with "
    "transformers and call save_pretrained(folder, safe_serialization=True)"
)

_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "I8", "U8", "BOOL", "I16", "I32", "I64", "F64")


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """An open checkpoint. `path` is the file, or the folder of shards; `metadata` is the writer's own notes."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Map the tensors of a .safetensors file, or of a folder with one file or with shards and their index.

    Raises ModelNotFoundError where there is nothing, ModelFileError where a file is malformed, UnsupportedModelError
    for pickles and for tensors of a type that is not known.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise UnsupportedModelError(f"{path}: {PICKLE_REFUSAL}")
    if not path.is_dir():
        return _open_file(path)
    if (path / SINGLE_NAME).exists():
        return _open_file(inside(path, SINGLE_NAME))
    if (path / INDEX_NAME).exists():
        return _open_shards(path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _open_file(inside(path, files[0].name))
    if files:
        raise ModelNotFoundError(
            f"{path}: has {len(files)} .safetensors files but no {INDEX_NAME} that says what is where"
        )
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES):
        raise UnsupportedModelError(f"{path / pickles[0]}: {PICKLE_REFUSAL}")
    raise ModelNotFoundError(f"{path}: has no .safetensors file")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open Hugging Face folder: config.json and the tensors. `quantised` says how quantised weights were read;
    `spare` names tensors that a model may do without: biases of zeros, which some tools give to every layer."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    quantised: str | None = None
    spare: frozenset[str] = frozenset()


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config.json and map the tensors of a Hugging Face folder. Raises as `read_config` and `open_safetensors`."""
    folder = Path(folder)
    config = read_config(folder)
    return Checkpoint(folder, config, open_safetensors(folder).tensors)


def read_json(path: str | Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises ModelNotFoundError or ModelFileError."""
    path = Path(path)
    data = map_file(path)
    if len(data) > limit:
        raise ModelFileError(path, "file", f"has {len(data)} bytes; at most {limit} are read")
    return _parse_object(path, "file", data)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Code that it names (`auto_map`) is never run; a warning says so."""
    config = read_json(Path(folder) / "config.json")
    if config.pop("auto_map", None) is not None:
        warnings.warn(
            f"{folder}: config.json names code of its own (auto_map), which Headrace never runs", stacklevel=2
        )
    return config


def _parse_object(path: Path, field: str, data: np.ndarray) -> dict[str, Any]:
    try:
        value = json.loads(data.tobytes(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, field, f"is not valid JSON ({error!s:.200})") from None
    if not isinstance(value, dict):
        raise ModelFileError(path, field, f"must be a JSON object, got {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r:.80} is there twice")
    return keys


def _open_file(path: Path) -> SafetensorsFile:
    file = map_file(path)
    if len(file) < 8:
        raise ModelFileError(path, "header length", f"takes 8 bytes, and the file has {len(file)}")
    length = int(file[:8].view("<u8")[0])
    if length > MAX_HEADER_BYTES or length > len(file) - 8:
        raise ModelFileError(
            path,
            "header length",
            f"{length} is more than {min(MAX_HEADER_BYTES, len(file) - 8)}, what is there or may be",
        )
    header = _parse_object(path, "header", file[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError(path, "__metadata__", "must be an object of strings")
    tensors: dict[str, Tensor] = {}
    end = 0
    entries = {name: _offsets(path, name, entry) for name, entry in header.items()}
    for name in sorted(entries, key=entries.__getitem__):
        begin, stop = entries[name]
        if begin != end:
            raise ModelFileError(
                path, f"tensor {name}: data_offsets", f"begins at {begin}, where the tensor before it ends at {end}"
            )
        tensors[name] = _tensor(path, file, name, header[name], 8 + length + begin)
        if tensors[name].nbytes != stop - begin:
            raise ModelFileError(
                path,
                f"tensor {name}: data_offsets",
                f"span {stop - begin} bytes, its shape and dtype {tensors[name].nbytes}",
            )
        end = stop
    if 8 + length + end != len(file):
        raise ModelFileError(path, "file", f"has {len(file)} bytes, but header and tensors take {8 + length + end}")
    return SafetensorsFile(path, metadata, tensors)


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ModelFileError(path, f"tensor {name}", "must be an object with dtype, shape and data_offsets")
    offsets = entry["data_offsets"]
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFileError(
            path, f"tensor {name}: data_offsets", f"must be [begin, end] with begin <= end, got {offsets!r:.80}"
        )
    return offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _tensor(path: Path, file: np.ndarray, name: str, entry: dict[str, Any], start: int) -> Tensor:
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str):
        raise ModelFileError(path, f"tensor {name}: dtype", f"must be a string, got {dtype!r:.80}")
    if dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{path}: tensor {name}: dtype {dtype:.80} is not supported; use one of {', '.join(_DTYPES)}"
        )
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise ModelFileError(path, f"tensor {name}: shape", f"must be at most {MAX_DIMS} sizes, got {shape!r:.80}")
    return make_tensor(path, file, name, tuple(shape), STORED_TYPES[dtype], start)


def _open_shards(folder: Path) -> SafetensorsFile:
    index_path = inside(folder, INDEX_NAME)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFileError(index_path, "weight_map", "must be an object of file names by tensor")
    shards: dict[str, SafetensorsFile] = {}
    for name in sorted(set(weight_map.values())):
        if not (shard := inside(folder, name)).exists():
            raise ModelFileError(
                index_path, "weight_map", f"names the shard {name}, which is not in {folder}; pull the model again"
            )
        shards[name] = _open_file(shard)
    for tensor, name in weight_map.items():
        if tensor not in shards[name].tensors:
            raise ModelFileError(index_path, f"weight_map: {tensor}", f"is not in {name}, where the index puts it")
    tensors = {tensor: shards[name].tensors[tensor] for tensor, name in weight_map.items()}
    return SafetensorsFile(
        folder, {key: text for shard in shards.values() for key, text in shard.metadata.items()}, tensors
    )
