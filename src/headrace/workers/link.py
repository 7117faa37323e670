"""A connection between the coordinator and a rank: framed messages both ways, with descriptors where it is local."""

from __future__ import annotations

import array
import socket
import threading
from collections import deque
from typing import Generic, TypeVar

import msgspec

from ..errors import HeadraceError
from .control import encoder
from .wire import HEADER, MAX_FRAME, frame_length

T = TypeVar("T")

PIECE = 1 << 20
MAX_FDS = 64  # with one message


class Link(Generic[T]):
    """One end. `send` never waits: what the other side does not take is kept, at most MAX_FRAME bytes."""

    def __init__(self, connection: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> None:
        connection.setblocking(False)
        self._connection, self._decoder = connection, decoder
        self._local = connection.family == socket.AF_UNIX
        self._lock = threading.Lock()
        self._unsent: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._kept = 0
        self._unread = bytearray()
        self._fds: deque[int] = deque()
        self.closed = False

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def unsent(self) -> bool:
        """Whether the connection should be polled for writing."""
        return bool(self._unsent)

    def send(self, message: object, fds: tuple[int, ...] = ()) -> None:
        """Send a message; the descriptors are sent as copies, in front of it. May be called by any thread. Nothing
        happens where the other side is gone."""
        body = encoder.encode(message)
        with self._lock:
            if self.closed:
                return
            if self._kept + len(body) > MAX_FRAME:
                raise HeadraceError(f"{self._kept} bytes wait for a process that reads nothing; it may hang")
            own = tuple(socket.dup(fd) for fd in fds)  # the caller may close its own before they are sent
            self._unsent.append((memoryview(HEADER.pack(len(body)) + body), own))
            self._kept += len(body)
            self._write()

    def flush(self) -> None:
        """Send what is kept, as far as the other side takes it."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        try:
            while self._unsent:
                data, fds = self._unsent[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._connection.sendmsg([data[:PIECE]], rights)
                for fd in fds:
                    socket.close(fd)
                if sent == len(data):
                    self._unsent.popleft()
                    self._kept -= sent
                else:
                    self._unsent[0] = (data[sent:], ())
                    self._kept -= sent
        except BlockingIOError:
            pass
        except OSError:
            self._hang_up()

    def receive(self) -> list[T]:
        """The messages that have come, without waiting. HeadraceError where one is malformed."""
        try:
            while not self.closed:
                if self._local:
                    data, fds, _, _ = socket.recv_fds(self._connection, PIECE, MAX_FDS)
                    self._fds.extend(fds)
                else:
                    data = self._connection.recv(PIECE)
                if not data:
                    self._hang_up()
                self._unread += data
                if len(data) < PIECE:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self._hang_up()
        return self._messages()

    def _messages(self) -> list[T]:
        messages, start, unread = [], 0, self._unread
        while len(unread) - start >= HEADER.size:
            end = start + HEADER.size + frame_length(bytes(unread[start : start + HEADER.size]))
            if len(unread) < end:
                break
            try:
                messages.append(self._decoder.decode(memoryview(unread)[start + HEADER.size : end]))
            except msgspec.MsgspecError as error:
                raise HeadraceError(f"a message between processes is malformed: {error}") from None
            start = end
        if start:
            self._unread = unread[start:]
        return messages

    def take_fds(self, count: int) -> tuple[int, ...]:
        """The next descriptors that came with messages. HeadraceError where there are fewer."""
        if len(self._fds) < count:
            raise HeadraceError(f"{count} descriptors should have come with a message, {len(self._fds)} did")
        return tuple(self._fds.popleft() for _ in range(count))

    def _hang_up(self) -> None:
        self.closed = True

    def close(self) -> None:
        with self._lock:
            self.closed = True
            for _, fds in self._unsent:
                for fd in fds:
                    socket.close(fd)
            self._unsent.clear()
        for fd in self._fds:
            socket.close(fd)
        self._fds.clear()
        self._connection.close()
