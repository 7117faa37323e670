"""Structured logs: a JSON object a line, written by a thread of their own, so that a full disk or a pipe that nobody
reads holds up nothing. What does not fit the queue is dropped and counted."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from typing import Any

import msgspec

from ..errors import ConfigError

MAX_QUEUED = 10_000  # lines
MAX_LINE = 16 << 10  # bytes


class JsonHandler(logging.Handler):
    """Writes to a descriptor."""

    def __init__(self, path: str | None) -> None:
        super().__init__()
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._fd = os.dup(sys.stderr.fileno()) if path is None else os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(f"the log file {path} cannot be opened: {error.strerror}") from None
        self.dropped = 0
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._write, name="headrace-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self._line(record))
        except Exception:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, for at most a second."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            pass
        self._thread.join(1.0)
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        facts: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            facts["error"] = logging.Formatter().formatException(record.exc_info)[-8000:]
        return msgspec.json.encode(facts, enc_hook=str)[:MAX_LINE] + b"\n"

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                os.write(self._fd, line)
            except OSError:
                self.dropped += 1


def set_up(path: str | None, level: str) -> JsonHandler:
    """Send what the server and its libraries log to one handler."""
    handler = JsonHandler(path)
    for name in ("headrace", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "headrace" else "WARNING")
    return handler
