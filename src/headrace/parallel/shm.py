"""Channels within a host: a ring of slots in shared memory, and two counters of the kernel's that say who may go on.

    memory = a page of flags, then messages + 2 slots of a header and max_bytes each
    ready  = eventfd, one token for each message that was written and not yet received
    room   = eventfd, one token for each message that may yet be written

    sender:   take from room   ──▶ write slot i   ──▶ give to ready
    receiver: take from ready  ──▶ view slot i    ──▶ give to room

Nothing else is shared but flags, so the order in which stores become visible (x86 or Arm) rests on the eventfds alone:
giving and taking a token is a system call under the same lock, and what was stored before the one is seen after the
other. At most `messages` are unread; the slot before them is what the receiver looks at, the slot behind them is for
the goodbye of a sender that closes. Memory is anonymous, cannot shrink, and takes up room only as it is first written.

Shared memory does not tell that a process died: whoever supervises both must call `ShmEdge.abandon`.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import select
import time
from typing import NamedTuple

import numpy as np

from ..errors import ChannelError, ConfigError
from .channel import HEADER_BYTES, Edge, closed, dtype_code, full, gone, pack_goodbye, pack_header, unpack_header

SPIN_SECONDS = 50e-6  # of looking before a process sleeps: to be woken takes about as long
_LINE = 64  # bytes of a cache line
_FLAGS_BYTES = mmap.PAGESIZE
_RECEIVER_CLOSED, _ABANDONED = 0, _LINE  # offsets of flags: a byte each, set once
_LONGEST_POLL = 1e6  # seconds: poll(2) counts milliseconds in 31 bits
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SHRINK") else 0
_MANY = 1 << 32  # tokens: more than anyone takes, so that nobody waits again


class ShmFds(NamedTuple):
    """The descriptors of an edge: pass all three, over a Unix socket or to a child, to the process of each end."""

    memory: int
    ready: int
    room: int

    def duplicate(self) -> ShmFds:
        """The same edge by descriptors of this process's own, for an end in it."""
        return ShmFds(*map(os.dup, self))

    def close(self) -> None:
        for fd in self:
            os.close(fd)


class ShmEdge:
    """A channel's memory and eventfds, as made by the process that starts or knows those of both ends."""

    def __init__(self, fds: ShmFds) -> None:
        self.fds = fds

    @classmethod
    def create(cls, max_bytes: int, messages: int) -> ShmEdge:
        """An edge for `messages` messages of at most `max_bytes`. ConfigError where one is out of range, or the system
        has no such memory; OSError where it refuses."""
        edge = Edge("shm", max_bytes, messages)
        if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
            raise ConfigError("the shm transport needs Linux's memfd and eventfd; take tcp")
        opened = [os.memfd_create("headrace-channel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        try:
            os.ftruncate(opened[0], _memory_bytes(edge))
            fcntl.fcntl(opened[0], fcntl.F_ADD_SEALS, _SEALS)
            for tokens in (0, messages):
                opened.append(os.eventfd(tokens, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE))
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        return cls(ShmFds(*opened))

    def abandon(self) -> None:
        """Make both ends raise, also one that waits: for when a process at an end died, or is to let go. What is unread
        is lost."""
        with mmap.mmap(self.fds.memory, _FLAGS_BYTES) as flags:
            flags[_ABANDONED] = 1
        os.eventfd_write(self.fds.ready, _MANY)
        os.eventfd_write(self.fds.room, _MANY)

    def close(self) -> None:
        """Close these descriptors. Ends that are open stay so."""
        self.fds.close()


def _slot_bytes(edge: Edge) -> int:
    return HEADER_BYTES + -(-edge.max_bytes // _LINE) * _LINE


def _memory_bytes(edge: Edge) -> int:
    return _FLAGS_BYTES + (edge.messages + 2) * _slot_bytes(edge)


class _End:
    """What both ends have: the mapped memory, and their place in the ring."""

    def __init__(self, fds: ShmFds, edge: Edge, protection: int) -> None:
        self._edge, self._fds = edge, ShmFds(*fds)
        self._ready, self._room = fds[1:]
        self._slot_bytes = _slot_bytes(edge)
        self._ring_bytes = (edge.messages + 2) * self._slot_bytes
        self._offset = 0  # of the next message's slot
        self._index = 0  # of the next message
        self._poll = select.poll()
        self._closed = False
        try:
            self._map(protection)
        except BaseException:
            self._fds.close()
            raise

    def _map(self, protection: int) -> None:
        edge, fds = self._edge, self._fds
        size = os.fstat(fds.memory).st_size
        if size != _memory_bytes(edge) or fcntl.fcntl(fds.memory, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ChannelError(
                f"{edge.name}: shared memory of {size} bytes, or not sealed, where {_memory_bytes(edge)} sealed bytes "
                "hold these messages; give both ends the edge's max_bytes and messages"
            )
        self._flags = mmap.mmap(fds.memory, _FLAGS_BYTES)
        self._ring = mmap.mmap(fds.memory, self._ring_bytes, prot=protection, offset=_FLAGS_BYTES)

    def _advance(self) -> None:
        self._index += 1
        self._offset += self._slot_bytes
        if self._offset == self._ring_bytes:
            self._offset = 0

    def _take(self, fd: int, deadline: float) -> bool:
        """Wait for a token until a moment of time.monotonic, and take it."""
        sleeps = time.monotonic() + SPIN_SECONDS
        while True:
            try:
                os.eventfd_read(fd)
                return True
            except BlockingIOError:
                pass
            now = time.monotonic()
            left = deadline - now
            if left <= 0:
                return False
            if now < sleeps:
                os.sched_yield()
                continue
            self._poll.poll(None if left == math.inf else math.ceil(min(left, _LONGEST_POLL) * 1e3))

    def _release(self) -> None:
        """Unmap, once no view is left, and close."""
        self._closed = True
        del self._ring, self._flags
        self._fds.close()


class ShmSender(_End):
    """The sending end; it takes over the descriptors."""

    def __init__(self, fds: ShmFds, edge: Edge) -> None:
        super().__init__(fds, edge, mmap.PROT_READ | mmap.PROT_WRITE)
        self._poll.register(self._room, select.POLLIN)

    def send(self, number: int, array: np.ndarray) -> None:
        if self._closed:
            raise closed(self._edge)
        code = dtype_code(self._edge, number, array)
        try:
            os.eventfd_read(self._room)
        except BlockingIOError:
            if not self._take(self._room, time.monotonic() + self._edge.timeout):
                raise full(self._edge) from None
        if self._flags[_RECEIVER_CLOSED] or self._flags[_ABANDONED]:
            raise gone(self._edge)
        pack_header(self._ring, self._offset, code, self._index, number, array)
        np.copyto(np.ndarray(array.shape, array.dtype, self._ring, self._offset + HEADER_BYTES), array)
        self._advance()
        os.eventfd_write(self._ready, 1)

    def close(self) -> None:
        if not self._closed:
            pack_goodbye(self._ring, self._offset, self._index)
            os.eventfd_write(self._ready, 1)
            self._release()


class ShmReceiver(_End):
    """The receiving end; it takes over the descriptors."""

    def __init__(self, fds: ShmFds, edge: Edge) -> None:
        super().__init__(fds, edge, mmap.PROT_READ)
        self._poll.register(self._ready, select.POLLIN)
        self._trouble: str | None = None

    def fileno(self) -> int:
        return self._ready

    def receive(self, timeout: float | None) -> tuple[int, np.ndarray] | None:
        if self._closed:
            raise closed(self._edge)
        try:
            os.eventfd_read(self._ready)
        except BlockingIOError:
            if not self._take(self._ready, math.inf if timeout is None else time.monotonic() + timeout):
                return None
        try:
            if self._trouble is not None:
                raise ChannelError(self._trouble)
            if self._flags[_ABANDONED]:
                raise gone(self._edge)
            number, dtype, shape, _ = unpack_header(self._edge, self._ring, self._offset, self._index)
        except ChannelError as error:
            self._trouble = str(error)
            os.eventfd_write(self._ready, 1)  # so that it is found again, and stays readable
            raise
        array = np.ndarray(shape, dtype, self._ring, self._offset + HEADER_BYTES)
        self._advance()
        os.eventfd_write(self._room, 1)
        return number, array

    def close(self) -> None:
        if not self._closed:
            self._flags[_RECEIVER_CLOSED] = 1
            os.eventfd_write(self._room, _MANY)
            self._release()
