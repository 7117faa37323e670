"""Where steps run. An executor takes steps, and says what came of them in whatever order that is; it never reorders a
path's steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from ..schedule.routes import Replica
from ..types import NO_TOKEN, Step, StepResult


class Pending(Protocol):
    """A step that was submitted. `result` waits for it, and raises what made it fail."""

    def result(self) -> StepResult: ...


@dataclass(frozen=True)
class Broken:
    """A step failed, and what the workers know is in doubt."""

    number: int
    error: str


@dataclass(frozen=True)
class Change:
    """A replica has joined, with empty pools; is gone, with its pages; or is to leave once its sequences are done.
    `crashed`: it ended by itself, maybe for what it computed."""

    kind: Literal["joined", "lost", "leaving"]
    replica: Replica
    crashed: bool = False


Outcome = StepResult | Broken | Change


class Executor(Protocol):
    def submit(self, step: Step) -> None: ...

    def collect(self, at_most: float | None = None) -> Outcome | None:
        """What happened next: waits for it while steps are in flight, and `at_most` seconds where a number is given."""
        ...

    def forget(self, numbers: list[int]) -> None:
        """The scheduler has revoked these steps: nobody waits for them any more."""
        ...

    def stop(self, replica: Replica) -> None:
        """A replica that was to leave has nothing more to do."""
        ...

    def reset(self) -> None:
        """Wait for what was submitted, whatever becomes of it, and forget every sequence."""
        ...

    def close(self) -> None: ...


class Single:
    """What executors of one worker, which answers in order and never comes or goes, have in common."""

    def __init__(self) -> None:
        self._open: deque[tuple[int, Pending]] = deque()

    def collect(self, at_most: float | None = None) -> Outcome | None:
        if not self._open:
            return None
        number, pending = self._open.popleft()
        try:
            return pending.result()
        except Exception as error:
            return Broken(number, f"{type(error).__name__}: {error}")

    def forget(self, numbers: list[int]) -> None:
        raise NotImplementedError("one worker's steps are revoked together, by reset")

    def stop(self, replica: Replica) -> None:
        raise NotImplementedError("one worker does not leave")


class ThreadExecutor(Single):
    """Runs one runner in a thread of its own: for op sets whose calls run at once. `forget` drops all its sequences."""

    def __init__(self, run: Callable[[Step], StepResult], forget: Callable[[], None]) -> None:
        super().__init__()
        self._run, self._forget = run, forget
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="headrace-worker")

    def submit(self, step: Step) -> None:
        future: Future[StepResult] = self._thread.submit(self._run, step)
        self._open.append((step.number, future))

    def reset(self) -> None:
        self._open.clear()
        self._thread.submit(self._forget).result()

    def close(self) -> None:
        self._thread.shutdown()


class NullExecutor(Single):
    """A device that is not there: answers at once, and every sampled token is `token`. Runs the real scheduler
    without a model."""

    def __init__(self, token: int = 1) -> None:
        super().__init__()
        self._token = token

    def submit(self, step: Step) -> None:
        now = time.monotonic()
        tokens = tuple(self._token if chunk.samples else NO_TOKEN for chunk in step.chunks)
        self._open.append((step.number, _Answered(StepResult(step.number, tokens, started=now, ended=now))))

    def reset(self) -> None:
        self._open.clear()

    def close(self) -> None:
        pass


class _Answered:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result
