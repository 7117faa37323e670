"""What `headrace serve` can be told."""

from __future__ import annotations

from typing import Any

import msgspec


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Checked once. Seconds, bytes and sequences."""

    models: tuple[str, ...] = ("smollm2-135m",)
    host: str = "127.0.0.1"
    port: int = 8000
    max_queue: int = 256
    max_body_bytes: int = 16 << 20
    engine: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """Of AsyncLLM, for every model."""
        return {name: value for name, value in self.engine.items() if value is not None}
