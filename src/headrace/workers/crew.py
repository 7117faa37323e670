"""The processes of one replica, as their coordinator sees them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ..schedule.routes import Replica
from .control import FromRank, Start, ToRank, from_rank
from .link import Link

State = Literal["starting", "connecting", "ready", "gone"]

REAP_SECONDS = 5.0


@dataclass(eq=False)
class Rank:
    """One process, or one that joined from another host, where there is none to see."""

    link: Link[FromRank]
    process: subprocess.Popen[bytes] | None
    heard: float  # when it last said something, seconds of time.monotonic
    beating: bool = False
    ready: bool = False
    pid: int = 0
    offset: float = 0.0  # our clock less its own, seconds

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.kill()

    def reap(self) -> None:
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(REAP_SECONDS)


class Crew:
    """A replica's ranks, all of which live and die together. Never used again: a replica that comes back has another
    crew."""

    def __init__(
        self, key: Replica, starts: Sequence[Start], group: int | None, guests: Sequence[socket.socket]
    ) -> None:
        """Start its processes; `group` is the descriptor of their shared memory. With `guests`, connections to
        processes on other hosts, those are its ranks."""
        self.key, self.state = key, "starting"
        self.began = time.monotonic()
        self.drops: list[int] = []  # handles that it may forget, to be told with its next step
        self.opening: set[int] = set()  # edges that are yet to be opened
        self.joined = False
        self.failed = 0  # starts before this one that failed, since one succeeded
        self.error = ""
        fds = () if group is None else (group,)
        self.ranks: list[Rank] = []
        try:
            for index, start in enumerate(starts):
                rank = _spawn() if not guests else Rank(Link(guests[index], from_rank), None, self.began)
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

    def why(self) -> str:
        """How its processes ended, as far as that is known."""
        codes = [rank.process.poll() for rank in self.ranks if rank.process is not None]
        for code in codes:
            if code is not None and code < 0:
                return f"was ended by {signal.Signals(-code).name}"
            if code is not None:
                return f"ended with code {code}"
        return "hung up"

    def end(self) -> None:
        """Kill what is left, and let go of it."""
        self.state = "gone"
        for rank in self.ranks:
            rank.kill()
            rank.link.close()
        for rank in self.ranks:
            rank.reap()


def _spawn() -> Rank:
    ours, theirs = socket.socketpair()
    module = __name__.removesuffix("workers.crew") + "worker_process"
    command = [sys.executable, "-m", module, str(theirs.fileno())]
    if threading.current_thread() is threading.main_thread():  # Linux means the thread that started it
        command.append("--die-with-parent")
    with theirs:
        process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True, env=_environment()
        )
    return Rank(Link(ours, from_rank), process, time.monotonic(), pid=process.pid)


def _environment() -> dict[str, str]:
    """This process's own, so that the rank imports the same modules; numpy's threads would only be in the way."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ}
    return {**os.environ, **threads}
