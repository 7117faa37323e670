"""An engine's process, as the process that started it sees it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from typing import cast

from ..errors import EngineDeadError
from .wire import HEADER, FromEngine, ToEngine, frame, frame_length, from_engine

END_SECONDS = 10.0


class RemoteEngine(asyncio.Protocol):
    """Starts the process, hands its messages to `hear` as they come (in the event loop, a message at a time), and
    calls `ended` once, with the reason, when nothing more will come."""

    def __init__(self, hear: Callable[[FromEngine], None], ended: Callable[[EngineDeadError], None]) -> None:
        self._hear, self._ended = hear, ended
        self._unread = bytearray()
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._trouble: EngineDeadError | None = None

    async def start(self) -> None:
        """Raises EngineDeadError where the system has no room for one more process or descriptor."""
        try:
            await self._start()
        except OSError as error:
            raise EngineDeadError(f"the engine's process cannot be started: {error.strerror or error}") from None

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                module = __name__.removesuffix("workers.remote") + "engine_process"
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    module,
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                )
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        except BaseException:
            ours.close()
            self.kill()
            raise

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def send(self, message: ToEngine) -> None:
        """Queue a message; nothing where the process is gone."""
        if self._transport is not None:
            self._transport.write(frame(message))

    def kill(self) -> None:
        """End the process now; `ended` is called as for any other death."""
        if self._process is not None and self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                pass

    async def close(self) -> None:
        """Hang up, at which the process ends by itself, and see that it does."""
        if self._transport is not None:
            self._transport.close()
        if self._process is None:
            return
        try:
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    async def gone(self) -> None:
        """Wait until the process has ended."""
        if self._process is not None:
            await self._process.wait()

    def vital_signs(self) -> tuple[bool, float] | None:
        """(whether the process is stopped, seconds of CPU time that it has used); None where nobody can say."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b") ")[2].split()
        except OSError:
            return None
        ticks = int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        return fields[0] in (b"T", b"t"), ticks / os.sysconf("SC_CLK_TCK")

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        unread, size = self._unread, HEADER.size
        unread += data
        start = 0
        try:
            while len(unread) - start >= size:
                end = start + size + frame_length(bytes(unread[start : start + size]))
                if len(unread) < end:
                    break
                message = from_engine.decode(unread[start + size : end])
                start = end
                self._hear(message)
        except Exception as error:
            self._trouble = EngineDeadError(f"the engine's answer is not understood: {error}")
            if self._transport is not None:
                self._transport.abort()
        del unread[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.kill()
        self._ended(self._trouble or EngineDeadError("the engine's process has died"))
