"""An engine in a process of its own: `python -m headrace.engine_process FD`, FD being its end of a socket pair.

One loop: take what the door sends, run a step, send what came of it. The only other thread compiles grammars. It ends
when the socket does, so it never outlives the door.
"""

from __future__ import annotations

import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from .assemble import EncoderModel, build_embedder, open_any, tokenizer_maker
from .build import build
from .engine import Engine
from .errors import ConfigError, EngineDeadError, HeadraceError, RequestError
from .grammar.compiled import Compiler, Grammars
from .processes import die_with_parent, settle, stand_back, threads
from .trace import StepTrace
from .types import Event, Step
from .workers.encoding import serve_encoder
from .workers.wire import (
    HEADER,
    Add,
    Events,
    Finish,
    FromEngine,
    Inspect,
    Load,
    OpenedPart,
    PageMap,
    Ready,
    Recall,
    Recent,
    Refused,
    Report,
    Scale,
    Scaled,
    ToEngine,
    Wait,
    frame,
    frame_length,
    to_engine,
)

if TYPE_CHECKING:
    from .workers.watch import StageWatch

MAX_UNSENT = 64 << 20

BEAT_SECONDS = 1.0  # between signs of life while nothing but a compile goes on
TEND_SECONDS = 0.05  # between looks at the workers of a split model while no request runs


def serve(door: Door) -> None:
    """Run until the other side closes the door."""
    load = next(iter(door.take(wait=True)), None)
    if not isinstance(load, Load):
        return
    before = threads()
    try:
        opened = open_any(load.model)
        if isinstance(opened, EncoderModel):
            embedder = build_embedder(opened, load.settings)
            del opened  # which would keep the file mapped
            serve_encoder(door, embedder)
            return
        grammars = Grammars(tokenizer_maker(opened), opened.spec.vocab_size)
        engine, resolved = build(opened, load.settings, grammars)
        del opened
    except HeadraceError as error:
        door.send(_refusal(None, error))
        door.flush()
        return
    stand_back(before)
    settle()
    desk = Desk(engine, door, grammars, _watch(engine) if resolved.plan is not None else None)
    desk.tell()
    door.send(Ready(resolved))
    try:
        _run(engine, door, desk)
    except EngineDeadError as error:
        door.send(_refusal(None, error))
        door.flush()
    engine.close()
    grammars.close()


def _watch(engine: Engine) -> StageWatch:
    from .workers.staged import StagedExecutor  # which a model that is not split has no use for
    from .workers.watch import StageWatch

    assert isinstance(engine.executor, StagedExecutor)
    return StageWatch(engine.scheduler, engine.executor, engine.trace)


def _run(engine: Engine, door: Door, desk: Desk) -> None:
    """Until the door closes. EngineDeadError where the workers are gone for good."""
    reports: list[Report] = []
    engine.observer = lambda step, trace: reports.append(_report(engine, step, trace))
    patience = TEND_SECONDS if desk.watch else None
    said = 0.0
    while not door.closed:
        at_most = patience or (BEAT_SECONDS if desk.waited_for else None)
        for message in door.take(wait=not engine.busy, at_most=at_most):
            desk.obey(message)
        desk.admit_compiled()
        if engine.busy:
            events = engine.step()
            _emit(engine, door, events, reports)
            reports.clear()
        elif desk.watch:
            _emit(engine, door, engine.tend(), [])
        elif desk.waited_for and time.monotonic() - said >= BEAT_SECONDS:
            said = time.monotonic()
            door.send(Events([], []))  # a compile is not this process's work: it is idle, and well
        desk.tell()


def _report(engine: Engine, step: Step, trace: StepTrace) -> Report:
    scheduler = engine.scheduler
    starts = {chunk.seq: chunk.start for chunk in step.chunks} if step.opened else {}
    return Report(
        step.number,
        trace.rows,
        trace.planned,
        trace.submitted,
        trace.started,
        trace.ended,
        trace.answered,
        trace.applied,
        [(chunk.seq, chunk.start, len(chunk.tokens)) for chunk in step.chunks],
        [
            OpenedPart(one.seq, one.request.id, one.request.sample_index, starts[one.seq], len(one.tokens))
            for one in step.opened
        ],
        scheduler.running,
        scheduler.waiting,
        tuple(pool.count - 1 - pool.available for pool in scheduler.routes.pools),
        tuple(pool.count - 1 for pool in scheduler.routes.pools),
        _wait(engine, step) if scheduler.waiting else None,
    )


def _wait(engine: Engine, step: Step) -> Wait:
    """What the first waiting sequence lacks: a place among the running, the prompt of the sample that it shares, room
    in the step, or else pages."""
    config = engine.scheduler.config
    if engine.scheduler.running >= config.max_sequences:
        return "sequences"
    if engine.scheduler.waits_for_siblings:
        return "sibling"
    return "tokens" if step.rows >= config.max_batch_tokens else "pages"


class Desk:
    """Does what the door's messages ask. A request with a new grammar waits here until that is compiled, in a thread
    beside the loop; steps go on meanwhile."""

    def __init__(self, engine: Engine, door: Door, grammars: Grammars, watch: StageWatch | None) -> None:
        self._engine, self._door, self._grammars, self.watch = engine, door, grammars, watch
        self._compiler = Compiler(grammars, door.wake)
        self._waiting: dict[str, Add] = {}  # by request id

    @property
    def waited_for(self) -> bool:
        """Whether somebody's grammar is being compiled."""
        return bool(self._waiting)

    def obey(self, message: ToEngine) -> None:
        engine = self._engine
        if isinstance(message, Finish):
            if message.sample_index is None:
                self._waiting.pop(message.request_id, None)
            _emit(engine, self._door, engine.finish(message.request_id, message.sample_index, message.reason), [])
        elif isinstance(message, Inspect):
            if not engine.busy:
                engine.scheduler.check()  # nothing runs, so no page is held; an engine that lost one is replaced
            self._door.send(PageMap([pool.map() for pool in engine.scheduler.routes.pools]))
        elif isinstance(message, Recall):
            self._door.send(Recent(*engine.trace.since(time.monotonic() - message.seconds, message.most)))
        elif isinstance(message, Scale):
            self._scale(message)
        elif isinstance(message, Add):
            request = message.requests[0]
            grammar = request.params.grammar
            if grammar is None or self._grammars.known(grammar):
                self._admit(message)
            else:
                self._waiting[request.id] = message
                self._compiler.start(request.id, grammar)

    def _scale(self, message: Scale) -> None:
        problem = None
        try:
            if self.watch is None:
                raise ConfigError("the model is not split, so it has no stages; load it with a plan")
            self.watch.scale(message.stage, message.replicas)
            _emit(self._engine, self._door, self._engine.tend(), [])
            self._door.send(self.watch.status(time.monotonic()))
        except ConfigError as error:
            problem = str(error)
        self._door.send(Scaled(problem))

    def tell(self) -> None:
        """Say how the stages of a split model stand, where that is news."""
        if self.watch is not None and (status := self.watch.news(time.monotonic())) is not None:
            self._door.send(status)

    def admit_compiled(self) -> None:
        """Let in whose grammar is ready; refuse whose grammar cannot be."""
        for request_id, problem in self._compiler.take():
            message = self._waiting.pop(request_id, None)
            if message is not None and problem is not None:
                self._door.send(_refusal(request_id, RequestError(problem)))
            elif message is not None:
                self._admit(message)

    def _admit(self, message: Add) -> None:
        try:
            if (grammar := message.requests[0].params.grammar) is not None:
                self._grammars.compile(grammar)
            for request in message.requests:
                self._engine.add(request)
        except HeadraceError as error:
            self._engine.finish(message.requests[0].id)
            self._door.send(_refusal(message.requests[0].id, error))


def _emit(engine: Engine, door: Door, events: list[Event], reports: list[Report]) -> None:
    """Send events; one that no frame can carry ends its request with an error, and concerns no other."""
    if not events and not reports:
        return
    try:
        door.send(Events(events, reports))
    except HeadraceError as error:
        if len(events) > 1:
            for event in events:
                _emit(engine, door, [event], [])
            return
        engine.finish(events[0].request_id, events[0].sample_index)
        failed = Event(events[0].request_id, events[0].sample_index, finish_reason="error", error=str(error))
        door.send(Events([failed]))


def _refusal(request_id: str | None, error: HeadraceError) -> Refused:
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == HeadraceError.__module__)
    return Refused(request_id, known.__name__, str(error))


class Door:
    """This end of the socket: frames in both directions, without waiting for the other side unless there is nothing
    to do, or MAX_UNSENT bytes have not been taken."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._woken = False
        self._unread, self._unsent = bytearray(), bytearray()
        self.closed = False

    def send(self, message: FromEngine) -> None:
        """Queue a message. HeadraceError where it is longer than a frame may be."""
        self._unsent += frame(message)
        self._write()

    def flush(self) -> None:
        while self._unsent and not self.closed:
            self._exchange(None)

    def take(self, *, wait: bool, at_most: float | None = None) -> list[ToEngine]:
        """The messages that have come; where `wait`, at least one, or the door is closed, or it took about `at_most`
        seconds."""
        while True:
            full = len(self._unsent) > MAX_UNSENT
            self._exchange(None if full else at_most if wait and not self._complete() else 0.0)
            messages: list[ToEngine] = []
            while length := self._complete():
                messages.append(to_engine.decode(self._unread[HEADER.size : length]))
                del self._unread[:length]
            woken, self._woken = self._woken, False
            waits = wait and not woken and at_most is None
            if self.closed or messages or not (waits or len(self._unsent) > MAX_UNSENT):
                return messages

    def wake(self) -> None:
        """End a `take` that waits. The only method for other threads."""
        try:
            self._ringer.send(b"!")
        except BlockingIOError:
            pass  # it has been rung often enough

    def _exchange(self, seconds: float | None) -> None:
        """Read and write what can be, waiting `seconds` (None: for ever) until something can."""
        writers = [self._connection] if self._unsent else []
        readable, writable, _ = select.select([self._connection, self._bell], writers, [], seconds)
        if self._bell in readable:
            self._woken = bool(self._bell.recv(1 << 12))
        if self._connection in readable:
            data = self._connection.recv(1 << 20)
            self.closed = not data
            self._unread += data
        if writable:
            self._write()

    def _write(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(memoryview(self._unsent)[: 1 << 20])]
        except BlockingIOError:
            pass

    def _complete(self) -> int:
        """Bytes of the first frame, its header included, or 0 where it is not all there."""
        if len(self._unread) < HEADER.size:
            return 0
        length = HEADER.size + frame_length(bytes(self._unread[: HEADER.size]))
        return length if len(self._unread) >= length else 0


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the door's to handle
    try:
        serve(Door(socket.socket(fileno=int(sys.argv[1]))))
    except (BrokenPipeError, ConnectionResetError):
        pass


if __name__ == "__main__":
    main()
