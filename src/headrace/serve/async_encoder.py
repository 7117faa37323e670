"""The asyncio door of an encoder: it runs in a process of its own, as AsyncLLM's engine does, so neither its Python nor
its kernels hold up the event loop. Where the process dies, another takes its place and is sent the texts again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ..assemble import EncoderModel, open_any
from ..async_llm import MAX_DEATHS, PAUSES, RESTART_WINDOW, SILENT_SECONDS, Observer, State
from ..config import Settings
from ..errors import EngineDeadError, HeadraceError, UnsupportedModelError
from ..frontend import Frontend
from ..workers.remote import RemoteEngine
from ..workers.wire import Embed, Embedded, EncoderReady, FromEngine, Load, Refused, error_of

TEXTS_AT_ONCE = 32  # of a request, sent together: what is wasted at most where its client leaves
LOOK_SECONDS = 0.5  # between looks at the process: one that is stopped for two of them is replaced


@dataclass
class _Sent:
    """Texts that the process has, and has not answered."""

    message: Embed
    answer: asyncio.Future[np.ndarray]
    deaths: int = 0


class AsyncEncoder:
    """An encoder in its own process. `settings` are the fields of `config.Settings`; of them those count that are not
    about keys and values. After `max_restarts` within a minute, what waits raises EngineDeadError."""

    def __init__(self, model: str, *, max_restarts: int = 100, **settings: Any) -> None:
        self.name, self._settings, self._max_restarts = str(model), Settings(**settings), max_restarts
        self.max_sequences = self._settings.max_sequences
        self.state: State = "new"
        self.observer: Observer | None = None
        self.phases: dict[str, float] = {}  # seconds that each part of the last start took
        self._engine: RemoteEngine | None = None
        self._end: asyncio.Future[EngineDeadError] | None = None
        self._first: asyncio.Future[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._death: HeadraceError | None = None
        self._sent: dict[int, _Sent] = {}
        self._numbers = count()
        self._heard = 0.0
        self._restarts: list[float] = []

    async def start(self) -> None:
        """Start the process and wait until the model is loaded there. Raises what loading raised."""
        began = time.monotonic()
        self.state = "loading"
        try:
            opened = await asyncio.to_thread(open_any, self.name)
            if not isinstance(opened, EncoderModel):
                raise UnsupportedModelError(f"{self.name} is no encoder; take AsyncLLM for it")
            self.phases["open"] = time.monotonic() - began
            self.spec = opened.spec
            self.tokenizer = await asyncio.to_thread(opened.tokenizer)
            self.frontend = Frontend(self.tokenizer, self.spec.vocab_size)
            self.phases["tokenizer"] = time.monotonic() - began - self.phases["open"]
            if self._death is not None:
                raise self._death
            await self._launch()
        except BaseException:
            await self.close()
            self.state = "dead"
            raise
        self.state = "ready"
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Stop the process; what waits for it raises EngineDeadError."""
        loaded = self.state in ("ready", "restarting")
        self._death, self.state = EngineDeadError("the encoder was closed"), "closed"
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        if self._engine is not None:
            if not loaded:
                self._engine.kill()  # it is loading, and would not hear
            await self._engine.close()
            self._engine = None
        self._refuse_all(self._death)

    async def embed(self, texts: Sequence[Sequence[int]]) -> AsyncIterator[np.ndarray]:
        """Each text's vector, in order: float32 [some texts, dim], of length 1. Texts are token ids of the vocabulary,
        1 to the spec's `context_length` of them."""
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            if self._death is not None:
                raise self._death
            message = Embed(next(self._numbers), [list(text) for text in texts[first : first + TEXTS_AT_ONCE]])
            sent = _Sent(message, asyncio.get_running_loop().create_future())
            if not self._sent:
                self._heard = time.monotonic()
            self._sent[message.number] = sent
            try:
                self._send(message)
                yield await sent.answer
            finally:
                self._sent.pop(message.number, None)

    @property
    def pid(self) -> int | None:
        """Process id of the encoder."""
        return self._engine.pid if self._engine else None

    @property
    def live(self) -> int:
        """Requests that wait or run."""
        return len(self._sent)

    @property
    def silence(self) -> float:
        """Seconds for which the process has had work and said nothing."""
        return time.monotonic() - self._heard if self._sent else 0.0

    # The process

    def _send(self, message: Embed) -> None:
        if self.state == "ready" and self._engine is not None:
            self._engine.send(message)

    def _hear(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Embedded):
            sent = self._sent.get(message.number)
            if sent is not None and not sent.answer.done():
                sent.answer.set_result(message.vectors)
        elif self._first is not None and not self._first.done():
            if isinstance(message, EncoderReady):
                self._first.set_result(None)
            elif isinstance(message, Refused):
                self._first.set_exception(error_of(message))

    async def _launch(self) -> None:
        """Start a process and wait until it is ready."""
        loop, began = asyncio.get_running_loop(), time.monotonic()
        end, first = self._end, self._first = loop.create_future(), loop.create_future()

        def ended(error: EngineDeadError) -> None:
            if not end.done():
                end.set_result(error)
            if not first.done():
                first.set_exception(error)

        self._engine = RemoteEngine(self._hear, ended)
        await self._engine.start()
        self._engine.send(Load(self.name, self._settings))
        await first
        self.phases["engine"] = time.monotonic() - began

    async def _keep(self) -> None:
        """While this door is open: watch the process, and replace it where it is gone."""
        try:
            while True:
                reason = await self._watch()
                since, self.state = time.monotonic(), "restarting"
                await self._restart(reason)
                self.state = "ready"
                for sent in list(self._sent.values()):
                    self._send(sent.message)
                if self.observer is not None:
                    self.observer.restarted(str(reason), time.monotonic() - since)
        except HeadraceError as error:
            self._death, self.state = error, "dead"
            self._refuse_all(error)

    async def _watch(self) -> EngineDeadError:
        """Why the process is no more: it died, or was stopped, or says nothing."""
        assert self._engine is not None and self._end is not None
        stopped = 0
        while not self._end.done():
            await asyncio.wait([self._end], timeout=LOOK_SECONDS)
            signs = self._engine.vital_signs()
            stopped = stopped + 1 if signs is not None and signs[0] else 0
            if stopped >= 2 or self.silence > SILENT_SECONDS:
                self._engine.kill()
        return self._end.result()

    async def _restart(self, reason: EngineDeadError) -> None:
        now = time.monotonic()
        self._restarts = [*(at for at in self._restarts if at > now - RESTART_WINDOW), now]
        if len(self._restarts) > self._max_restarts:
            raise EngineDeadError(f"{reason}; it was restarted {self._max_restarts} times in {RESTART_WINDOW:.0f} s")
        for sent in self._sent.values():
            sent.deaths += 1
            if sent.deaths >= MAX_DEATHS and not sent.answer.done():
                sent.answer.set_exception(EngineDeadError(f"the encoder died {sent.deaths} times under these texts"))
        trouble: HeadraceError = reason
        for pause in PAUSES:
            if self._engine is not None:
                self._engine.kill()
                await self._engine.gone()
            await asyncio.sleep(pause)
            try:
                await self._launch()
                return
            except (HeadraceError, OSError) as error:
                trouble = error if isinstance(error, HeadraceError) else EngineDeadError(str(error))
        raise EngineDeadError(f"the encoder could not be started again: {trouble}")

    def _refuse_all(self, error: HeadraceError) -> None:
        for sent in self._sent.values():
            if not sent.answer.done():
                sent.answer.set_exception(error)
