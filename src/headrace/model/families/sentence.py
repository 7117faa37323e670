"""What the files beside an encoder's config.json say: how sentence-transformers pools, how long a text may be, and what
the classes of a classifier are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import ModelFileError, UnsupportedModelError
from ...formats.safetensors import Checkpoint, read_json
from ...formats.tensor import map_file
from ..encoder_spec import POOLINGS, Pooling
from ..fields import Fields

MAX_MODULES_BYTES = 1 << 20
MAX_LABELS = 1 << 16
_MODULES = ("Transformer", "Pooling", "Normalize")  # class names, whatever the package they lie in
_FLAGS = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}  # pooling_mode_<flag>, of older files


def pooling_of(source: Checkpoint, dim: int) -> Pooling:
    """The pooling that modules.json points to; the mean where there is no such file.

    Raises UnsupportedModelError for modules and poolings that are not supported, ModelFileError for a malformed file.
    """
    folder = Path(source.path)
    path = next((module["path"] for module in _modules(folder) if _kind(module) == "Pooling"), None)
    if path is None:
        return "mean"
    file = folder / path / "config.json"
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ModelFileError(folder / "modules.json", "path", f"{path!r:.80} leads out of the model's folder")
    fields = Fields(file, read_json(file, MAX_MODULES_BYTES))
    for name in ("word_embedding_dimension", "embedding_dimension"):
        if fields.has(name) and (size := fields.integer(name, 1, 1 << 30)) != dim:
            raise fields.error(name, f"is {size}, but the model's width is {dim}")
    if fields.has("pooling_mode"):
        modes = [fields.text("pooling_mode")]
    else:
        modes = [name for name in fields.values if name.startswith("pooling_mode_") and fields.boolean(name)]
        modes = [_FLAGS.get(name.removeprefix("pooling_mode_"), name) for name in modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UnsupportedModelError(
            f"{file}: pooling by {', '.join(modes)[:80] or 'nothing'} is not supported; one of {', '.join(POOLINGS)} is"
        )
    return next(pooling for pooling in POOLINGS if pooling == modes[0])


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    if not path.is_file():
        return []
    data = map_file(path)
    if len(data) > MAX_MODULES_BYTES:
        raise ModelFileError(path, "file", f"has {len(data)} bytes; at most {MAX_MODULES_BYTES} are read")
    try:
        modules = json.loads(data.tobytes())
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, "file", f"is not valid JSON ({error!s:.200})") from None
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in ("path", "type"))
        for module in modules
    ):
        raise ModelFileError(path, "file", "must be a list of objects with a path and a type")
    for module in modules:
        if _kind(module) not in _MODULES:
            known = ", ".join(_MODULES)
            raise UnsupportedModelError(f"{path}: module {module['type']!r:.80} is not supported; {known} are")
    return modules


def _kind(module: dict[str, Any]) -> str:
    return module["type"].rpartition(".")[2]


def longest_text(source: Checkpoint, positions: int) -> int:
    """Tokens of a text at most: the model's positions, or less where sentence-transformers or the tokenizer say so."""
    folder, limit = Path(source.path), positions
    for file, name in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if (path := folder / file).is_file():
            value = read_json(path).get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and 2 < value < limit:
                limit = int(value)
    return limit


def labels_of(source: Checkpoint, weight: str) -> tuple[str, ...]:
    """Names of the classes, one for each row of the tensor `weight`; nothing where it is not there."""
    tensor = source.tensors.get(weight)
    if tensor is None or not tensor.shape:
        return ()
    fields, count = Fields(source.path, source.config), tensor.shape[0]
    if count > MAX_LABELS:
        raise fields.error(weight, f"has {count} rows; at most {MAX_LABELS} classes are supported")
    names = fields.table("id2label")
    if names.values and len(names.values) != count:
        raise fields.error("id2label", f"names {len(names.values)} classes, but {weight} has {count} rows")
    return tuple(names.text(str(i), default=f"LABEL_{i}") for i in range(count))
