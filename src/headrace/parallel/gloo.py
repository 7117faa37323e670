"""Channels over gloo, by torch (the `torch` extra): a world of two members for each edge, with a store of its own, so
that one that breaks breaks nothing else.

A frame is one gloo message. gloo starts it when the receiver has posted a buffer, so a thread there always has one
posted; two buffers take turns, one to look at and one to fill. gloo neither encrypts nor asks who is there: use it in a
network where all are trusted.
"""

from __future__ import annotations

import atexit
import math
import os
import queue
import select
import socket
import threading
from datetime import timedelta
from typing import Any

import numpy as np

from ..errors import ChannelError, ConfigError
from .channel import (
    HEADER_BYTES,
    Edge,
    closed,
    dtype_code,
    full,
    gone,
    pack_header,
    payload_bytes,
    unpack_header,
)

CLOSE_SECONDS = 1.0  # in which a sender that closes passes on what it was given
CONNECT_SECONDS = 120.0  # in which both ends must come: a process that first loads torch from a slow disk takes a while
_EVER = timedelta(days=300)
_AT_ONCE = timedelta(milliseconds=1)
_SENDER, _RECEIVER = 0, 1  # ranks
_FRAMES, _NEVER = 0, 1  # tags
_LONGEST_POLL = 1e6  # seconds: poll(2) counts milliseconds in 31 bits
_MANY = 1 << 32  # tokens: more than anyone takes


def load_torch() -> Any:
    """torch with its gloo. ConfigError where it is not there."""
    try:
        import torch.distributed  # torch is an extra: nothing but this transport needs it
    except ImportError:
        raise ConfigError("the gloo transport needs torch: pip install 'headrace[torch]', or take tcp or shm") from None
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise ConfigError("this torch was built without gloo; take tcp or shm")
    return torch


class _World:
    """An edge's two members. `where`: at one end a socket that listens, at the other its (host, port)."""

    def __init__(self, where: socket.socket | tuple[str, int], edge: Edge, rank: int) -> None:
        self._torch = load_torch()
        dist = self._torch.distributed
        listens = isinstance(where, socket.socket)
        host, port = where.getsockname()[:2] if isinstance(where, socket.socket) else where
        if host in ("0.0.0.0", "::"):
            raise ConfigError(
                f"{edge.name}: a gloo world meets at an address that the other host reaches, not at {host}"
            )
        ours = host if listens else _address_towards(host, port)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=ours)]
        options._threads = 1
        options._timeout = limit = timedelta(seconds=CONNECT_SECONDS)
        try:
            self._store = dist.TCPStore(
                host,
                port,
                2,
                listens,
                limit,
                wait_for_workers=False,
                master_listen_fd=where.detach() if isinstance(where, socket.socket) else None,
                use_libuv=False,  # the other kind of store takes no listening descriptor
            )
            # A message longer than the posted buffer would end the receiver's process, so both ends must agree.
            self._store.set(f"max_bytes of {rank}", str(edge.max_bytes))
            theirs = int(self._store.get(f"max_bytes of {1 - rank}"))
            if theirs == edge.max_bytes:
                self._group = dist.ProcessGroupGloo(self._store, rank, 2, options)
        except RuntimeError as error:
            raise ChannelError(f"{edge.name}: no gloo world with {host}:{port}: {_first_line(error)}") from None
        if theirs != edge.max_bytes:
            raise ConfigError(f"{edge.name}: max_bytes is {edge.max_bytes} here and {theirs} at the other end")
        self._peer = 1 - rank

    def send(self, frame: np.ndarray) -> Any:
        """Start to send bytes, uint8 [n]; they must stay until the work that this returns is waited for. RuntimeError
        where the other member is gone, now or from its wait."""
        return self._group.send([self._torch.from_numpy(frame)], self._peer, _FRAMES)

    def receive(self, buffer: np.ndarray) -> Any:
        """Start to receive a message of at most the buffer's bytes; as `send`."""
        return self._group.recv([self._torch.from_numpy(buffer)], self._peer, _FRAMES)

    def leave(self, thread: threading.Thread, seconds: float) -> None:
        """Drop the group once `thread` has ended, whose wait in it is broken after some seconds.

        gloo closes all of a world's connections, which ends every wait, when one wait runs out of time: here one for a
        message that never comes. (Two threads must not wait for the same work: one would take the other's completion.)
        """
        thread.join(seconds)
        if thread.is_alive():
            try:
                self._group.recv([self._torch.empty(1, dtype=self._torch.uint8)], self._peer, _NEVER).wait(_AT_ONCE)
            except RuntimeError:
                pass
            thread.join()
        del self._group, self._store


def _address_towards(host: str, port: int) -> str:
    """This host's own address on the way to another."""
    family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


class GlooSender:
    """The sending end. A thread waits for gloo to be done with each message, in order: it is when the receiver has it,
    so that nothing is lost by leaving then."""

    def __init__(self, where: socket.socket | tuple[str, int], edge: Edge) -> None:
        self._edge = edge
        self._world = _World(where, edge, _SENDER)
        self._index = 0
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()  # frames' buffers, each grown as it is needed
        for _ in range(edge.messages):
            self._free.put(np.empty(HEADER_BYTES, np.uint8))
        self._underway: queue.SimpleQueue[tuple[Any, np.ndarray] | None] = queue.SimpleQueue()
        self._gone = self._closed = False
        self._thread = threading.Thread(target=self._wait, name="gloo sender", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the interpreter cannot end with a thread in gloo

    def send(self, number: int, array: np.ndarray) -> None:
        if self._closed:
            raise closed(self._edge)
        code = dtype_code(self._edge, number, array)
        if self._gone:
            raise gone(self._edge)
        try:
            frame = self._free.get(timeout=self._edge.timeout)
        except queue.Empty:
            raise full(self._edge) from None
        if self._gone:
            raise gone(self._edge)
        size = HEADER_BYTES + array.nbytes
        if len(frame) < size:
            frame = np.empty(size, np.uint8)
        pack_header(frame, 0, code, self._index, number, array)
        frame[HEADER_BYTES:size] = payload_bytes(array)
        self._index += 1
        try:
            self._underway.put((self._world.send(frame[:size]), frame))
        except RuntimeError:
            self._gone = True
            raise gone(self._edge) from None

    def _wait(self) -> None:
        """The thread."""
        while (item := self._underway.get()) is not None:
            work, frame = item
            try:
                work.wait(_EVER)
            except RuntimeError:
                self._gone = True
            self._free.put(frame)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._underway.put(None)
        self._world.leave(self._thread, CLOSE_SECONDS)


class GlooReceiver:
    """The receiving end. A thread has a buffer posted whenever one is free."""

    def __init__(self, where: socket.socket | tuple[str, int], edge: Edge) -> None:
        self._edge = edge
        self._world = _World(where, edge, _RECEIVER)
        self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)  # a token a message
        self._poll = select.poll()
        self._poll.register(self._ready, select.POLLIN)
        self._index = 0
        # Memory takes up room only as it is first written.
        self._free: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        for _ in range(2):
            self._free.put(np.empty(HEADER_BYTES + edge.max_bytes, np.uint8))
        self._come: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()  # None: no more will come
        self._held: np.ndarray | None = None  # what the caller looks at
        self._closed = False
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._wait, name="gloo receiver", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _wait(self) -> None:
        """The thread."""
        while (buffer := self._free.get()) is not None:
            try:
                self._world.receive(buffer).wait(_EVER)
            except RuntimeError:
                self._come.put(None)
                os.eventfd_write(self._ready, _MANY)
                break
            self._come.put(buffer)
            os.eventfd_write(self._ready, 1)

    def fileno(self) -> int:
        return self._ready

    def receive(self, timeout: float | None) -> tuple[int, np.ndarray] | None:
        if self._closed:
            raise closed(self._edge)
        if self._trouble is not None:
            raise ChannelError(self._trouble)
        if self._held is not None:
            self._free.put(self._held)
            self._held = None
        if not self._take(timeout):
            return None
        try:
            frame = self._come.get()
            if frame is None:
                raise gone(self._edge)
            number, dtype, shape, _ = unpack_header(self._edge, frame, 0, self._index)
        except ChannelError as error:
            self._trouble = str(error)
            os.eventfd_write(self._ready, 1)  # so that it stays readable
            raise
        self._index += 1
        self._held = frame
        return number, np.ndarray(shape, dtype, frame, HEADER_BYTES)

    def _take(self, timeout: float | None) -> bool:
        """Wait for a token, and take it. Only this thread takes any."""
        milliseconds = None if timeout is None else math.ceil(min(timeout, _LONGEST_POLL) * 1e3)
        if not self._poll.poll(milliseconds):
            return False
        os.eventfd_read(self._ready)
        return True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._free.put(None)
        self._world.leave(self._thread, 0)
        os.close(self._ready)
