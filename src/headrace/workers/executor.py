"""Where steps run. An executor takes steps in order and answers each with a Pending; it never reorders a sequence's
steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ..types import NO_TOKEN, Step, StepResult


class Pending(Protocol):
    """A step that was submitted. `result` waits for it, and raises what made it fail."""

    def result(self) -> StepResult: ...


class Executor(Protocol):
    def submit(self, step: Step) -> Pending: ...

    def reset(self) -> None:
        """Wait for what was submitted, whatever becomes of it, and forget every sequence."""
        ...

    def close(self) -> None: ...


class ThreadExecutor:
    """Runs one runner in a thread of its own: for op sets whose calls run at once. `forget` drops all its sequences."""

    def __init__(self, run: Callable[[Step], StepResult], forget: Callable[[], None]) -> None:
        self._run, self._forget = run, forget
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="headrace-worker")

    def submit(self, step: Step) -> Future[StepResult]:
        return self._thread.submit(self._run, step)

    def reset(self) -> None:
        self._thread.submit(self._forget).result()

    def close(self) -> None:
        self._thread.shutdown()


class NullExecutor:
    """A device that is not there: answers at once, and every sampled token is `token`. Runs the real scheduler
    without a model."""

    def __init__(self, token: int = 1) -> None:
        self._token = token

    def submit(self, step: Step) -> Pending:
        now = time.monotonic()
        tokens = tuple(self._token if chunk.samples else NO_TOKEN for chunk in step.chunks)
        return _Answered(StepResult(step.number, tokens, started=now, ended=now))

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Answered:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result
