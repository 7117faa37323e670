"""The whole engine: schedule, submit, apply, emit. Tokens in, tokens out; text is the doors' affair."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from .schedule.scheduler import Scheduler
from .trace import StepTrace, Trace
from .types import Event, FinishReason, Request, Step, StepResult
from .workers.executor import Broken, Change, Executor, Outcome

LOOK_SECONDS = 0.1  # at most between two looks at deadlines


class _Flight(NamedTuple):
    step: Step
    planned: float
    submitted: float


class Engine:
    """Keeps as many steps submitted as the scheduler plans ahead, so that no worker waits for the host. Not
    thread-safe: one loop owns it."""

    def __init__(self, scheduler: Scheduler, executor: Executor, trace: Trace | None = None) -> None:
        self.scheduler, self.executor = scheduler, executor
        self.trace = Trace() if trace is None else trace
        self.observer: Callable[[Step, StepTrace], None] | None = None  # hears of every step that was applied
        self._flight: dict[int, _Flight] = {}

    def step(self) -> list[Event]:
        """Submit what can be, then take in what happens next. An empty list may mean no news; see `busy`.

        Where a step breaks, its sequences end with an error and all others start again: none is lost, none is wrong.
        """
        events = self.scheduler.expire(time.monotonic())
        events += self._fill()
        if self.busy:
            events += self._take(self.executor.collect(LOOK_SECONDS))
        return events

    def tend(self) -> list[Event]:
        """Between steps: hear of workers that came or went."""
        events: list[Event] = []
        while (outcome := self.executor.collect(0.0)) is not None:
            events += self._take(outcome)
        return events

    def _fill(self) -> list[Event]:
        while True:
            planned = time.monotonic()
            step = self.scheduler.plan(planned)
            if step is None:
                return []
            try:
                self.executor.submit(step)
            except Exception as error:
                return self._fail(step.number, f"{type(error).__name__}: {error}")
            self._flight[step.number] = _Flight(step, planned, time.monotonic())

    def _take(self, outcome: Outcome | None) -> list[Event]:
        events: list[Event] = []
        if isinstance(outcome, StepResult):
            events = self._apply(outcome)
        elif isinstance(outcome, Broken):
            return self._fail(outcome.number, outcome.error)
        elif isinstance(outcome, Change):
            events = self._change(outcome)
        for replica in self.scheduler.left:
            self.executor.stop(replica)
            self._lose(Change("lost", replica))
        return events

    def _apply(self, result: StepResult) -> list[Event]:
        step, planned, submitted = self._flight.pop(result.number)
        answered = time.monotonic()
        events = self.scheduler.apply(result, answered)
        times = (planned, submitted, result.started, result.ended, answered, time.monotonic())
        entry = StepTrace(step.number, len(step.chunks), step.rows, *times, result.expert_load)
        self.trace.add(entry)
        if self.observer is not None:
            self.observer(step, entry)
        return events

    def _change(self, change: Change) -> list[Event]:
        events: list[Event] = []
        if change.kind == "joined":
            self.scheduler.join(change.replica)
        elif change.kind == "leaving":
            self.scheduler.leave(change.replica)
        else:
            if change.crashed:
                events = self.scheduler.blame(change.replica, time.monotonic())
            self._lose(change)
        return events

    def _lose(self, change: Change) -> None:
        """Steps through a replica that is gone are nobody's any more: its sequences run again."""
        numbers = self.scheduler.lose(change.replica)
        for number in numbers:
            del self._flight[number]
        self.executor.forget(numbers)

    def _fail(self, number: int, error: str) -> list[Event]:
        """What the workers know is in doubt: they forget everything, and the scheduler starts anew without the step."""
        events = self.scheduler.fail(number, f"the engine failed: {error}", time.monotonic())
        self._flight.clear()
        self.executor.reset()
        return events

    def add(self, request: Request) -> None:
        """Queue one sequence; RequestError, CapacityError or EngineDeadError where it cannot run."""
        if not self.busy:
            self.tend()  # what befell the workers since the last step
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
        """Stop the workers, once one that is alone has ended its steps."""
        self.executor.close()
