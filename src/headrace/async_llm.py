"""The asyncio door: the engine runs in a process of its own, so nothing here can hold up a step, and this side owns the
truth about requests: where the engine's process dies or stands still, another takes its place and every request goes on
behind the tokens that it has.

    submit ──▶ Running ──Add──▶ engine ──Events──▶ Completion ──Delta──▶ listener
                  ▲                │ dies, or makes no progress
                  └─── remaining ──┘ (prompt, seed and tokens so far go to the next engine)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar, get_args

import msgspec
import numpy as np

from .assemble import open_model
from .completion import SCORE, Completion, Delta, Output, scored_logits
from .config import Resolved, Settings
from .errors import ConfigError, EngineDeadError, HeadraceError, RequestError
from .formats.hub import DEFAULT_MODEL
from .frontend import Frontend, Message, Prompt
from .types import Event, Request, SamplingParams
from .workers.remote import RemoteEngine
from .workers.wire import (
    Add,
    Events,
    Finish,
    FromEngine,
    Inspect,
    Load,
    PageMap,
    Ready,
    Recall,
    Recent,
    Refused,
    Report,
    Scale,
    Scaled,
    Status,
    Wait,
    error_of,
)

State = Literal["new", "loading", "ready", "restarting", "dead", "closed"]

LOOK_SECONDS = 0.1  # between looks at the engine's process
STOPPED_SECONDS = 0.3  # a stopped process with work is given this long to be continued, one without work ten times that
FROZEN_SECONDS = 0.5  # between two looks: this process stood still itself, so nothing is known of the other
IDLE_SECONDS = 3.0  # a process with work that says nothing and uses no CPU
SILENT_SECONDS = 120.0  # a process with work that says nothing, however busy
MAX_DEATHS = 4  # engines that may die under a request that makes no progress in between, before it is refused
WAITING_BLAME = 0.25  # of such a death, for a request that waited while the engine worked on others
RESTART_WINDOW = 60.0  # seconds in which `max_restarts` are counted
PAUSES = (0.0, 0.2, 1.0, 3.0)  # seconds before each attempt to start again

T = TypeVar("T", PageMap, Recent, Scaled)
Listener = Callable[["Running", Delta | None], None]


class Observer(Protocol):
    """Hears what the engine does. Called in the event loop, so it must be quick."""

    def stepped(self, reports: list[Report]) -> None: ...

    def restarted(self, reason: str, pause: float) -> None: ...

    def changed(self, status: Status) -> None:
        """Of a split model: how its stages stand, on every change and each second."""
        ...


class AsyncLLM:
    """LLM for asyncio, many requests at once: `async with AsyncLLM("smollm2-135m") as llm: await llm.generate("Once
    upon")`.

    `settings` are the fields of `config.Settings`; with a `plan` the engine's process starts those of the workers. A
    request whose task is cancelled, or whose stream is left, ends
    at once in the engine too. If the engine's process dies or stands still, it is started again and requests continue
    with the same tokens; after `max_restarts` within a minute everything that waits for it raises EngineDeadError.
    """

    config: Resolved

    def __init__(self, model: str = DEFAULT_MODEL, *, max_restarts: int = 100, **settings: Any) -> None:
        self.name, self._settings, self._max_restarts = str(model), Settings(**settings), max_restarts
        self.state: State = "new"
        self.observer: Observer | None = None
        self.frontend: Frontend | None = None
        self.phases: dict[str, float] = {}  # seconds that each part of the last start took
        self._live: dict[str, Running] = {}
        self._death: HeadraceError | None = None
        self._engine: RemoteEngine | None = None
        self._end: asyncio.Future[EngineDeadError] | None = None
        self._first: asyncio.Future[Resolved] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._heard = self._moved = 0.0  # when it said something last; something of its work
        self._began = 0.0  # the last start
        self.status: Status | None = None  # of a split model's stages
        self._scaled: dict[int, int] = {}  # replicas that were asked for, by stage
        self.sampled = 0.0  # when the step ended whose tokens came last; time.monotonic
        self._restarts: list[float] = []
        self._stepped = False  # whether the engine that is there has done a step
        self._asked: list[tuple[type, asyncio.Future[Any]]] = []  # kinds of answers, in order
        self._waits: dict[Wait, int] = dict.fromkeys(get_args(Wait), 0)  # steps, by what the queue waited for

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the engine's process and wait until the model is loaded there. Raises what loading raised."""
        began = time.monotonic()
        self.state = "loading"
        try:
            opened = await asyncio.to_thread(open_model, self.name)  # may have to pull it
            self.phases["open"] = time.monotonic() - began
            launched = asyncio.ensure_future(self._launch())
            try:
                self.spec = opened.spec
                self.tokenizer = await asyncio.to_thread(opened.tokenizer)
                self.phases["tokenizer"] = time.monotonic() - began - self.phases["open"]
                self.config = await launched
            finally:
                launched.cancel()
        except BaseException as error:
            self._death = error if isinstance(error, HeadraceError) else None
            await self.close()
            self.state = "dead"
            raise
        self.frontend = Frontend(self.tokenizer, self.spec.vocab_size)
        self.state = "ready"
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Stop the engine's process; requests that still run raise EngineDeadError."""
        self._death = self._death or EngineDeadError("the engine was closed")
        self.state = "closed"
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        if self._engine is not None:
            if self.frontend is None:
                self._engine.kill()  # it is loading, and would not hear
            await self._engine.close()
            self._engine = None
        self._refuse_all(self._death)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Output:
        """Complete one prompt. `options`: priority, deadline, salt."""
        ids = await asyncio.to_thread(self.ready().prompt_ids, prompt)
        return await self._run(ids, params or SamplingParams(), options)

    async def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any) -> Output:
        """The assistant's answer to a conversation."""
        ids = await asyncio.to_thread(self.ready().chat_ids, messages)
        return await self._run(ids, params or SamplingParams(), options)

    async def logits(self, prompt: Prompt) -> np.ndarray:
        """float32 [tokens, vocab]: what the model gives at each position of the prompt."""
        sample = (await self.generate(prompt, SCORE, kind="score")).samples[0]
        return scored_logits(sample)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> AsyncIterator[Delta]:
        """Complete one prompt, piece by piece."""
        return self._stream(self.ready().prompt_ids, prompt, params or SamplingParams(), options)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """`chat`, piece by piece."""
        return self._stream(self.ready().chat_ids, messages, params or SamplingParams(), options)

    def ready(self) -> Frontend:
        """The frontend; EngineDeadError where there is no engine, nor will be one soon."""
        if self._death or self.frontend is None:
            raise self._death or EngineDeadError(
                "the engine is not running; use `async with AsyncLLM(...)` or await start()"
            )
        return self.frontend

    def submit(self, prompt_ids: list[int], params: SamplingParams, listener: Listener, **options: Any) -> Running:
        """Start one request. `listener(running, delta)` is called in the event loop for every delta, and with None
        where the request fails (`running.error` says how). Raises RequestError where the request is malformed.
        `options` are those of `Frontend.requests`."""
        requests = self.ready().requests(prompt_ids, params, **options)
        running = self._live[requests[0].id] = Running(self, requests, prompt_ids, listener, dict(self._waits))
        if self.status is not None:
            running.wait_for_stages(self.status.missing)
        self._send(Add(tuple(requests)))
        return running

    def forget(self, running: Running) -> None:
        """A request is over or no longer wanted: what is left of it ends in the engine."""
        if self._live.pop(running.id, None) and not running.completion.done and running.error is None:
            self._send(Finish(running.id, None, "cancelled"))

    async def page_map(self) -> PageMap:
        """What every page of the KV cache holds, after the step that runs now."""
        return await self._ask(Inspect(), PageMap)

    async def recent(self, seconds: float, most: int) -> Recent:
        """The steps of the last seconds, of a split model also their spans on each rank, and what befell its workers:
        the latest `most` of each."""
        return await self._ask(Recall(seconds, most), Recent)

    async def scale(self, stage: int, replicas: int) -> Status:
        """Have so many replicas of a stage of a split model: they join and leave while it runs. How the stages stand
        then, or ConfigError where that cannot be."""
        answer = await self._ask(Scale(stage, replicas), Scaled)
        if answer.problem is not None or self.status is None:
            raise ConfigError(answer.problem or "the model has no stages")
        self._scaled[stage] = replicas
        return self.status

    @property
    def pid(self) -> int | None:
        """Process id of the engine."""
        return self._engine.pid if self._engine else None

    @property
    def live(self) -> int:
        """Sequences that wait or run."""
        return sum(len(running.requests) for running in self._live.values())

    @property
    def silence(self) -> float:
        """Seconds for which the engine has had work and said nothing of it."""
        return time.monotonic() - self._moved if self._live else 0.0

    # Requests

    async def _run(self, prompt_ids: list[int], params: SamplingParams, options: dict[str, Any]) -> Output:
        news = asyncio.Event()
        running = self.submit(prompt_ids, params, lambda *_: news.set(), **options)
        try:
            while not running.completion.done:
                if running.error is not None:
                    raise running.error
                await news.wait()
                news.clear()
            return running.completion.output
        finally:
            self.forget(running)

    async def _stream(
        self, encode: Callable[[Any], list[int]], text: Any, params: SamplingParams, options: dict[str, Any]
    ) -> AsyncIterator[Delta]:
        deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        running = self.submit(
            await asyncio.to_thread(encode, text), params, lambda _, delta: deltas.put_nowait(delta), **options
        )
        try:
            while not (deltas.empty() and running.completion.done):
                delta = await deltas.get()
                if delta is None:
                    assert running.error is not None
                    raise running.error
                yield delta
            if errors := [one.error for one in running.completion.output.samples if one.error is not None]:
                raise RequestError(errors[0])
        finally:
            self.forget(running)

    def _refuse_all(self, error: HeadraceError) -> None:
        for running in list(self._live.values()):
            running.refuse(error)
        self._leave_unanswered(error)

    # Questions

    async def _ask(self, question: Inspect | Recall | Scale, kind: type[T]) -> T:
        """Answers of a kind come in the order of their questions. EngineDeadError where none will come."""
        self.ready()
        if self.state != "ready":
            raise EngineDeadError("the engine is being started again; try again soon")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._asked.append((kind, answer))
        self._send(question)
        return await answer

    def _answered(self, message: PageMap | Recent | Scaled) -> None:
        for index, (kind, answer) in enumerate(self._asked):
            if isinstance(message, kind):
                del self._asked[index]
                if not answer.done():
                    answer.set_result(message)
                return

    def _leave_unanswered(self, error: HeadraceError) -> None:
        for _, answer in self._asked:
            if not answer.done():
                answer.set_exception(error)
        self._asked.clear()

    # The engine's process

    async def _launch(self) -> Resolved:
        """Start a process and wait until it is ready."""
        loop = asyncio.get_running_loop()
        began = self._began = time.monotonic()
        self._end, self._first = loop.create_future(), loop.create_future()
        end, first = self._end, self._first

        def ended(error: EngineDeadError) -> None:
            if not end.done():
                end.set_result(error)
            if not first.done():
                first.set_exception(error)

        engine = self._engine = RemoteEngine(self._hear, ended)
        try:
            await engine.start()
            self.phases["process"] = time.monotonic() - began
            engine.send(Load(self.name, self._settings))
            return await first
        finally:
            self.phases["engine"] = time.monotonic() - began

    async def _keep(self) -> None:
        """While this door is open: watch the engine, and replace it where it is gone."""
        try:
            while True:
                reason = await self._watch()
                since = time.monotonic()
                self.state = "restarting"
                await self._restart(reason)
                self.state = "ready"
                if self.observer is not None:
                    self.observer.restarted(str(reason), time.monotonic() - since)
        except HeadraceError as error:
            self._death, self.state = error, "dead"
            self._refuse_all(error)

    async def _watch(self) -> EngineDeadError:
        """Why the engine is no more: its process died, or makes no progress with the work that it has."""
        assert self._engine is not None and self._end is not None
        stopped, marks = 0.0, (0.0, 0.0)
        moved = before = time.monotonic()
        while True:
            await asyncio.wait([self._end], timeout=LOOK_SECONDS)
            now = time.monotonic()
            if self._end.done():
                return self._end.result()
            frozen, before = now - before > FROZEN_SECONDS, now
            if frozen or not self._live:
                self._heard = self._moved = now
            if frozen:
                moved, stopped = now, 0.0
            signs = self._engine.vital_signs()
            halted, used = signs or (False, now)  # where nobody can say, it is taken to be busy
            stopped = stopped + LOOK_SECONDS if halted else 0.0
            if marks != (used, self._heard):
                marks, moved = (used, self._heard), now
            if stopped >= STOPPED_SECONDS * (1 if self._live else 10):
                return _Stopped("the engine's process was stopped")
            if now - moved > IDLE_SECONDS:
                return EngineDeadError(f"the engine's process has work and did nothing for {now - moved:.1f} s")
            if now - self._heard > SILENT_SECONDS:
                return EngineDeadError(f"the engine's process has said nothing for {now - self._heard:.0f} s")

    async def _restart(self, reason: EngineDeadError) -> None:
        """Put another engine in its place, with what is left of every request. EngineDeadError where that fails."""
        now = time.monotonic()
        self._restarts = [*(at for at in self._restarts if at > now - RESTART_WINDOW), now]
        stepped, self._stepped = self._stepped, False
        if len(self._restarts) > self._max_restarts:
            raise EngineDeadError(
                f"{reason}; it was restarted {self._max_restarts} times within {RESTART_WINDOW:.0f} s"
            )
        for running in list(self._live.values()):
            running.deaths += 1
            if not isinstance(reason, _Stopped):
                running.futile += 1 if running.opened or not stepped else WAITING_BLAME
            running.opened = False
            if running.futile >= MAX_DEATHS:
                running.refuse(
                    EngineDeadError(f"the engine died {running.deaths} times, at last at the same place of a request")
                )
        self._leave_unanswered(reason)
        self.status = None
        trouble: HeadraceError = reason
        for pause in PAUSES:
            if self._engine is not None:
                self._engine.kill()
                await self._engine.gone()
            await asyncio.sleep(pause)
            try:
                self.config = await self._launch()
                break
            except (HeadraceError, OSError) as error:
                trouble = EngineDeadError(f"{reason}, and cannot be started again: {error}")
        else:
            raise trouble
        for running in list(self._live.values()):
            if requests := running.remaining():
                self._send(Add(requests), now=True)
        for stage, replicas in self._scaled.items():
            self._send(Scale(stage, replicas), now=True)

    def _send(self, message: Add | Finish | Inspect | Recall | Scale, now: bool = False) -> None:
        """To the engine; where it is being replaced, the next one hears of all that is live anyway."""
        if self._engine is not None and (now or self.state == "ready"):
            self._engine.send(message)

    def _hear(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Status):
            self._take_status(message)
            return
        self._moved = self._heard
        if isinstance(message, Events):
            self.sampled = self._heard
            self._stepped |= bool(message.reports)
            for report in message.reports:
                self._note(report)
                self.sampled = report.ended
            for event in message.events:
                if running := self._live.get(event.request_id):
                    running.push(event)
            if self.observer is not None and message.reports:
                self.observer.stepped(message.reports)
        elif isinstance(message, Refused):
            if message.request_id is None:
                if self._first is not None and not self._first.done():
                    self._first.set_exception(error_of(message))
                elif self._end is not None and not self._end.done():
                    self._end.set_result(EngineDeadError(message.message))
            elif running := self._live.get(message.request_id):
                running.refuse(error_of(message))
        elif isinstance(message, PageMap | Recent | Scaled):
            self._answered(message)
        elif isinstance(message, Ready) and self._first is not None and not self._first.done():
            self._first.set_result(message.resolved)

    def _take_status(self, status: Status) -> None:
        if self.status is None:
            self._note_joins(status)
        self.status = status
        if missing := status.missing:
            for running in self._live.values():
                running.wait_for_stages(missing)
        if self.observer is not None:
            self.observer.changed(status)

    def _note_joins(self, status: Status) -> None:
        """A start's phases: when each stage had its first replica, and its last."""
        for stage in range(len(status.layers)):
            joined = sorted(one.joined - self._began for one in status.replicas if one.stage == stage and one.joined)
            if joined:
                self.phases[f"stage {stage}"] = joined[-1]

    def _note(self, report: Report) -> None:
        if report.waits_for is not None:
            self._waits[report.waits_for] += 1
        for opened in report.opened:
            running = self._live.get(opened.request_id)
            if running is not None:
                running.opened = True
            if running is not None and not running.admitted:
                running.admitted = True
                steps = {reason: self._waits[reason] - before for reason, before in running.waits_before.items()}
                count, worst = max((count, reason) for reason, count in steps.items())
                running.waited_for = running.waited_for or (worst if count else None)


class _Stopped(EngineDeadError):
    """Its process was stopped from outside: no request's fault."""


class Running:
    """A request under way, and all that another engine needs to go on with it."""

    def __init__(
        self,
        llm: AsyncLLM,
        requests: list[Request],
        prompt_ids: list[int],
        listener: Listener,
        waits_before: dict[Wait, int],
    ) -> None:
        self.id, self.requests = requests[0].id, requests
        self.completion = Completion(prompt_ids, requests[0].params, llm.tokenizer, self._stop)
        self.error: HeadraceError | None = None
        self.deaths = 0  # engines that died while it was here
        self.futile = 0.0  # those of them since its last token, as far as they may be its fault
        self.opened = False  # by the engine that is there now
        self.waits_before = waits_before
        self.admitted = False
        self.waited_for: str | None = None  # what kept it in the queue for the most steps
        self._llm, self._listener = llm, listener

    def push(self, event: Event) -> None:
        """Take in what the engine says. What goes wrong here concerns this request alone."""
        try:
            delta = self.completion.push(event)
            self.futile = 0
            if delta is not None:
                self._listener(self, delta)
        except Exception as error:
            self._llm.forget(self)
            known = isinstance(error, HeadraceError)
            self.refuse(error if known else HeadraceError(f"the answer broke: {type(error).__name__}: {error}"))

    def refuse(self, error: HeadraceError) -> None:
        if self.error is None and not self.completion.done:
            self.error = error
            self._listener(self, None)

    def cancel(self) -> None:
        self._llm.forget(self)

    def wait_for_stages(self, missing: Sequence[int]) -> None:
        """These stages have no replica, so nothing goes on."""
        if missing:
            self.waited_for = f"stage {missing[0]}"

    def remaining(self) -> tuple[Request, ...]:
        """What another engine must run: each sample behind the tokens that it has."""
        left = []
        for request, sample in zip(self.requests, self.completion.output.samples, strict=True):
            index = request.sample_index
            if sample.finish_reason is not None:
                continue
            if self.completion.stopped[index]:  # only the last event was missing
                self.push(Event(self.id, index, finish_reason="stop"))
            elif sample.token_ids:
                params = msgspec.structs.replace(request.params, prompt_logprobs=None)
                left.append(msgspec.structs.replace(request, params=params, resumed=tuple(sample.token_ids)))
            else:
                self.completion.rewind(index)
                left.append(request)
        return tuple(left)

    def _stop(self, index: int) -> Event | None:
        self._llm._send(Finish(self.id, index, "stop"))
        return None  # the sample's last event comes by itself
