"""A streamed answer as ASGI: server-sent events, bounded in memory and time however slowly the client reads.

Once the answer has begun, events go to the connection's buffer with the others of their step, as long as the client
keeps up (`headrace.write` of the scope). Else they wait here, and a task sends them as the client reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from .exchange import Exchange
from .faults import Fault

MAX_PENDING = 1 << 20  # bytes of a stream that wait for the client
FIRST_SECONDS = 5.0  # so long a stream may wait for its first token before it says 200
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class EventStream:
    """Sends what an Exchange emits. Ends the exchange when the client leaves, or does not read.

    `scope` may hold `headrace.write` (takes a piece of the body at once, or returns False where it must wait),
    `headrace.until_close` (told that the answer has no length, and at the end how much is left) and `headrace.abort`
    (closes the connection, whatever is unsent).
    """

    def __init__(self, exchange: Exchange, scope: Any) -> None:
        self.exchange = exchange
        self._write: Callable[[bytes], bool] = scope.get("headrace.write", lambda data: False)
        self._abort: Callable[[], None] = scope.get("headrace.abort", lambda: None)
        self._until_close: Callable[..., None] = scope.get("headrace.until_close", lambda left=0: None)
        self._pending: list[bytes] = []
        self._size = 0
        self._oldest: float | None = None  # of what waits: when it was sampled
        self._collector, self._outbox = exchange.collector, exchange.collector.outbox
        self._wake = asyncio.Event()
        self._began = self._sending = False
        self._sent_at = time.monotonic()
        self.gone: str | None = None  # why nothing more is sent
        exchange.emit, exchange.on_done = self.push, self._wake.set

    def push(self, data: bytes) -> None:
        """Send or queue bytes; a client that leaves too many of them waiting is given up."""
        if self._began and not self._pending and not self._sending:
            self._outbox.put(partial(self._write_or_wait, data, self.exchange.llm.sampled))
        else:
            self._wait(data, self.exchange.llm.sampled)

    def _write_or_wait(self, data: bytes, sampled: float) -> None:
        if self._pending or self._sending or not self._write(data):
            self._wait(data, sampled)
            return
        self._sent_at = time.monotonic()
        self._collector.delivered(self._sent_at - sampled)

    def _wait(self, data: bytes, sampled: float | None) -> None:
        if self.gone is not None:
            return
        if not self._pending:
            self._oldest = sampled
        self._pending.append(data)
        self._size += len(data)
        if self._size > MAX_PENDING:
            self.give_up(f"the client left {self._size} bytes unread")
        self._wake.set()

    def give_up(self, why: str) -> None:
        if self.gone is None:
            self.gone = why
            self._pending.clear()
            self._size = 0
            self.exchange.end()
            self._abort()
            self._wake.set()

    def look(self, now: float, comment_after: float) -> None:
        """Called about once a second: a comment keeps the connection known to be alive."""
        if self._began and not self._pending and now - self._sent_at > comment_after:
            self._wait(b": keep-alive\n\n", None)

    async def send(self, receive: Receive, send: Send) -> Fault | None:
        """The whole life of the stream. A Fault is returned where nothing was sent yet."""
        exchange = self.exchange
        watcher = asyncio.create_task(self._watch(receive))
        try:
            try:
                await asyncio.wait_for(self._wake.wait(), FIRST_SECONDS)
            except TimeoutError:
                pass
            if exchange.fault is not None and not self._pending:
                return exchange.fault
            self._until_close()
            await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
            self._began = True
            while self.gone is None:
                self._outbox.flush()
                self._wake.clear()
                last = exchange.done.is_set()
                if self._pending:
                    await self._send_pending(send)
                elif last:
                    body = b"data: " + exchange.fault.body() + b"\n\ndata: [DONE]\n\n" if exchange.fault else b""
                    self._until_close(len(body))
                    await send({"type": "http.response.body", "body": body, "more_body": False})
                    return None
                else:
                    await self._wake.wait()
            return None
        finally:
            watcher.cancel()
            exchange.end()

    async def _send_pending(self, send: Send) -> None:
        body = b"".join(self._pending)
        self._pending.clear()
        self._size, self._sending, sampled = 0, True, self._oldest
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._sending, self._sent_at = False, time.monotonic()
        if sampled is not None:
            self._collector.delivered(self._sent_at - sampled)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.give_up("the client has left")
