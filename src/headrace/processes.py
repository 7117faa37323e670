"""What holds for every process that Headrace starts: it does not outlive the one that started it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the one that started it dies, or now if that was process `parent` and it has
    died before this call. Other systems have no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


COMPUTE_NICENESS = 5  # a third of a usual thread's weight, where there are fewer cores than threads that want one


def stand_back(since: set[int]) -> None:
    """Let this process's threads that are not among `since` leave their core at once to threads that carry an answer
    on: those compute without a pause, and would keep it for a tick of the clock, 4 ms. Linux only."""
    for thread in threads() - since:
        try:
            os.setpriority(os.PRIO_PROCESS, thread, COMPUTE_NICENESS)
        except (OSError, AttributeError):
            pass  # it has ended, or was told more than that


def threads() -> set[int]:
    """The system's numbers of this process's threads; none where it does not tell."""
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return set()


_GC_THRESHOLD = gc.get_threshold()


def prepare_to_load() -> None:
    """Let the garbage collector look less often, until `settle`: a vocabulary is a hundred thousand objects, and none
    of them is garbage."""
    gc.set_threshold(50_000)


def settle() -> None:
    """What is here now stays: tell the garbage collector, whose looks at all of it would hold up answers."""
    gc.freeze()
    gc.collect()  # of little: the next whole look comes when a quarter of what this one leaves has come together
    gc.set_threshold(*_GC_THRESHOLD)


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Hold back SIGINT until the block is left, or calls what this gives; then its handler gets it. Only the main
    thread hears signals."""
    handler = signal.getsignal(signal.SIGINT)
    frames: list[FrameType | None] = []

    def deliver() -> None:
        if frames and callable(handler):
            handler(signal.SIGINT, frames.pop())

    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield deliver
        return
    signal.signal(signal.SIGINT, lambda number, frame: frames.append(frame))
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, handler)
    deliver()
