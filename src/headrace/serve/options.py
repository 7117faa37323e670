"""What `headrace serve` can be told."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from ..config import Settings
from ..errors import ConfigError

TOOL_PARSERS = ("auto", "hermes", "llama3", "mistral")


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Checked once, here. Times are in seconds, sizes in bytes. `engine` holds fields of `config.Settings`."""

    models: tuple[str, ...] = ("smollm2-135m",)  # what to load, or NAME=MODEL where clients are to call it otherwise
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    admin_key_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 256  # sequences that may wait, above those that may run
    max_connections: int = 1024
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 32 << 10
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0  # for which a client may leave its answer unread
    keep_alive: float = 75.0  # of an idle connection
    keep_alive_comment: float = 10.0  # between comments in a stream that has nothing to say
    request_timeout: float = 600.0  # deadline of a request that names none; 0 sets none
    drain_timeout: float = 60.0  # for which requests may go on after SIGTERM
    log_file: str | None = None
    log_level: str = "info"
    otel_endpoint: str | None = None  # of a collector of OpenTelemetry's spans
    max_restarts: int = 100
    tool_parser: str = "auto"  # how models write tool calls
    engine: dict[str, Any] = {}

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_queue", 0, 1 << 20),
            ("max_connections", 1, 1 << 20),
            ("max_body_bytes", 1024, 1 << 30),
            ("max_header_bytes", 1024, 1 << 20),
            ("max_restarts", 0, 1000),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{_flag(name)} must be a whole number from {low} to {high}, got {value!r:.80}")
        for name, low in (
            ("header_timeout", 0.1),
            ("body_timeout", 0.1),
            ("write_timeout", 0.1),
            ("keep_alive", 0.1),
            ("keep_alive_comment", 0.1),
            ("request_timeout", 0.0),
            ("drain_timeout", 0.0),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= 86400:
                raise ConfigError(f"{_flag(name)} must be from {low:g} to 86400 seconds, got {value!r:.80}")
        if not self.models:
            raise ConfigError("there is no model to serve; give one")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together; give both or neither")
        if self.tool_parser not in TOOL_PARSERS:
            raise ConfigError(f"--tool-parser must be {', '.join(TOOL_PARSERS)}, got {self.tool_parser!r:.80}")
        if self.otel_endpoint is not None and not self.otel_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"--otel-endpoint must be an http or https URL, got {self.otel_endpoint!r:.80}")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"--log-level must be debug, info, warning or error, got {self.log_level!r:.80}")
        Settings(**self.settings())

    def settings(self) -> dict[str, Any]:
        """The engine's settings that were given."""
        return {name: value for name, value in self.engine.items() if value is not None}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
