"""What holds for every process that Headrace starts: it does not outlive the one that started it."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies. Other systems have no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


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
