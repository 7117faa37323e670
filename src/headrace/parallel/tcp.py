"""Channels between hosts: frames over a TCP connection whose ends have proved that they share a secret.

The receiver answers every message with one byte, a credit, when it is received: so the sender knows how many are
unread. What the kernel does not take at once is copied and sent by a thread, so that no sender waits for a busy
receiver. A host that vanishes without a word is noticed by whoever supervises both ends, not here.
"""

from __future__ import annotations

import fcntl
import math
import select
import selectors
import socket
import struct
import termios
import threading
import time
from collections import deque

import numpy as np

from ..errors import ChannelError, HandshakeError
from .channel import HEADER_BYTES, Edge, closed, dtype_code, full, gone, pack_header, payload_bytes, unpack_header
from .handshake import Handshake, check_lengths, complete

CLOSE_SECONDS = 1.0  # in which a sender that closes passes on what it was given
HANDSHAKE_SECONDS = 5.0  # for each connection that a listener looks at
MAX_HANDSHAKES = 32  # at once; one more, and the oldest is hung up on
_RETRY_SECONDS = 0.05
_PIECE = 1 << 20  # bytes given to the kernel at once
_LONGEST_POLL = 1e6  # seconds: poll(2) counts milliseconds in 31 bits


class TcpListener:
    """Waits for the other ends of channels, at `address`: (host, port)."""

    def __init__(self, host: str, port: int = 0) -> None:
        """ChannelError where nobody can listen there."""
        try:
            self._socket = socket.create_server((host, port), family=_family(host))
        except OSError as error:
            raise ChannelError(f"cannot listen at {host}:{port}: {error.strerror}; choose another address") from None
        self._socket.setblocking(False)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def accept(self, secret: bytes, label: str, seconds: float) -> socket.socket:
        """The connection of whoever proves within `seconds` to know the secret and to come for `label`; all others are
        hung up on, one that is slow holds up nobody. ChannelError where the right one does not come."""
        check_lengths(secret, label)
        deadline = time.monotonic() + seconds
        refused = "nobody connected"
        ends: dict[Handshake, float] = {}  # of those underway, oldest first
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)

            def drop(handshake: Handshake) -> None:
                del ends[handshake]
                selector.unregister(handshake.connection)
                handshake.connection.close()

            try:
                while (now := time.monotonic()) < deadline:
                    for handshake in [one for one, end in ends.items() if end <= now]:
                        refused = "one that connected did not finish the handshake"
                        drop(handshake)
                    wake = min([deadline, *ends.values()])
                    for key, _ in selector.select(max(0.0, wake - time.monotonic())):
                        if key.data is None:
                            if (started := self._greet(secret, label)) is not None:
                                if len(ends) == MAX_HANDSHAKES:
                                    drop(next(iter(ends)))
                                ends[started] = time.monotonic() + HANDSHAKE_SECONDS
                                selector.register(started.connection, selectors.EVENT_READ, started)
                        elif key.data in ends:
                            try:
                                if key.data.advance() is not None:
                                    del ends[key.data]
                                    return key.data.connection
                            except HandshakeError as error:
                                refused = str(error)
                                drop(key.data)
            finally:
                for handshake in list(ends):
                    drop(handshake)
        host, port = self.address
        raise ChannelError(f"{label}: nobody came to {host}:{port} within {seconds:g} s; of the last: {refused}")

    def _greet(self, secret: bytes, label: str) -> Handshake | None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return None  # it has gone again
        try:
            return Handshake(connection, secret, label, listens=True)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._socket.close()


def connect(address: tuple[str, int], secret: bytes, label: str, seconds: float) -> socket.socket:
    """A connection to a TcpListener that shares the secret and waits for `label`; a listener that is not there yet is
    waited for. HandshakeError where it is not who it should be, ChannelError where nobody is there within `seconds`."""
    check_lengths(secret, label)
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection(address, max(0.001, deadline - time.monotonic()))
            if connection.getsockname() != connection.getpeername():  # equal: TCP's simultaneous open, with itself
                break
            connection.close()
            problem = "nobody listens"
        except OSError as error:
            problem = str(error.strerror or error)
        if time.monotonic() + _RETRY_SECONDS >= deadline:
            host, port = address
            raise ChannelError(f"{label}: no connection to {host}:{port} within {seconds:g} s: {problem}")
        time.sleep(_RETRY_SECONDS)
    try:
        complete(Handshake(connection, secret, label, listens=False), deadline)
        return connection
    except BaseException:
        connection.close()
        raise


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _prepare(connection: socket.socket) -> None:
    connection.setblocking(False)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class TcpSender:
    """The sending end over a connection (any stream socket)."""

    def __init__(self, connection: socket.socket, edge: Edge) -> None:
        _prepare(connection)
        self._edge, self._connection = edge, connection
        self._header = bytearray(HEADER_BYTES)
        self._index = 0  # of the next message
        self._unread = 0  # messages without a credit
        self._credits = bytearray(64)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._backlog: deque[memoryview] = deque()  # what the kernel did not take yet
        self._changed = threading.Condition()  # guards the backlog, and writing to the connection
        self._flusher: threading.Thread | None = None
        self._closed = self._gone = False

    def send(self, number: int, array: np.ndarray) -> None:
        if self._closed:
            raise closed(self._edge)
        code = dtype_code(self._edge, number, array)
        self._take_credits()
        if self._unread == self._edge.messages:
            self._wait_for_credit()
        if self._gone:
            raise gone(self._edge)
        pack_header(self._header, 0, code, self._index, number, array)
        self._index += 1
        self._unread += 1
        self._write(payload_bytes(array))

    def _write(self, payload: np.ndarray) -> None:
        """Give the header and payload to the kernel; what it does not take, to the thread."""
        with self._changed:
            sent = 0
            if not self._backlog:
                try:
                    sent = self._connection.sendmsg((self._header, payload.data))
                except BlockingIOError:
                    pass
                except OSError:
                    self._gone = True
                    raise gone(self._edge) from None
            if sent == HEADER_BYTES + len(payload):
                return
            if sent < HEADER_BYTES:
                self._backlog.append(memoryview(bytes(self._header[sent:])))
            self._backlog.append(memoryview(payload[max(0, sent - HEADER_BYTES) :].tobytes()))
            if self._flusher is None:
                self._flusher = threading.Thread(target=self._flush, name="tcp channel", daemon=True)
                self._flusher.start()
            self._changed.notify()

    def _flush(self) -> None:
        """The thread: give the backlog to the kernel as that has room."""
        poll = select.poll()
        poll.register(self._connection, select.POLLOUT)
        while True:
            with self._changed:
                while not self._backlog and not self._closed:
                    self._changed.wait()
                if not self._backlog or self._gone:
                    return
            poll.poll()
            with self._changed:
                try:
                    piece = self._backlog[0]
                    sent = self._connection.send(piece[:_PIECE])
                    self._backlog[0] = piece[sent:]
                    if sent == len(piece):
                        self._backlog.popleft()
                except BlockingIOError:
                    pass
                except OSError:
                    self._gone = True
                    self._backlog.clear()
                    return

    def _take_credits(self) -> None:
        try:
            count = self._connection.recv_into(self._credits)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        self._unread -= count
        if not count or self._unread < 0:
            self._gone = True

    def _wait_for_credit(self) -> None:
        deadline = time.monotonic() + self._edge.timeout
        while self._unread == self._edge.messages and not self._gone:
            left = deadline - time.monotonic()
            if left <= 0:
                raise full(self._edge)
            self._poll.poll(math.ceil(min(left, _LONGEST_POLL) * 1e3))
            self._take_credits()

    def close(self) -> None:
        if self._closed:
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._flusher is not None:
            self._flusher.join(CLOSE_SECONDS)
        try:
            if self._flusher is None or not self._flusher.is_alive():
                self._connection.shutdown(socket.SHUT_WR)
                # Credits that nobody reads make the kernel drop what the other side has not acknowledged.
                while self._unacknowledged() and time.monotonic() < deadline:
                    time.sleep(0.001)
            self._connection.shutdown(socket.SHUT_RDWR)  # ends the thread's wait
        except OSError:
            pass  # the other side is gone
        if self._flusher is not None:
            self._flusher.join()
        self._connection.close()

    def _unacknowledged(self) -> int:
        """Bytes that the other side's kernel has not got."""
        return struct.unpack("i", fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4)))[0]


class TcpReceiver:
    """The receiving end over a connection (any stream socket)."""

    def __init__(self, connection: socket.socket, edge: Edge) -> None:
        _prepare(connection)
        self._edge, self._connection = edge, connection
        self._header = bytearray(HEADER_BYTES)
        self._payload = np.empty(0, np.uint8)  # grows to the largest message so far
        self._what: tuple[int, np.dtype, tuple[int, ...], int] | None = None  # of the message underway, from its header
        self._got = 0  # bytes of the header, or else of the payload
        self._index = 0  # of the message underway
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._closed = False
        self._trouble: str | None = None

    def fileno(self) -> int:
        return self._connection.fileno()

    def receive(self, timeout: float | None) -> tuple[int, np.ndarray] | None:
        if self._closed:
            raise closed(self._edge)
        if self._trouble is not None:
            raise ChannelError(self._trouble)
        deadline = None
        try:
            while (message := self._advance()) is None:
                if timeout is None:
                    self._poll.poll()
                    continue
                deadline = deadline or time.monotonic() + timeout
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._poll.poll(math.ceil(min(left, _LONGEST_POLL) * 1e3))
        except ChannelError as error:
            self._trouble = str(error)
            raise
        try:
            self._connection.send(b"\1")
        except OSError:
            pass  # the sender is gone: the next call says so
        return message

    def _advance(self) -> tuple[int, np.ndarray] | None:
        """Read what has come; the message if it is whole."""
        if self._what is None:
            if not self._fill(memoryview(self._header)):
                return None
            self._what = unpack_header(self._edge, self._header, 0, self._index)
            self._got = 0
            if self._what[3] > len(self._payload):
                self._payload = np.empty(self._what[3], np.uint8)
        number, dtype, shape, size = self._what
        if not self._fill(self._payload.data[:size]):
            return None
        self._what, self._got = None, 0
        self._index += 1
        return number, np.ndarray(shape, dtype, self._payload)

    def _fill(self, part: memoryview) -> bool:
        """Read on into `part`, which has `_got` bytes already; whether it is full now."""
        while self._got < len(part):
            try:
                count = self._connection.recv_into(part[self._got :])
            except BlockingIOError:
                return False
            except OSError:
                count = 0
            if not count:
                raise gone(self._edge)
            self._got += count
        return True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._connection.close()
