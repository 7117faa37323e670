"""An engine in a process of its own: `python -m headrace.engine_process FD`, FD being its end of a socket pair.

One loop and no other thread: take what the door sends, run a step, send what came of it. It ends when the socket
does, so it never outlives the door.
"""

from __future__ import annotations

import select
import signal
import socket
import sys

from . import errors
from .assemble import build_engine, open_model
from .engine import Engine
from .errors import HeadraceError
from .processes import die_with_parent
from .workers.wire import (
    HEADER,
    Add,
    Events,
    Finish,
    FromEngine,
    Load,
    Ready,
    Refused,
    ToEngine,
    frame,
    frame_length,
    to_engine,
)


def serve(door: socket.socket) -> None:
    """Run until the door closes its end."""
    inbox = _Inbox(door)
    load = inbox.wait()
    if not isinstance(load, Load):
        return
    try:
        engine, resolved = build_engine(open_model(load.model), load.settings)
    except HeadraceError as error:
        _send(door, _refusal(None, error))
        return
    _send(door, Ready(resolved))
    while not inbox.closed:
        for message in inbox.take(wait=not engine.busy):
            _obey(engine, door, message)
        if events := engine.step():
            _send(door, Events(events))
    engine.close()


def _obey(engine: Engine, door: socket.socket, message: ToEngine) -> None:
    if isinstance(message, Finish):
        _send(door, Events(engine.finish(message.request_id, message.sample_index, message.reason)))
    elif isinstance(message, Add):
        try:
            for request in message.requests:
                engine.add(request)
        except HeadraceError as error:
            engine.finish(message.requests[0].id)
            _send(door, _refusal(message.requests[0].id, error))


def _refusal(request_id: str | None, error: HeadraceError) -> Refused:
    return Refused(request_id, type(error).__name__, str(error))


def _send(door: socket.socket, message: FromEngine) -> None:
    door.sendall(frame(message))


class _Inbox:
    """Frames from a socket, taken without waiting unless there is nothing else to do."""

    def __init__(self, door: socket.socket) -> None:
        self._door = door
        self._data = bytearray()
        self.closed = False

    def wait(self) -> ToEngine | None:
        while not self.closed:
            for message in self.take(wait=True, most=1):
                return message
        return None

    def take(self, *, wait: bool, most: int | None = None) -> list[ToEngine]:
        readable, _, _ = select.select([self._door], [], [], None if wait and not self._complete() else 0)
        if readable:
            data = self._door.recv(1 << 20)
            self.closed = not data
            self._data += data
        messages: list[ToEngine] = []
        while (length := self._complete()) and (most is None or len(messages) < most):
            messages.append(to_engine.decode(self._data[HEADER.size : length]))
            del self._data[:length]
        return messages

    def _complete(self) -> int:
        """Bytes of the first frame, its header included, or 0 where it is not all there."""
        if len(self._data) < HEADER.size:
            return 0
        length = HEADER.size + frame_length(bytes(self._data[: HEADER.size]))
        return length if len(self._data) >= length else 0


def error_of(refused: Refused) -> HeadraceError:
    """The error that a refusal stands for, as the door raises it."""
    kind = getattr(errors, refused.kind, HeadraceError)
    error = HeadraceError.__new__(kind if isinstance(kind, type) and issubclass(kind, HeadraceError) else HeadraceError)
    error.args = (refused.message,)
    return error


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the door's to handle
    try:
        serve(socket.socket(fileno=int(sys.argv[1])))
    except (BrokenPipeError, ConnectionResetError):
        pass


if __name__ == "__main__":
    main()
