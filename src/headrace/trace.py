"""What happened when: one StepTrace per step (later per step and stage), kept in a bounded ring."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


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


class Trace:
    """The last `capacity` steps."""

    def __init__(self, capacity: int = 4096) -> None:
        self._steps: deque[StepTrace] = deque(maxlen=capacity)

    def add(self, step: StepTrace) -> None:
        self._steps.append(step)

    def clear(self) -> None:
        self._steps.clear()

    def __iter__(self) -> Iterator[StepTrace]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)
