"""What a chat template may spend: time, characters and items, counted before each operation is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

from ..errors import TemplateError

# Prices in units, near to nanoseconds. What is written costs more than what is read because it may stay in memory, and
# nothing is free.
UNITS = 1 << 28
READ_CHARACTER = 1
READ_ITEM = 64
WRITE_CHARACTER = 8
WRITE_ITEM = 256
OPERATION = 128

SCALAR_CHARACTERS = 40  # the longest text of a number that the sandbox lets exist, or of None, or of brackets


class Budget:
    """Units and seconds left to one rendering; every method raises TemplateError when either is used up.

    So a rendering makes at most UNITS / WRITE_CHARACTER = 32 million characters and UNITS / WRITE_ITEM = 1 million list
    items, and no single operation reads more than UNITS characters, which takes a fraction of a second: the clock,
    looked at before every operation, is never far behind.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._left = UNITS

    def spend(self, units: int) -> None:
        self._left -= units + OPERATION
        if self._left < 0:
            raise TemplateError(
                f"the chat template needs more than the {UNITS} units of work that a template may do; use another one"
            )
        if time.monotonic() > self._deadline:
            raise TemplateError(f"the chat template ran longer than its {self._seconds:g} s; use another one")

    def write(self, characters: int, items: int = 0) -> None:
        self.spend(characters * WRITE_CHARACTER + items * WRITE_ITEM)

    def read(self, *values: Any) -> tuple[int, int, int]:
        """Pay for walking plain data in full; returns (characters of its text, items, depth).

        A part that is shared counts each time it is met, as it does for whoever walks the data next.
        """
        characters = items = depth = 0
        path: list[Iterator[Any]] = [iter(values)]
        while path:
            for value in path[-1]:
                kind = type(value)
                if kind is str:
                    characters += len(value)
                    continue
                characters += SCALAR_CHARACTERS
                if kind is list or kind is tuple or kind is dict:
                    items += len(value)
                    path.append(iter(value) if kind is not dict else chain(value.keys(), value.values()))
                    depth = max(depth, len(path) - 1)
                    if characters * READ_CHARACTER + items * READ_ITEM > self._left:
                        self.spend(self._left)
                    break
            else:
                path.pop()
        self.spend(characters * READ_CHARACTER + items * READ_ITEM)
        return characters, items, depth
