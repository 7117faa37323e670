"""Pieces of streams that leave together.

The first write of a step wakes its client, which takes a core; so a step's pieces are all made before any is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Outbox:
    """Of one model. `flush` is called at the end of a step's news; else the loop does so at its next turn."""

    def __init__(self) -> None:
        self._pieces: list[Callable[[], None]] = []

    def put(self, write: Callable[[], None]) -> None:
        if not self._pieces:
            asyncio.get_running_loop().call_soon(self.flush)
        self._pieces.append(write)

    def flush(self) -> None:
        """Write what is here, in order."""
        pieces, self._pieces = self._pieces, []
        for write in pieces:
            write()
