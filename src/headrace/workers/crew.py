"""The processes of one replica, as their coordinator sees them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

from msgspec.structs import replace

from ..schedule.routes import Replica
from ..trace import StageSpan
from ..types import StepResult
from .clock import Clock
from .control import FromRank, Start, ToRank, from_rank
from .link import Link

T = TypeVar("T", StageSpan, StepResult)
State = Literal["starting", "connecting", "ready", "gone"]

_TIMES = ("received", "hidden", "started", "ended", "sent")
REAP_SECONDS = 5.0
EXIT_SECONDS = 0.2  # that a process which has hung up takes at most to be gone
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
PAUSES = (0.0, 0.1, 0.5, 2.0, 5.0)  # seconds before another start, by how many have failed in a row
MAX_STARTS = len(PAUSES)
KILLED_PAUSE = 2  # the longest of PAUSES where starts were ended from outside: that is no fault of theirs


@dataclass(frozen=True)
class Tries:
    """Starts of a replica since it last was there: how many, and how many of them failed by themselves."""

    all: int = 0
    failed: int = 0

    def again(self, killed: bool) -> Tries:
        return Tries(self.all + 1, self.failed + (not killed))

    @property
    def pause(self) -> float:
        return PAUSES[min(max(self.failed, min(self.all, KILLED_PAUSE)), MAX_STARTS - 1)]


@dataclass(eq=False)
class Rank:
    """One process, or one that joined from another host, where there is none to see. Of such a one `here` is our
    address as it reaches us, and `there` its own."""

    link: Link[FromRank]
    process: subprocess.Popen[bytes] | None
    heard: float  # when it last said something, seconds of time.monotonic
    beating: bool = False
    ready: bool = False
    pid: int = 0
    cores: int = 0  # that it may use, where it joined
    here: str = ""
    there: str = ""
    clock: Clock = field(default_factory=Clock)
    meets: dict[int, tuple[str, int]] = field(default_factory=dict)  # where it listens for its replica's other ranks

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.kill()

    @property
    def killed(self) -> bool:
        """Whether a signal from outside ended it, or stopped it."""
        if self.process is None:
            return True
        code = self.process.poll()
        return _is_stopped(self.process.pid) if code is None else -code in FROM_OUTSIDE

    def our_time(self, timed: T) -> T:
        """A result or span of this rank's, by our clock."""
        offset = self.clock.offset
        if not offset:
            return timed
        times = {name: getattr(timed, name) for name in _TIMES if hasattr(timed, name)}
        return replace(timed, **{name: time + offset for name, time in times.items() if time})

    @property
    def crashed(self) -> bool:
        code = None if self.process is None else self.process.poll()
        return code is not None and -code not in FROM_OUTSIDE

    def reap(self) -> None:
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(REAP_SECONDS)


class Crew:
    """A replica's ranks, all of which live and die together. Never used again: a replica that comes back has another
    crew."""

    def __init__(
        self,
        key: Replica,
        starts: Sequence[Start],
        group: int | None,
        starter: ThreadPoolExecutor,
        guests: Sequence[Rank] = (),
    ) -> None:
        """Start its processes, in the one thread of `starter`: they die with the thread that started them. `group` is
        the descriptor of their shared memory. With `guests`, processes that joined from another host, those are its
        ranks."""
        self.key, self.state = key, "starting"
        self.began = time.monotonic()
        self.drops: list[int] = []  # handles that it may forget, to be told with its next step
        self.opening: set[int] = set()  # edges that are yet to be opened
        self.host: str | None = None
        self.joined = False
        self.tries = Tries()
        self.error = ""
        fds = () if group is None else (group,)
        self.ranks: list[Rank] = []
        try:
            for index, start in enumerate(starts):
                rank = guests[index] if guests else _spawn(starter)
                rank.heard = self.began
                self.ranks.append(rank)
                rank.link.send(start, fds)
        except BaseException:
            self.end()
            raise

    state: State

    @property
    def leader(self) -> Rank:
        return self.ranks[0]

    def say(self, message: ToRank) -> None:
        for rank in self.ranks:
            rank.link.send(message)

    def why(self, rank: Rank) -> str:
        """How the process of a rank that hung up ended, as far as that is known."""
        if rank.process is None:
            return "hung up"
        with suppress(subprocess.TimeoutExpired):
            code = rank.process.wait(EXIT_SECONDS)
            return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return "hung up"

    @property
    def killed(self) -> bool:
        """Whether it was ended, or stopped, from outside; to be asked before `end`."""
        return any(rank.killed for rank in self.ranks)

    @property
    def crashed(self) -> bool:
        """Whether one of its processes ended by itself; to be asked before `end`."""
        return any(rank.crashed for rank in self.ranks)

    def end(self) -> None:
        """Kill what is left, and let go of it."""
        self.state = "gone"
        for rank in self.ranks:
            rank.kill()
            rank.link.close()
        for rank in self.ranks:
            rank.reap()


def _spawn(starter: ThreadPoolExecutor) -> Rank:
    ours, theirs = socket.socketpair()
    module = __name__.removesuffix("workers.crew") + "worker_process"
    with theirs:
        start = partial(
            subprocess.Popen,
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment(),
        )
        process = starter.submit(start).result()
    return Rank(Link(ours, from_rank), process, time.monotonic(), pid=process.pid)


def environment() -> dict[str, str]:
    """This process's own, so that the rank imports the same modules; numpy's threads would only be in the way."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ}
    return {**os.environ, **threads}


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process, as far as the system tells."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] == b"T"
    return False
