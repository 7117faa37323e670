"""What happened when: a StepTrace a step, a StageSpan a step and rank, a Mark a failure; kept in bounded rings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepTrace:
    """Times in seconds, time.monotonic. The host's work on a step is (submitted - planned) + (applied - answered)."""

    number: int
    chunks: int
    rows: int
    planned: float  # planning began
    submitted: float
    started: float  # on the worker
    ended: float
    answered: float  # the engine saw the result
    applied: float
    expert_load: tuple[int, ...] = ()  # of each layer of experts in turn, how many rows chose each of them

    @property
    def host(self) -> float:
        return (self.submitted - self.planned) + (self.applied - self.answered)


class StageSpan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A step on one rank of a split model. Times in seconds of the coordinator's time.monotonic."""

    step: int
    rows: int
    stage: int
    replica: int
    rank: int
    received: float  # the step came from the coordinator
    hidden: float  # the hidden states came from the stage before; on the first stage as `received`
    started: float
    ended: float
    sent: float = 0.0  # the channel to the next stage had taken the hidden states; 0 where this rank sends none
    reduces: int = 0  # sums over the replica's ranks, all between `started` and `ended`
    reduce_bytes: int = 0
    reduce_seconds: float = 0.0

    @property
    def busy(self) -> float:
        return self.ended - self.started


MarkKind = Literal["lost", "detected", "restarted", "joined", "left", "revoked"]


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """Something that befell the workers, in seconds of the coordinator's time.monotonic. Where `stage`, `replica` or
    `rank` is None it concerns all of them."""

    time: float
    kind: MarkKind
    stage: int | None = None
    replica: int | None = None
    rank: int | None = None
    text: str = ""


LATE = 2.0  # seconds by which a span may come behind one that ended later


class Trace:
    """The last `capacity` steps, and the last spans and marks. `observer` hears of every span and mark."""

    def __init__(self, capacity: int = 4096, spans: int = 65536, marks: int = 4096) -> None:
        self._steps: deque[StepTrace] = deque(maxlen=capacity)
        self._spans: deque[StageSpan] = deque(maxlen=spans)
        self._marks: deque[Mark] = deque(maxlen=marks)
        self.observer: Callable[[StageSpan | Mark], None] | None = None

    def add(self, entry: StepTrace | StageSpan | Mark) -> None:
        if isinstance(entry, StepTrace):
            self._steps.append(entry)
            return
        if isinstance(entry, StageSpan):
            self._spans.append(entry)
        else:
            self._marks.append(entry)
        if self.observer is not None:
            self.observer(entry)

    def since(self, time: float, most: int) -> tuple[list[StepTrace], list[StageSpan], list[Mark]]:
        """What ended after a time, the latest `most` steps, spans and marks."""
        return (
            _latest(self._steps, lambda step: step.applied, time, most),
            _latest(self._spans, lambda span: span.ended, time, most),
            _latest(self._marks, lambda mark: mark.time, time, most),
        )

    def clear(self) -> None:
        self._steps.clear()
        self._spans.clear()
        self._marks.clear()

    @property
    def spans(self) -> tuple[StageSpan, ...]:
        """In the order in which they were added."""
        return tuple(self._spans)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """In the order in which they were added."""
        return tuple(self._marks)

    def __iter__(self) -> Iterator[StepTrace]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def _latest(entries: deque[T], ended: Callable[[T], float], time: float, most: int) -> list[T]:
    found: list[T] = []
    for entry in reversed(entries):
        if len(found) == most or ended(entry) < time - LATE:
            break
        if ended(entry) >= time:
            found.append(entry)
    return found[::-1]
