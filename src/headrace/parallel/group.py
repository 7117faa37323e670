"""Groups: the ranks that hold a model between them, and the sums and columns that they give each other.

    file = SharedGroup.create(GroupSizes(ranks, rows, dim, logits, columns))  # the coordinator: a descriptor
    group = SharedGroup(file, rank)                                           # each rank, in its process
    ops = NativeOps(threads, group=group)                                     # or ReferenceOps

Ranks of several hosts use a ChannelGroup instead. Sums are made in the order of the ranks, by each rank for itself,
from the same bytes: so all have the same result, whatever carries it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import ConfigError, EngineDeadError
from ..kernels import native
from .channel import Receiver, Sender

BUFFERS = 4  # csrc/group.h says why
_MAGIC = b"hrgroup1"
_HEADER = struct.Struct("<8s5q")
_ABORT_AT, _LINE, _PAGE = 64, 128, 4096
_MOST = 1 << 24
_MAX_RANKS = 1024
_YIELDING, _NAP = 1e-3, 50e-6  # seconds
_PATIENCE = 0.2  # seconds between two looks at whether the group was aborted
_MAX_EARLY = 64  # messages that came before they were waited for


@dataclass(frozen=True)
class GroupSizes:
    """What a group can hold of one step: rows and width of partial sums (the model's dim); rows of logits, and the
    columns of the rank that has most of them (both 0 where its layers do not end in the head)."""

    ranks: int
    rows: int
    width: int
    logits: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= _MAX_RANKS:
            raise ConfigError(f"a group of {self.ranks} ranks; it has 1 to {_MAX_RANKS}")
        for name in ("rows", "width", "logits", "columns"):
            if not 0 <= getattr(self, name) <= _MOST:
                raise ConfigError(f"a group's {name} must be from 0 to {_MOST}, got {getattr(self, name)}")


class _Layout:
    """Places in a rank's area, in bytes; csrc/group.cpp has the same."""

    def __init__(self, sizes: GroupSizes) -> None:
        self.buffer = _rounded(sizes.rows * sizes.width * 4, 64)
        self.logits = BUFFERS * self.buffer
        best = self.logits + _rounded(sizes.logits * sizes.columns * 4, 64)
        tokens = best + _rounded(sizes.logits * 12, 64)
        self.bytes = _rounded(tokens + sizes.logits * 4, _PAGE)
        self.first = _rounded(_LINE * (sizes.ranks + 1), _PAGE)
        self.file = self.first + sizes.ranks * self.bytes


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to


class SharedGroup:
    """The ranks of one host, over a file in memory. It serves one native program, or else the numpy set's calls; these
    rely on the order in which x86 makes stores visible: ConfigError on other processors.

    Where a rank may still wait for others, `abort` must come before its op set is let go of.
    """

    @staticmethod
    def create(sizes: GroupSizes) -> int:
        """A descriptor of a new group's file, which lives as long as someone has it open. Only what steps use of it
        takes memory."""
        if sys.platform != "linux":
            raise ConfigError("ranks share memory on Linux alone; use 1 rank, or channels")
        file = os.memfd_create("headrace-group", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, _Layout(sizes).file)
        os.pwrite(file, _HEADER.pack(_MAGIC, *astuple(sizes)), 0)
        # Nobody can make it shorter, which would end those who read it.
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return file

    def __init__(self, file: int, rank: int) -> None:
        """Open a group's file as one of its ranks. The descriptor may be closed afterwards. ConfigError where it is no
        such file."""
        size = os.fstat(file).st_size
        header = os.pread(file, _HEADER.size, 0)
        magic, *sizes = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"",)
        self.sizes = GroupSizes(*sizes) if magic == _MAGIC else GroupSizes(1, 0, 0)
        self._layout = _Layout(self.sizes)
        if magic != _MAGIC or size != self._layout.file or not 0 <= rank < self.sizes.ranks:
            raise ConfigError(f"a file of {size} bytes is not that of a group with a rank {rank}")
        self.rank, self.size = rank, self.sizes.ranks
        self._memory = mmap.mmap(file, size)
        self._native: Any = None if native.missing() else native.shared_group(file, rank)
        self._words = np.frombuffer(self._memory, np.uint64, self._layout.first // 8)
        self._reductions = 0

    def native(self) -> Any:
        return self._native

    def start(self, partial: np.ndarray) -> _SharedReduction:
        """As `Group.start`; at most BUFFERS / 2 reductions are under way at once."""
        _check_rows(self, partial)
        buffer = self._reductions % BUFFERS
        self._reductions += 1
        self._view(self.rank, buffer * self._layout.buffer, partial.shape)[:] = partial
        return _SharedReduction(self, self._post(), buffer, partial.shape)

    def gather(self, own: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
        """As `Group.gather`. ConfigError where the group has no room for it."""
        _check_columns(self, own, cuts)
        whole = np.empty((len(own), cuts[-1]), np.float32)
        shape = (len(own), self.sizes.columns)
        self._view(self.rank, self._layout.logits, shape)[:, : own.shape[1]] = own
        self._await(self._post())
        for rank in range(self.size):
            columns = slice(cuts[rank], cuts[rank + 1])
            whole[:, columns] = self._view(rank, self._layout.logits, shape)[:, : cuts[rank + 1] - cuts[rank]]
        self._await(self._post())  # before anyone's next columns come
        return whole

    def abort(self) -> None:
        """End every wait of every rank, from any process that has the file open: the steps that wait fail with
        EngineDeadError, and so do all that follow."""
        self._words[_ABORT_AT // 8] = 1

    @property
    def aborted(self) -> bool:
        return bool(self._words[_ABORT_AT // 8])

    def _view(self, rank: int, at: int, shape: tuple[int, ...]) -> np.ndarray:
        rows, width = shape
        start = self._layout.first + rank * self._layout.bytes + at
        return np.frombuffer(self._memory, np.float32, rows * width, start).reshape(rows, width)

    def _post(self) -> int:
        if platform.machine() != "x86_64":
            raise ConfigError(f"ranks of the numpy set share memory on x86-64 alone, not on {platform.machine()}")
        word = _LINE * (self.rank + 1) // 8
        self._words[word] += np.uint64(1)
        return int(self._words[word])

    def _await(self, number: int) -> None:
        posted = self._words[_LINE // 8 :: _LINE // 8][: self.size]
        started = time.monotonic()
        while int(posted.min()) < number:
            if self.aborted:
                raise EngineDeadError("a group of ranks was aborted while this one waited; start the ranks anew")
            time.sleep(0 if time.monotonic() - started < _YIELDING else _NAP)


class _SharedReduction:
    def __init__(self, group: SharedGroup, number: int, buffer: int, shape: tuple[int, ...]) -> None:
        self._group, self._number, self._buffer, self._shape = group, number, buffer, shape

    def wait(self) -> np.ndarray:
        group = self._group
        group._await(self._number)
        parts = (group._view(rank, self._buffer * group._layout.buffer, self._shape) for rank in range(group.size))
        return _sum(parts)


class ChannelGroup:
    """Ranks anywhere, each with a channel to and from every other: `senders[r]` and `receivers[r]` lead to rank r, and
    its own are None. It closes none of them.

    An edge must hold `max_bytes` of a step's partial sums, and of its logits, and a few messages.
    """

    def __init__(
        self, sizes: GroupSizes, rank: int, senders: Sequence[Sender | None], receivers: Sequence[Receiver | None]
    ) -> None:
        if not 0 <= rank < sizes.ranks or len(senders) != sizes.ranks or len(receivers) != sizes.ranks:
            found = f"{len(senders)} senders and {len(receivers)} receivers"
            raise ConfigError(f"a group of {sizes.ranks} ranks with rank {rank}, {found}; give one for each rank")
        self.sizes, self.rank, self.size = sizes, rank, sizes.ranks
        to = {other: end for other, end in enumerate(senders) if end is not None and other != rank}
        of = {other: end for other, end in enumerate(receivers) if end is not None and other != rank}
        if not len(to) == len(of) == sizes.ranks - 1:
            raise ConfigError(f"rank {rank} lacks a channel to or from one of the other {sizes.ranks - 1} ranks")
        self._mesh = _Mesh(to, of)
        self._posted = 0
        self._native: Any = None

    def native(self) -> Any:
        if self._native is None:
            self._native = native.channel_group(self.rank, astuple(self.sizes), self._mesh.send, self._mesh.fill)
        return self._native

    def start(self, partial: np.ndarray) -> _ChannelReduction:
        """As `Group.start`."""
        _check_rows(self, partial)
        return _ChannelReduction(self, self._post(partial), partial.copy())

    def gather(self, own: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
        """As `Group.gather`."""
        _check_columns(self, own, cuts)
        parts = self._exchanged(self._post(own), own, [(len(own), past - first) for first, past in pairwise(cuts)])
        return np.concatenate(parts, axis=1)

    def abort(self) -> None:
        """End every wait of this rank. The others notice when its channels are closed."""
        self._mesh.aborted = True
        if self._native is not None:
            self._native.abort()

    @property
    def aborted(self) -> bool:
        return self._mesh.aborted or (self._native is not None and self._native.aborted)

    def _post(self, array: np.ndarray) -> int:
        self._posted += 1
        self._mesh.send(self._posted, array)
        return self._posted

    def _exchanged(self, number: int, own: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """What each rank posted as an event, in the ranks' order."""
        taken = (own if rank == self.rank else self._mesh.take(rank, number) for rank in range(self.size))
        return [array.reshape(shape) for array, shape in zip(taken, shapes, strict=True)]


class _Mesh:
    """One rank's channels. Native code holds it too, so it does not hold the group."""

    def __init__(self, senders: dict[int, Sender], receivers: dict[int, Receiver]) -> None:
        self._senders, self._receivers = senders, receivers
        self._early: dict[tuple[int, int], np.ndarray] = {}  # by rank and event: what came before it was waited for
        self.aborted = False

    def send(self, number: int, array: np.ndarray) -> None:
        """Send this rank's part of an event to all others."""
        try:
            for sender in self._senders.values():
                sender.send(number, array)
        except BaseException:
            self.aborted = True
            raise

    def take(self, rank: int, number: int) -> np.ndarray:
        """Another rank's part of an event."""
        while (rank, number) not in self._early:
            if self.aborted:
                raise EngineDeadError("a group of ranks was aborted while this one waited; start the ranks anew")
            if (message := self._receivers[rank].receive(_PATIENCE)) is not None:
                event, array = message
                if len(self._early) >= _MAX_EARLY:
                    raise EngineDeadError(f"rank {rank} sent event {event} while {number} is missing; start them anew")
                self._early[rank, event] = array.copy()
        return self._early.pop((rank, number))

    def fill(self, rank: int, number: int, out: np.ndarray) -> None:
        """The same, as bytes."""
        taken = self.take(rank, number)
        if taken.nbytes != out.nbytes:
            raise EngineDeadError(f"event {number} of rank {rank} has {taken.nbytes} bytes, not {out.nbytes}")
        out[:] = taken.reshape(-1).view(np.uint8)


class _ChannelReduction:
    def __init__(self, group: ChannelGroup, number: int, own: np.ndarray) -> None:
        self._group, self._number, self._own = group, number, own

    def wait(self) -> np.ndarray:
        return _sum(self._group._exchanged(self._number, self._own, [self._own.shape] * self._group.size))


def _sum(parts: Iterable[np.ndarray]) -> np.ndarray:
    """In their order."""
    return reduce(np.add, parts)


def _check_rows(group: SharedGroup | ChannelGroup, partial: np.ndarray) -> None:
    rows, width = partial.shape
    if rows > group.sizes.rows or width != group.sizes.width:
        room = f"{group.sizes.rows} rows of {group.sizes.width}"
        raise ConfigError(f"partial sums of {rows} rows of {width} in a group made for {room}; make it wider")


def _check_columns(group: SharedGroup | ChannelGroup, own: np.ndarray, cuts: Sequence[int]) -> None:
    rows, most = len(own), max(past - first for first, past in pairwise(cuts))
    if rows > group.sizes.logits or most > group.sizes.columns:
        room = f"{group.sizes.logits} rows of {group.sizes.columns}"
        raise ConfigError(f"{rows} rows of up to {most} columns in a group made for {room}; make it wider")
