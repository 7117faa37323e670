"""A rank in a process of its own: its share of a range of layers, run step by step.

Steps are prepared in the order in which the coordinator sends them. A step of the first stage is launched at once, one
of another stage when its hidden states come, so that a slow replica of the stage before holds up only its own steps.
The ranks of a replica must launch steps in one order: rank 0 leads, and hands the hidden states on to the others.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from contextlib import suppress

import numpy as np

from ..errors import ChannelError
from ..parallel.watch import Watch
from ..trace import StageSpan
from ..types import StepResult
from .control import (
    NO_HIDDEN,
    Answer,
    Beat,
    Broke,
    Connect,
    Disconnect,
    Ping,
    Place,
    Pong,
    Reset,
    Run,
    Skip,
    Spans,
    Stop,
    ToRank,
)
from .edges import Edges
from .link import Link
from .runner import Launched, NativeRunner, Prepared, Runner

ALONE_STEPS = 16
AHEAD = 2  # steps launched and not yet taken in
BEATS = 4  # in the time after which silence counts as death
MAX_EARLY = 256  # hidden states that came before their steps
SPANS_TOGETHER = 64
SPAN_SECONDS = 0.2  # at most between a step and the report of it


class _Waiting:
    """A step that was prepared."""

    __slots__ = ("hidden", "hidden_time", "prepared", "received", "run")

    def __init__(self, run: Run, prepared: Prepared) -> None:
        self.run, self.prepared = run, prepared
        self.received = self.hidden_time = time.monotonic()
        self.hidden: np.ndarray | None = None


class Worker:
    """Obeys a coordinator until its link closes."""

    def __init__(
        self, link: Link[ToRank], place: Place, runner: Runner | NativeRunner, host: str, secret: bytes = b""
    ) -> None:
        self._link, self._place, self._runner = link, place, runner
        self._ends, self._leads = place.stage == place.stages - 1, place.rank == 0
        self._edges = Edges(host, link.send, secret)
        self._waiting: dict[int, _Waiting] = {}  # for their hidden states, by step
        self._early: dict[int, np.ndarray] = {}  # hidden states before their steps
        self._handed: deque[tuple[int, np.ndarray]] = deque()  # by the leader of the ranks, in its order
        self._unwanted: set[int] = set()  # steps whose hidden states may still come
        self._first = 0  # steps before it are forgotten
        self._ready: deque[_Waiting] = deque()
        self._launched: deque[tuple[_Waiting, Launched]] = deque()
        self._spans: list[StageSpan] = []
        self._reported = 0.0
        self._running = True
        self._since_company = 0  # steps, since one was there while another was
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # rings when a step is done
        runner.ring(self._bell)

    def run(self) -> None:
        while self._running and not self._link.closed:
            while self._launched and (self._alone or self._launched[0][1].done()):
                self._take_in(*self._launched.popleft())
            while self._ready and len(self._launched) < AHEAD:
                self._launch(self._ready.popleft())
            self._listen(wait=not (self._launched and (self._alone or self._launched[0][1].done())))

    @property
    def _alone(self) -> bool:
        """Whether no other step has come lately while one was computed. Then to wait for that alone is faster."""
        return self._since_company > ALONE_STEPS and len(self._launched) == 1 and not self._ready

    # What comes

    def _listen(self, *, wait: bool) -> None:
        """Hear what has come; with `wait`, something that matters."""
        poll, link = select.poll(), self._link
        poll.register(link.fileno(), select.POLLIN | (select.POLLOUT if link.unsent else 0))
        for fd in (self._bell, self._edges.fileno()):
            poll.register(fd, select.POLLIN)
        for fd in self._edges.receivers:
            poll.register(fd, select.POLLIN)
        if wait:
            self._runner.rest()
        for fd, _ in poll.poll((SPAN_SECONDS * 1000 if self._spans else None) if wait else 0):
            if fd == link.fileno():
                link.flush()
                for message in link.receive():
                    self._obey(message)
            elif fd == self._bell:
                os.eventfd_read(fd)
            elif fd == self._edges.fileno():
                self._edges.settle()
            elif fd in self._edges.receivers:
                self._hear(fd)
        if self._spans and (len(self._spans) >= SPANS_TOGETHER or time.monotonic() > self._reported + SPAN_SECONDS):
            self._report()

    def _obey(self, message: ToRank) -> None:
        if isinstance(message, Run):
            self._prepare(message)
        elif isinstance(message, Skip):
            self._skip(message.numbers)
        elif isinstance(message, Connect):
            self._edges.open(message, self._link.take_fds(3) if message.transport == "shm" else ())
        elif isinstance(message, Disconnect):
            for edge in message.edges:
                self._edges.close(edge)
        elif isinstance(message, Reset):
            self._reset(message.number)
        elif isinstance(message, Ping):
            self._link.send(Pong(message.time, time.monotonic()))
        elif isinstance(message, Stop):
            self._running = False

    def _prepare(self, run: Run) -> None:
        number = run.step.number
        try:
            waiting = _Waiting(run, self._runner.prepare(run.step))
        except Exception as error:
            self._break(number, error)
            return
        if not run.source:
            self._ready.append(waiting)
        elif (hidden := self._early.pop(number, None)) is not None:
            self._give(waiting, hidden)
        else:
            self._waiting[number] = waiting
            self._follow()

    def _hear(self, fd: int) -> None:
        """Take the hidden states that have come over one edge."""
        receiver = self._edges.receivers[fd]
        try:
            while (message := receiver.receive(0.0)) is not None:
                number, hidden = message
                if not self._leads:
                    self._handed.append((number, hidden.copy()))
                elif (waiting := self._waiting.pop(number, None)) is not None:
                    self._give(waiting, hidden.copy())
                elif number in self._unwanted:
                    self._unwanted.discard(number)
                elif number >= self._first and len(self._early) < MAX_EARLY:
                    self._early[number] = hidden.copy()
        except ChannelError:
            self._edges.close_receiver(fd)  # the coordinator knows why, or will
        self._follow()

    def _follow(self) -> None:
        """Launch steps in the leader's order, also where their hidden states have overtaken them: ranks that computed
        different steps would add up what does not belong together."""
        while self._handed and self._handed[0][0] in self._waiting:
            number, hidden = self._handed.popleft()
            self._give(self._waiting.pop(number), hidden)

    def _give(self, waiting: _Waiting, hidden: np.ndarray) -> None:
        if hidden.dtype == NO_HIDDEN.dtype:
            return  # the leader of the ranks has skipped it
        waiting.hidden, waiting.hidden_time = hidden, time.monotonic()
        self._ready.append(waiting)

    def _skip(self, numbers: tuple[int, ...]) -> None:
        """Forget steps that were not launched. The other ranks hear of it from the leader, in its order."""
        if not self._leads:
            return
        for number in numbers:
            if self._waiting.pop(number, None) is not None:
                for edge in self._edges.within:
                    self._edges.send(edge, number, NO_HIDDEN)
            elif self._early.pop(number, None) is None:
                self._unwanted.add(number)
        while len(self._unwanted) > MAX_EARLY:
            self._unwanted.discard(min(self._unwanted))

    def _reset(self, number: int) -> None:
        """Forget everything; hidden states of steps before `number` are of no use."""
        while self._launched:
            with suppress(Exception):
                self._output(self._launched.popleft()[1])
        for forgotten in (self._waiting, self._early, self._ready, self._unwanted):
            forgotten.clear()
        self._first = number
        self._runner.clear()

    # Steps

    def _launch(self, waiting: _Waiting) -> None:
        number = waiting.run.step.number
        if waiting.hidden is not None and self._leads:
            for edge in self._edges.within:
                self._edges.send(edge, number, waiting.hidden)
        try:
            self._launched.append((waiting, self._runner.launch(waiting.prepared, waiting.hidden)))
        except Exception as error:
            self._break(number, error)

    def _take_in(self, waiting: _Waiting, launched: Launched) -> None:
        """Wait for a step, and pass on what it gave."""
        self._since_company = 0 if self._launched or self._ready or self._waiting else self._since_company + 1
        run, place, sent = waiting.run, self._place, 0.0
        try:
            output = self._output(launched)
            if isinstance(output, StepResult):
                if self._leads:
                    self._link.send(Answer(output))
            elif run.target is not None:
                self._edges.send(run.target, run.step.number, output)
                sent = time.monotonic()
        except Exception as error:
            self._break(run.step.number, error)
            return
        stamps = (waiting.received, waiting.hidden_time, *launched.times, sent)
        at = (place.stage, place.replica, place.rank)
        self._spans.append(StageSpan(run.step.number, run.step.rows, *at, *stamps, *launched.reduces))

    def _output(self, launched: Launched) -> StepResult | np.ndarray:
        return launched.result() if self._ends else launched.hidden()

    def _break(self, number: int, error: Exception) -> None:
        self._link.send(Broke(number, f"{self._place}: {type(error).__name__}: {error}"))

    def _report(self) -> None:
        self._link.send(Spans(self._spans))
        self._spans, self._reported = [], time.monotonic()


def beat(link: Link[ToRank], silence: float, watch: Watch | None = None) -> None:
    """In a thread: give signs of life, and end the process when its coordinator is gone, whatever it waits for. `watch`
    tells of one on another host."""
    while not link.closed and not (watch and watch.vanished()):
        if link.unsent:
            link.flush()
        else:
            link.send(Beat(time.monotonic()))
        time.sleep(silence / BEATS)
    os._exit(1)
