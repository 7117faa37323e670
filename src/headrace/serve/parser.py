"""Between the model's text and what a choice shows: where tool calls are recognised."""

from __future__ import annotations

from typing import Any, Protocol


class TextParser(Protocol):
    """Reads one choice's text as it comes. A piece is content (str), or an entry of a delta's `tool_calls` (dict)."""

    def push(self, text: str, *, final: bool) -> list[str | dict[str, Any]]:
        """What may be shown now; `final` with the last text."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Replaces "stop", such as by "tool_calls", once the text has ended; None leaves it."""
        ...
