"""Typed, bounded reading of what a model file says of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelFileError


@dataclass(frozen=True)
class Fields:
    """Named values of one file. Each getter raises ModelFileError, naming the field, where a value is absent (and has
    no default), of the wrong type or out of bounds. A null counts as absent."""

    path: Any
    values: Mapping[str, Any]
    prefix: str = ""

    def has(self, name: str) -> bool:
        return self.values.get(self.prefix + name) is not None

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be an integer, got {value!r:.80}")
        if not low <= value <= high:
            raise self.error(name, f"must be from {low} to {high}, got {value}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number, got {value!r:.80}")
        if not low <= value <= high or not math.isfinite(value):
            raise self.error(name, f"must be from {low:g} to {high:g}, got {value}")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r:.80}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be text, got {value!r:.80}")
        return value

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of `count` numbers."""
        values = self._get(name, None)
        if not isinstance(values, list) or len(values) != count:
            raise self.error(name, f"must be a list of {count} numbers, got {values!r:.80}")
        each = Fields(self.path, {f"{self.prefix}{name}[{index}]": value for index, value in enumerate(values)})
        return tuple(each.number(key, low, high) for key in each.values)

    def table(self, name: str) -> Fields:
        """A nested table's own fields; empty if it is absent."""
        value = self.values.get(self.prefix + name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be a table, got {value!r:.80}")
        whole = self.prefix + name
        return Fields(self.path, {f"{whole}.{key}": item for key, item in value.items()}, f"{whole}.")

    def error(self, name: str, problem: str) -> ModelFileError:
        return ModelFileError(self.path, self.prefix + name, problem)

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(self.prefix + name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "is missing")
        return value
