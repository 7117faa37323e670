"""What this machine can do at best, measured now: the ceilings that stand beside every rate."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..kernels import native

PASS_BYTES = 512 << 20  # read by all threads in one timing, so that starting a thread is not what is measured
REPEATS = 5
MAX_BUFFER = 1 << 30  # beyond this the working set is memory anyway


@dataclass(frozen=True)
class Ceilings:
    """`read` in GB/s; `compute` in GOP/s (a multiply-add is two) of `arithmetic`: "int8" or "float32" products."""

    read: float
    compute: float
    arithmetic: str


def sample_ceilings(kernels: str, working_set: int, threads: int) -> Ceilings:
    """The ceilings of an op set, by its name: of the arithmetic that it computes in, on its threads."""
    read = read_bandwidth(working_set, threads)
    if kernels == "reference":
        return Ceilings(read, matmul_rate(), "float32")
    from ..kernels import _native

    return Ceilings(read, _native.int8_peak(threads), "int8")


def read_bandwidth(working_set: int, threads: int) -> float:
    """GB/s that `threads` threads read together from a buffer of `working_set` bytes (1 GiB at most), best of a few.

    A set that fits in a cache is read from there, so give the bytes that the measured loop reads each time. Compiled
    where there are compiled kernels.
    """
    if working_set < 1 or threads < 1:
        raise ConfigError(f"bandwidth needs at least 1 byte, 1 thread; got {working_set} bytes and {threads} threads")
    size = min(max(working_set, 4096 * threads), MAX_BUFFER)
    if native.missing() is not None:
        return _numpy_bandwidth(size, threads)
    from ..kernels import _native

    return _native.read_bandwidth(size, threads)


def _numpy_bandwidth(size: int, threads: int) -> float:
    # The maximum of int32 is the one reduction of numpy's that reads memory as fast as hand-written loads do.
    parts = np.array_split(np.ones(size // 4, np.int32), threads)
    passes = max(1, PASS_BYTES // size)
    return max(passes * size / _read_together(parts, passes) for _ in range(REPEATS)) / 1e9


def _read_together(parts: list[np.ndarray], passes: int) -> float:
    """Seconds until every part was read `passes` times, one thread each."""

    def read(part: np.ndarray) -> None:
        for _ in range(passes):
            part.max()

    others = [threading.Thread(target=read, args=(part,)) for part in parts[1:]]
    started = time.perf_counter()
    for thread in others:
        thread.start()
    read(parts[0])
    for thread in others:
        thread.join()
    return time.perf_counter() - started


def matmul_rate(size: int = 768) -> float:
    """GFLOP/s of a float32 product of two [size, size] matrices in numpy's BLAS, on its own threads, best of five."""
    x, y = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    out = np.empty_like(x)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        np.matmul(x, y, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9
