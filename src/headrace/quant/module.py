"""One quantised module of a checkpoint: its parts, checked, and the weight that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFileError, UnsupportedModelError
from ..formats.tensor import Tensor, TensorType

ROWS_AT_ONCE = 256  # so that the temporaries of unpacking stay small

_DTYPES = {"I8": "i1", "U8": "u1", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class Module:
    """A layer called `name` and its `parts` by the last word of their names, such as qweight."""

    name: str
    parts: Mapping[str, Tensor]

    @property
    def path(self) -> Path:
        return next(iter(self.parts.values())).path

    def error(self, part: str, problem: str) -> ModelFileError:
        return ModelFileError(self.path, f"tensor {self.name}.{part}", problem)

    def part(self, name: str, types: tuple[str, ...], dims: int) -> Tensor:
        """A part that must be there. Raises ModelFileError where it is missing, or of another type or number of
        axes."""
        tensor = self.parts.get(name)
        if tensor is None:
            raise self.error(name, f"is missing; the module has {', '.join(sorted(self.parts))}")
        if tensor.type.name not in types or len(tensor.shape) != dims or 0 in tensor.shape:
            wanted = f"must be {' or '.join(types)} of {dims} axes that are not empty"
            raise self.error(name, f"{wanted}, got {tensor.type.name} of shape {list(tensor.shape)}")
        return tensor

    def integers(self, name: str, types: tuple[str, ...], dims: int) -> np.ndarray:
        """A part as the whole numbers that it holds; a view of the file."""
        tensor = self.part(name, types, dims)
        return tensor.data.view(_DTYPES[tensor.type.name]).reshape(tensor.shape)

    def scales(self, name: str, types: tuple[str, ...] = ("F16", "BF16", "F32")) -> np.ndarray:
        """A part as float32 in its own shape; a NaN or an infinity in it is refused."""
        tensor = self.parts.get(name)
        if tensor is None or tensor.type.name not in types or len(tensor.shape) > 2 or 0 in tensor.shape:
            return self.part(name, types, 2).decode()  # raises
        values = tensor.decode()
        if not np.isfinite(values).all():
            raise self.error(name, "holds a NaN or an infinity")
        return values


class MadeTensor(Tensor):
    """A weight whose bytes are made whenever they are asked for: `make(first, last)` gives those of these rows, uint8
    [last - first, bytes of a row]."""

    def __init__(
        self, name: str, shape: tuple[int, int], type: TensorType, path: Path, make: Callable[[int, int], np.ndarray]
    ) -> None:
        super().__init__(name, shape, type, np.empty(0, np.uint8), path)
        self._make = make

    @property
    def data(self) -> np.ndarray:
        return self._made(0, self.shape[0])

    def check_weights(self) -> Tensor:
        return self  # what is not finite is found when scales and codes are read

    def decode(self, rows: slice | None = None) -> np.ndarray:
        first, last, step = (rows or slice(None)).indices(self.shape[0])
        last = max(first, last) if step == 1 else self.shape[0]
        first = first if step == 1 else 0
        part = Tensor(self.name, (last - first, self.shape[1]), self.type, self._made(first, last), self.path).decode()
        return part if step == 1 or rows is None else np.ascontiguousarray(part[rows])

    def _rows_data(self, first: int, past: int) -> np.ndarray:
        return self._made(first, past).reshape(past - first, -1)

    def _made(self, first: int, last: int) -> np.ndarray:
        out = np.empty((last - first, self.type.row_bytes(self.shape[1])), np.uint8)
        for start in range(first, last, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, last)
            out[start - first : stop - first] = self._make(start, stop)
        return out.reshape(-1)


def setting(path: Path, config: Mapping[str, Any], names: tuple[str, ...], kind: type, default: Any = None) -> Any:
    """The first of `names` that a quantization_config has, of type `kind`. Raises ModelFileError for another type, and
    where there is none and no default."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None and default is not None:
        return default
    value = config.get(name or names[0])
    if type(value) is not kind:
        problem = "is missing" if name is None else f"must be {kind.__name__}, got {value!r:.80}"
        raise ModelFileError(path, f"quantization_config.{name or names[0]}", problem)
    return value


def unsupported(path: Path, field: str, value: Any, known: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{path}: quantization_config: {field} {value!r:.80} is not supported; {known}")
