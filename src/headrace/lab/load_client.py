"""A streaming client for OpenAI's API that costs little: HTTP/1.1 parsed by httptools, events by msgspec, each byte
touched once. What it notes is when things came."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from ..errors import ConfigError

MAX_EVENT = 4 << 20  # bytes of an event, or of an answer that is no stream
MAX_ERROR = 500  # characters of an error that are kept


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Chunk)


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are time.perf_counter's."""

    sent: float = 0.0  # the request's bytes were handed to the socket
    ended: float = 0.0
    status: int = 0  # 0 where no answer came
    arrivals: list[float] = field(default_factory=list)  # of the pieces of text, or of tokens
    prompt_tokens: int = 0  # as the server counts
    tokens: int = 0
    retry_after: float | None = None
    error: str | None = None

    @property
    def outcome(self) -> str:
        """ok, rejected (429), or failed."""
        if self.status == 429:
            return "rejected"
        return "ok" if self.error is None and self.status == 200 and self.arrivals else "failed"


class Target:
    """Where to send requests. ConfigError where the URL or the key is none."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise ConfigError(f"{url!r:.200} is no server's address; give one such as http://127.0.0.1:8000")
        if key is not None and not (key.isascii() and key.isprintable() and key):
            raise ConfigError("the API key must be printable ASCII text on one line")
        self.host, self.port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\n{authorization}Accept: */*\r\n"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request."""
        typed = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        return f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._head}{typed}\r\n".encode() + body


class Client:
    """Keeps connections and uses them again. `on_token(now)` hears of every piece that arrives."""

    def __init__(self, target: Target, timeout: float, on_token: Callable[[float], None] = lambda now: None) -> None:
        self.target, self._timeout, self._on_token = target, timeout, on_token
        self._idle: list[_Connection] = []

    async def ask(self, request: bytes) -> Answer:
        """Send a request and read its answer, a stream or an error. Never raises for what the network does."""
        answer = Answer()
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._connection()
                await connection.exchange(request, answer, self._on_token)
        except TimeoutError:
            answer.error = f"no complete answer within {self._timeout:g} s"
        except OSError as error:
            answer.error = f"{type(error).__name__}: {error}"[:MAX_ERROR]
        answer.ended = answer.ended or time.perf_counter()
        answer.sent = answer.sent or answer.ended
        if connection is not None:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.abort()
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """(status, body); OSError or TimeoutError where none comes."""
        async with asyncio.timeout(self._timeout):
            connection = await self._connection()
            try:
                answer = Answer()
                await connection.exchange(self.target.request("GET", path), answer, self._on_token)
                if not answer.status:
                    raise OSError(answer.error)
                return answer.status, bytes(connection.body)
            finally:
                connection.abort()

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self.target.host, self.target.port, ssl=self.target.tls
        )
        return connection


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. The methods in lower case with `on_` are the HTTP parser's."""

    def __init__(self) -> None:
        self.body = bytearray()  # of an answer that is no stream
        self.reusable = False
        self._closed = False
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def abort(self) -> None:
        self.reusable = False
        self._transport.abort()

    async def exchange(self, request: bytes, answer: Answer, on_token: Callable[[float], None]) -> None:
        self._answer, self._on_token, self._streams = answer, on_token, False
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self.body.clear()
        self.reusable = False
        self._done = asyncio.get_running_loop().create_future()
        answer.sent = time.perf_counter()
        if self._closed:
            raise ConnectionResetError("the server closed the connection")
        self._transport.write(request)
        await self._done
        if not self._streams and answer.status != 200 and answer.error is None:
            answer.error = self.body.decode("utf-8", "replace")[:MAX_ERROR]

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            self.abort()
            return
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.DecodeError, ValueError) as error:
            self._end(f"the answer is not readable: {error}"[:MAX_ERROR])

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed, self.reusable = True, False
        self._end("the connection ended before the answer was complete")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._streams = b"event-stream" in value
        elif name == b"retry-after" and value.isdigit():
            self._answer.retry_after = float(value)

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self._streams:
            self.body += body
            if len(self.body) > MAX_EVENT:
                raise ValueError(f"it is longer than {MAX_EVENT} bytes")
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        if len(self._rest) > MAX_EVENT:
            raise ValueError(f"an event is longer than {MAX_EVENT} bytes")
        for line in lines:
            if line.startswith(b"data: {"):
                self._take(_decoder.decode(line[6:]))

    def _take(self, chunk: _Chunk) -> None:
        answer = self._answer
        if chunk.error is not None:
            answer.error = str(chunk.error)[:MAX_ERROR]
        if chunk.usage is not None:
            answer.prompt_tokens, answer.tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if any(_has_output(choice) for choice in chunk.choices):
            answer.arrivals.append(self._now)
            self._on_token(self._now)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive() and not self._closed
        self._answer.ended = self._now
        self._end(None)

    def _end(self, error: str | None) -> None:
        if self._done is not None and not self._done.done():
            if error is not None:
                self._answer.error = self._answer.error or error
            self._done.set_result(None)


def _has_output(choice: _Choice) -> bool:
    delta = choice.delta
    return bool(
        choice.text or choice.token_ids or (delta and (delta.content or delta.reasoning_content or delta.tool_calls))
    )
