"""`headrace load`: requests as they come to a server in earnest, and what each of them met."""

from __future__ import annotations

import asyncio
import math
import resource
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import msgspec

from ..errors import ConfigError, RequestError
from .load_client import Answer, Client, Target
from .load_plan import MAX_REQUESTS, MAX_TOKENS, Shot, arrivals, prompt_ids, read_trace

DEFAULT_REQUESTS = 100
DEFAULT_PROMPT = DEFAULT_NEW = 64
REST_SECONDS = (0.05, 5.0)  # least and most that a client of a closed loop waits after a 429, as it was told
LOOK_SECONDS = 0.25  # between two looks at how it goes


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Checked once, here. An open loop (`rate` or `trace`) sends when the time has come, whatever came of requests
    before, but never has more than `concurrency` open; a closed one (`concurrency` alone) keeps that many open."""

    url: str
    rate: float | None = None  # requests a second
    burst: int = 1  # requests that come together
    trace: str | None = None
    speed: float = 1.0  # of the trace
    concurrency: int | None = None
    requests: int | None = None
    duration: float | None = None  # seconds in which requests are sent
    prompt_tokens: int | None = None  # of each; of a trace's requests at most
    max_tokens: int | None = None  # so too
    slo_ttft: float | None = None  # seconds
    slo_itl: float | None = None  # seconds
    model: str | None = None
    seed: int = 0
    timeout: float = 300.0  # seconds for one request

    def __post_init__(self) -> None:
        if self.rate is None and self.trace is None and self.concurrency is None:
            raise ConfigError("say how requests come: --rate, --concurrency or --trace")
        if self.rate is not None and self.trace is not None:
            raise ConfigError("--rate and --trace exclude each other: a trace has its own times; see --speed")
        if self.burst != 1 and self.rate is None:
            raise ConfigError("--burst goes with --rate")
        if self.speed != 1.0 and self.trace is None:
            raise ConfigError("--speed goes with --trace")
        for name, low, high in (
            ("rate", 1e-3, 1e5), ("burst", 1, 10_000), ("speed", 1e-3, 1e5), ("concurrency", 1, 10_000),
            ("requests", 1, MAX_REQUESTS), ("duration", 0.1, 86400), ("prompt_tokens", 1, MAX_TOKENS),
            ("max_tokens", 1, MAX_TOKENS), ("slo_ttft", 0, 3600), ("slo_itl", 0, 3600), ("timeout", 0.1, 86400),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise ConfigError(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}, got {value}")

    @property
    def name(self) -> str:
        """The test's name in results."""
        if self.trace is not None:
            return f"trace x{self.speed:g}"
        if self.rate is None:
            return f"concurrency {self.concurrency}"
        return f"rate {self.rate:g}" + (f" burst {self.burst}" if self.burst > 1 else "")

    def shots(self) -> list[Shot] | None:
        """What is to be sent when; None for a closed loop, which sends when an answer has come."""
        most = self.requests or (MAX_REQUESTS if self.duration or self.trace else DEFAULT_REQUESTS)
        if self.trace is not None:
            shots = read_trace(self.trace, most, self.speed, self.prompt_tokens, self.max_tokens)
        elif self.rate is not None:
            one = self.one()
            until = self.duration or math.inf
            shots = []
            for at in islice(arrivals(self.rate, self.burst, self.seed), most):
                if at > until:
                    break
                shots.append(Shot(at, one.prompt, one.new))
        else:
            return None
        return [shot for shot in shots if shot.at <= (self.duration or math.inf)]

    def one(self) -> Shot:
        """A request of a load that has no trace."""
        return Shot(0.0, self.prompt_tokens or DEFAULT_PROMPT, self.max_tokens or DEFAULT_NEW)


@dataclass(slots=True)
class Record:
    """A request and its answer. Times in seconds after the start."""

    scheduled: float
    shot: Shot
    answer: Answer


@dataclass
class Progress:
    """How it goes."""

    total: int | None  # requests, where their number is known
    seconds: float | None
    began: float = field(default_factory=time.perf_counter)
    sent: int = 0
    tokens: int = 0  # pieces of text that have arrived
    records: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """What was sent to whom, and what came of it."""

    options: LoadOptions
    began: float  # time.perf_counter of the start
    records: list[Record]
    cpu_seconds: float  # of this process
    seconds: float  # from the start to the last answer's end
    prompts: str  # what they were made of
    model: str | None


def run_load(options: LoadOptions, key: str | None, look: Callable[[Progress], None]) -> Load:
    """Send the load and wait for every answer. `look` is called a few times a second.

    One request goes ahead, not counted: where it fails, RequestError says how.
    """
    import uvloop

    return uvloop.run(_Generator(options, Target(options.url, key)).run(look))


class _Generator:
    def __init__(self, options: LoadOptions, target: Target) -> None:
        self._options, self._target = options, target
        shots = self._shots = options.shots()
        self.progress = Progress(options.requests if shots is None else len(shots), options.duration)
        if shots is None and options.requests is None and options.duration is None:
            self.progress.total = DEFAULT_REQUESTS
        self._client = Client(target, options.timeout, self._on_token)
        self._vocab = 0

    def _on_token(self, now: float) -> None:
        self.progress.tokens += 1

    async def run(self, look: Callable[[Progress], None]) -> Load:
        try:
            model = await self._first_look()
            await self._go_ahead()
            self.progress.tokens = 0
            async with _looking(self.progress, look):
                before, began = _cpu_seconds(), time.perf_counter()
                self.progress.began = began
                await (self._closed_loop() if self._shots is None else self._open_loop(self._shots))
                cpu = _cpu_seconds() - before
        finally:
            self._client.close()
        records = sorted(self.progress.records, key=lambda record: record.scheduled)
        last = max((record.answer.ended for record in records), default=began)
        prompts = f"random ids of {self._vocab}" if self._vocab else "random words"
        return Load(self._options, began, records, cpu, last - began, prompts, self._options.model or model)

    async def _first_look(self) -> str | None:
        """The model's name, and how many token ids there are, where the server tells."""
        try:
            status, body = await self._client.get("/v1/models")
            if status != 200:
                raise RequestError(f"{self._options.url} answered {status}: {body[:300].decode('utf-8', 'replace')}")
            models = [card["id"] for card in msgspec.json.decode(body)["data"]]
            status, body = await self._client.get("/tokenizer_info")
            if status == 200:
                self._vocab = int(msgspec.json.decode(body)["vocab_size"])
        except (OSError, TimeoutError) as error:
            raise RequestError(f"{self._options.url} does not answer: {error}") from None
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            raise RequestError(f"{self._options.url} answers, but not as OpenAI's API does") from None
        return models[0] if models else None

    async def _go_ahead(self) -> None:
        shot = self._shots[0] if self._shots else self._options.one()
        answer = await self._client.ask(self._request(Shot(0, shot.prompt, min(2, shot.new)), -1))
        if answer.outcome != "ok":
            raise RequestError(f"the first request failed with status {answer.status}: {answer.error}")

    def _request(self, shot: Shot, number: int) -> bytes:
        """The bytes of request `number`; it generates shot.new tokens even where the model would end."""
        ids = prompt_ids(shot, number, self._options.seed, self._vocab or len(_WORDS))
        body: dict[str, Any] = {
            "prompt": ids if self._vocab else " ".join(_WORDS[i] for i in ids),
            "max_tokens": shot.new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # so that a token without text is an event too
        }
        if self._options.model is not None:
            body["model"] = self._options.model
        return self._target.request("POST", "/v1/completions", msgspec.json.encode(body))

    async def _ask(self, shot: Shot, number: int, scheduled: float) -> Answer:
        self.progress.sent += 1
        answer = await self._client.ask(self._request(shot, number))
        if answer.tokens == 0:
            answer.tokens = len(answer.arrivals)  # a server that does not count
        self.progress.records.append(Record(scheduled, shot, answer))
        return answer

    async def _open_loop(self, shots: list[Shot]) -> None:
        places = asyncio.Semaphore(self._options.concurrency or len(shots) or 1)

        async def one(number: int, shot: Shot) -> None:
            async with places:
                await self._ask(shot, number, shot.at)

        async with asyncio.TaskGroup() as tasks:
            for number, shot in enumerate(shots):
                while (ahead := self.progress.began + shot.at - time.perf_counter()) > 0:
                    await asyncio.sleep(ahead)  # which may be a millisecond too short
                tasks.create_task(one(number, shot))

    async def _closed_loop(self) -> None:
        began, numbers = self.progress.began, count()
        until = began + (self._options.duration or math.inf)
        most = self.progress.total or MAX_REQUESTS
        low, high = REST_SECONDS

        async def client() -> None:
            while time.perf_counter() < until and (number := next(numbers)) < most:
                answer = await self._ask(self._options.one(), number, time.perf_counter() - began)
                if answer.outcome == "rejected":
                    await asyncio.sleep(min(max(answer.retry_after or 1.0, low), high))
                elif answer.outcome == "failed":
                    await asyncio.sleep(low)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._options.concurrency or 1):
                tasks.create_task(client())


@asynccontextmanager
async def _looking(progress: Progress, look: Callable[[Progress], None]) -> AsyncIterator[None]:
    async def forever() -> None:
        while True:
            look(progress)
            await asyncio.sleep(LOOK_SECONDS)

    looking = asyncio.create_task(forever())
    try:
        yield
    finally:
        looking.cancel()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


_WORDS = ("river", "stone", "light", "water", "field", "house", "early", "north", "music", "paper", "green", "table")
