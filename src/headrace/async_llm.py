"""The asyncio door: the engine runs in a process of its own, so nothing here can hold up a step."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from .assemble import open_model
from .completion import SCORE, Completion, Delta, Output, scored_logits
from .config import Resolved, Settings
from .engine_process import error_of
from .errors import EngineDeadError, HeadraceError, RequestError
from .formats.hub import DEFAULT_MODEL
from .frontend import Frontend, Message, Prompt
from .types import Event, SamplingParams
from .workers.wire import HEADER, Add, Events, Finish, Load, Ready, Refused, ToEngine, frame, frame_length, from_engine


class AsyncLLM:
    """LLM for asyncio, many requests at once: `async with AsyncLLM("smollm2-135m") as llm: await llm.generate("Once
    upon")`.

    `settings` are the fields of `config.Settings`. A request whose task is cancelled, or whose stream is left, ends
    at once in the engine too. If the engine's process dies, everything that waits for it raises EngineDeadError.
    """

    config: Resolved

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        self._name, self._settings = str(model), Settings(**settings)
        self._process: asyncio.subprocess.Process | None = None
        self._live: dict[str, _Live] = {}
        self._death: HeadraceError | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._frontend: Frontend | None = None

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the engine's process and wait until the model is loaded there. Raises what loading raised."""
        opened = await asyncio.to_thread(open_model, self._name)  # may have to pull it
        ours, theirs = socket.socketpair()
        with theirs:
            command = (sys.executable, "-m", f"{__package__}.engine_process", str(theirs.fileno()))
            self._process = await asyncio.create_subprocess_exec(
                *command, pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL
            )
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
            self._send(Load(self._name, self._settings))
            self.spec = opened.spec
            self.tokenizer = await asyncio.to_thread(opened.tokenizer)
            first = await self._receive()
            if isinstance(first, Refused):
                raise error_of(first)
            assert isinstance(first, Ready)
        except BaseException:
            ours.close()
            await self.close()
            raise
        self.config = first.resolved
        self._frontend = Frontend(self.tokenizer, self.spec.vocab_size)
        self._listener = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Stop the engine's process; requests that still run raise EngineDeadError."""
        if self._process is None:
            return
        self._death = self._death or EngineDeadError("the engine was closed")
        if self._writer is not None:
            self._writer.close()
        else:
            self._process.kill()
        try:
            await asyncio.wait_for(self._process.wait(), timeout=10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._process = None
        if self._listener is not None:
            await self._listener

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Output:
        """Complete one prompt. `options`: priority, deadline, salt."""
        ids = await asyncio.to_thread(self._ready().prompt_ids, prompt)
        return await self._run(ids, params or SamplingParams(), options)

    async def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any) -> Output:
        """The assistant's answer to a conversation."""
        ids = await asyncio.to_thread(self._ready().chat_ids, messages)
        return await self._run(ids, params or SamplingParams(), options)

    async def logits(self, prompt: Prompt) -> np.ndarray:
        """float32 [tokens, vocab]: what the model gives at each position of the prompt."""
        sample = (await self.generate(prompt, SCORE, kind="score")).samples[0]
        return scored_logits(sample)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> AsyncIterator[Delta]:
        """Complete one prompt, piece by piece."""
        return self._stream(self._ready().prompt_ids, prompt, params or SamplingParams(), options)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """`chat`, piece by piece."""
        return self._stream(self._ready().chat_ids, messages, params or SamplingParams(), options)

    # How

    def _ready(self) -> Frontend:
        if self._death or self._frontend is None:
            raise self._death or EngineDeadError(
                "the engine is not running; use `async with AsyncLLM(...)` or await start()"
            )
        return self._frontend

    async def _run(self, prompt_ids: list[int], params: SamplingParams, options: dict[str, Any]) -> Output:
        live = self._start(prompt_ids, params, options)
        try:
            while not live.completion.done:
                await self._news(live)
            return live.completion.output
        finally:
            self._end(live)

    async def _stream(
        self, encode: Callable[[Any], list[int]], text: Any, params: SamplingParams, options: dict[str, Any]
    ) -> AsyncIterator[Delta]:
        live = self._start(await asyncio.to_thread(encode, text), params, options)
        try:
            while live.deltas or not live.completion.done:
                if live.deltas:
                    yield live.deltas.pop(0)
                else:
                    await self._news(live)
            if errors := [one.error for one in live.completion.output.samples if one.error is not None]:
                raise RequestError(errors[0])
        finally:
            self._end(live)

    def _start(self, prompt_ids: list[int], params: SamplingParams, options: dict[str, Any]) -> _Live:
        requests = self._ready().requests(prompt_ids, params, **options)
        request_id = requests[0].id

        def stop(index: int) -> Event | None:
            self._send(Finish(request_id, index, "stop"))
            return None  # the sample's last event comes by itself

        self._send(Add(tuple(requests)))
        live = self._live[request_id] = _Live(request_id, Completion(prompt_ids, params, self.tokenizer, stop))
        return live

    async def _news(self, live: _Live) -> None:
        live.news.clear()
        if self._death is None and live.refused is None:
            await live.news.wait()
        if live.refused is not None:
            raise live.refused
        if self._death is not None and not live.completion.done:
            raise self._death

    def _end(self, live: _Live) -> None:
        del self._live[live.request_id]
        if not live.completion.done and live.refused is None and self._death is None:
            self._send(Finish(live.request_id, None, "cancelled"))

    async def _listen(self) -> None:
        """Hand what the engine says to whom it concerns, until it falls silent for ever."""
        try:
            while True:
                message = await self._receive()
                if isinstance(message, Refused):
                    if message.request_id in self._live:
                        self._live[message.request_id].refuse(error_of(message))
                elif isinstance(message, Events):
                    for event in message.events:
                        if event.request_id in self._live:
                            self._live[event.request_id].push(event)
        except HeadraceError as error:
            self._death = self._death or error
        except Exception as error:
            self._death = self._death or EngineDeadError(f"the engine's answer is not understood: {error}")
        finally:
            for live in self._live.values():
                live.news.set()

    async def _receive(self) -> Ready | Events | Refused:
        try:
            header = await self._reader.readexactly(HEADER.size)
            return from_engine.decode(await self._reader.readexactly(frame_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EngineDeadError("the engine's process has died; start a new AsyncLLM") from None

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(frame(message))


class _Live:
    """A request that runs, and who waits for it."""

    def __init__(self, request_id: str, completion: Completion) -> None:
        self.request_id, self.completion = request_id, completion
        self.deltas: list[Delta] = []
        self.news = asyncio.Event()
        self.refused: HeadraceError | None = None

    def push(self, event: Event) -> None:
        try:
            if delta := self.completion.push(event):
                self.deltas.append(delta)
            self.news.set()
        except Exception as error:  # concerns this request alone
            self.refuse(RequestError(f"{type(error).__name__}: {error}"))

    def refuse(self, error: HeadraceError) -> None:
        self.refused = error
        self.news.set()
