"""HTTP/1.1 on a socket, with limits: how large and how slow a request's head may be, how many connections, and how long
a client may leave an answer unread."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .faults import Fault
from .options import ServeOptions

MAX_HEADERS = 100
MAX_PIPELINED = 32  # requests on one connection that wait for its first answer
UNREAD_FACTOR = 10  # of the write timeout: so long an answer may stay partly unread though the client reads on

REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large",
           503: b"Service Unavailable"}  # fmt: skip


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `more` is what uvicorn's own protocol takes."""

    def __init__(self, options: ServeOptions, **more: Any) -> None:
        super().__init__(**more)
        self._options = options
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = self._head_fields = 0
        self._in_head = False
        self._unread_since: float | None = None
        self._stuck: tuple[int, float] = (0, 0.0)  # bytes unread, since when exactly so many

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._options.max_connections:
            self._refuse(Fault(503, f"too many connections; at most {self._options.max_connections} are served",
                               code="too_many_connections"))  # fmt: skip
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        self._unset_keepalive_if_required()  # which uvicorn leaves after a reset: it would hold all of this
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes > self._options.max_header_bytes:
            self._refuse(_large_head(self._options))
        elif self._idle() and self._head_timer is None:
            self._expect_head()  # so that blank lines do not keep a connection for ever

    # httptools

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["headrace.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        self.scope["headrace.write"] = self._write_now  # type: ignore[typeddict-unknown-key]
        self.scope["headrace.until_close"] = self._until_close  # type: ignore[typeddict-unknown-key]
        self.scope["headrace.lost"] = self._lost  # type: ignore[typeddict-unknown-key]
        self._head_bytes = self._head_fields = 0
        self._in_head = True
        if self._head_timer is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > 2 * self._options.max_header_bytes:
            self._refuse(_large_head(self._options))
            raise ValueError("the path is too long")  # stops the parser
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_fields += 1
        self._head_bytes += len(name) + len(value)
        if self._head_fields > MAX_HEADERS or self._head_bytes > 2 * self._options.max_header_bytes:
            self._refuse(_large_head(self._options))
            raise ValueError("too many header fields")  # stops the parser
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_done()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(Fault(400, f"more than {MAX_PIPELINED} requests are waiting on this connection"))
            raise ValueError("too many pipelined requests")
        super().on_headers_complete()

    def _write_now(self, body: bytes) -> bool:
        """A chunk of the answer that has begun, without the way through ASGI; False where the client is behind."""
        if self.flow.write_paused or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body) if self.cycle.chunked_encoding else body)
        return True

    def _until_close(self, left: int = 1 << 62) -> None:
        """HTTP/1.0 knows no chunks: there an answer without a length ends with its connection. Called before it begins,
        and before its last bytes, with how many are `left`."""
        if self.cycle is not None and self.cycle.scope["http_version"] == "1.0":
            self.cycle.chunked_encoding, self.cycle.expected_content_length = False, left

    def _lost(self) -> bool:
        """Whether nothing can be sent any more; then the answer counts as given up."""
        lost = self.transport.is_closing()
        if lost and self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        return lost

    def send_400_response(self, msg: str) -> None:
        self._refuse(Fault(400, "the request is not HTTP/1.1", code="invalid_http"))

    def _should_upgrade(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        self._refuse(Fault(400, "there is nothing to upgrade to here", code="invalid_http"))

    # Time

    def look(self, now: float) -> None:
        """Called about once a second: give up a client that leaves its answer unread."""
        unread = self.transport.get_write_buffer_size() if self.transport is not None else 0
        if not unread:
            self._unread_since = None
            return
        if self._unread_since is None:
            self._unread_since = now
        if self._stuck[0] != unread:
            self._stuck = (unread, now)
        limit = self._options.write_timeout
        if now - self._stuck[1] > limit or now - self._unread_since > UNREAD_FACTOR * limit:
            self.transport.abort()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._options.header_timeout, self._late_head)

    def _head_done(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late_head(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing() and (self._in_head or self._idle()):
            seconds = f"{self._options.header_timeout:g}"
            self._refuse(Fault(408, f"the request's head did not come within {seconds} s", code="request_timeout"))

    def _refuse(self, fault: Fault) -> None:
        """Answer without the application, and hang up."""
        if self.transport.is_closing():
            return
        if self._idle() or not self.cycle.response_started:  # in the middle of an answer nothing can be said
            body = fault.body()
            head = (
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head % (fault.status, REASONS[fault.status], len(body)) + body)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _large_head(options: ServeOptions) -> Fault:
    return Fault(
        431,
        f"the request's head is larger than {options.max_header_bytes} bytes or {MAX_HEADERS} fields",
        code="headers_too_large",
    )


def look_at_all(connections: Any) -> None:
    """`look` at every connection."""
    now = time.monotonic()
    for connection in list(connections):
        connection.look(now)
