"""The whole engine: schedule, submit, apply, emit. Tokens in, tokens out; text is the doors' affair."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from .errors import ConfigError
from .schedule.scheduler import Scheduler
from .trace import StepTrace, Trace
from .types import Event, FinishReason, Request, Step
from .workers.executor import Executor, Pending


class Engine:
    """Keeps up to `steps_in_flight` steps submitted, so that a worker never waits for the host. Not thread-safe:
    one loop owns it."""

    def __init__(self, scheduler: Scheduler, executor: Executor, steps_in_flight: int = 2) -> None:
        if not 1 <= steps_in_flight <= 64:
            raise ConfigError(f"steps_in_flight must be from 1 to 64, got {steps_in_flight}")
        self.scheduler, self.executor, self.steps_in_flight = scheduler, executor, steps_in_flight
        self.trace = Trace()
        self.observer: Callable[[Step, StepTrace], None] | None = None  # hears of every step that was applied
        self._flight: deque[tuple[Step, Pending, float, float]] = deque()

    def step(self) -> list[Event]:
        """Fill the queue, then take in the oldest step in flight. An empty list may mean no news; see `busy`.

        Where a step breaks, its sequences end with an error and all others start again: none is lost, none is wrong.
        """
        events = self.scheduler.expire(time.monotonic())
        events += self._fill()
        if self._flight:
            events += self._apply_oldest()
        return events

    def _fill(self) -> list[Event]:
        while len(self._flight) < self.steps_in_flight:
            planned = time.monotonic()
            step = self.scheduler.plan(planned)
            if step is None:
                break
            try:
                pending = self.executor.submit(step)
            except Exception as error:
                return self._fail(step, error)
            self._flight.append((step, pending, planned, time.monotonic()))
        return []

    def _apply_oldest(self) -> list[Event]:
        step, pending, planned, submitted = self._flight.popleft()
        try:
            result = pending.result()
        except Exception as error:
            return self._fail(step, error)
        answered = time.monotonic()
        events = self.scheduler.apply(result, answered)
        times = (planned, submitted, result.started, result.ended, answered, time.monotonic())
        entry = StepTrace(step.number, len(step.chunks), step.rows, *times, result.expert_load)
        self.trace.add(entry)
        if self.observer is not None:
            self.observer(step, entry)
        return events

    def _fail(self, step: Step, error: Exception) -> list[Event]:
        """What the workers know is in doubt: they forget everything, and the scheduler starts anew without the step."""
        events = self.scheduler.fail(
            step.number, f"the engine failed: {type(error).__name__}: {error}", time.monotonic()
        )
        self._flight.clear()
        self.executor.reset()
        return events

    def add(self, request: Request) -> None:
        """Queue one sequence; RequestError or CapacityError where it cannot run."""
        self.scheduler.add(request)

    def finish(
        self, request_id: str, sample_index: int | None = None, reason: FinishReason = "cancelled"
    ) -> list[Event]:
        """End a request, or one of its samples, at once."""
        return self.scheduler.finish(request_id, sample_index, reason, time.monotonic())

    @property
    def busy(self) -> bool:
        return bool(self._flight) or self.scheduler.unfinished > 0

    def close(self) -> None:
        """Wait for steps in flight and stop the workers."""
        try:
            while self._flight:
                self._apply_oldest()
        finally:
            self.executor.close()
