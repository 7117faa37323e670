"""A Job on its way: its requests in the engine, what has come of them, and who waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..async_llm import AsyncLLM, Running
from ..completion import Delta, Output
from ..types import TokenLogprob
from .bodies import Job
from .faults import Fault, deadline_fault, fault_of, left
from .metrics import Collector
from .parser import TextParser
from .replies import FINISH, Replies, usage_of


class Exchange:
    """Runs a Job. `emit(bytes)` gets the events of a stream as they arise; `done` is set at the end, however it came.

    `fault` is what the client must be told instead of, or after, what it got.
    """

    def __init__(self, job: Job, llm: AsyncLLM, replies: Replies, collector: Collector) -> None:
        self.job, self.llm, self.replies, self.collector = job, llm, replies, collector
        self.done = asyncio.Event()
        self.fault: Fault | None = None
        self.why = ""  # of the fault, for the log
        self.emit: Callable[[bytes], None] = lambda data: None
        self.on_done: Callable[[], None] = lambda: None
        self.began = time.monotonic()
        self.first: float | None = None  # when the first token came
        self.last = self.began
        self.tokens = 0
        self.running: list[Running] = []
        self._numbers: dict[str, int] = {}  # request id to prompt index
        self._parsers: list[TextParser | None] = [
            job.parser() if job.parser else None for _ in range(len(job.prompts) * job.params.n)
        ]
        self._to_echo = (
            set(range(len(job.prompts) * job.choices)) if job.echo else set()
        )  # choices without their prompt
        self._open = job.sequences
        self.single = job.sequences == 1  # so that its tokens' gaps are those of one sequence

    def start(self) -> None:
        """Hand all prompts to the engine: all of them, or none."""
        try:
            for index, prompt in enumerate(self.job.prompts):
                running = self.llm.submit(prompt, self.job.params, self._hear, kind=self.job.kind, **self.job.options)
                self.running.append(running)
                self._numbers[running.id] = index
        except BaseException:
            self._stop()
            raise
        self.collector.admitted(self)

    def _stop(self) -> None:
        """End what still runs."""
        for running in self.running:
            running.cancel()

    @property
    def outputs(self) -> list[Output]:
        return [running.completion.output for running in self.running]

    def _hear(self, running: Running, delta: Delta | None) -> None:
        if self.done.is_set():
            return
        if delta is None:
            assert running.error is not None
            self._fail(fault_of(running.error), str(running.error))
            return
        now = time.monotonic()
        if delta.token_ids:
            self.collector.token(self, now, len(delta.token_ids))
            self.tokens += len(delta.token_ids)
            self.first = self.first or now
            self.last = now
        if delta.finish_reason == "error":
            self._fail(Fault(500, "the model failed on this request", code="generation_failed"), delta.error)
        elif delta.finish_reason == "deadline":
            self._fail(deadline_fault())
        elif self.job.stream:
            self._show(running, delta)
        if delta.finish_reason is not None and not self.done.is_set():
            self._open -= 1
            if not self._open:
                if self.job.stream:
                    self._close_stream()
                self._finish()

    def end(self, fault: Fault | None = None) -> None:
        """End it from outside, where it has not ended yet; without a fault, because the client has left."""
        if not self.done.is_set():
            self._fail(fault or left())
        self._stop()

    def _fail(self, fault: Fault, why: str | None = None) -> None:
        self.fault, self.why = fault, why or fault.message
        self._stop()
        self._finish()

    def _finish(self) -> None:
        self.done.set()
        self.on_done()
        self.collector.finished(self)

    # Streams

    def _show(self, running: Running, delta: Delta) -> None:
        choice = self._numbers[running.id] * self.job.params.n + delta.sample_index
        text, finish = delta.text, _finish_name(delta)
        calls: list[dict[str, Any]] | None = None
        if parser := self._parsers[choice]:
            text, calls, finish = _parse(parser, text, finish)
        if not text and calls is None and finish is None and self.job.top_logprobs is None and not self.job.token_ids:
            return
        entries: Sequence[TokenLogprob | None] = delta.logprobs
        first = None
        if choice in self._to_echo:
            self._to_echo.discard(choice)
            output = running.completion.output
            text = self.llm.tokenizer.decode(output.prompt_token_ids) + text
            entries, first = [None, *(output.prompt_logprobs or ()), *entries], output.prompt_token_ids[0]
        usage = usage_of(self.outputs) if self.job.continuous_usage else None
        timings = self.timings() if finish is not None else None
        self.emit(self.replies.chunk(choice, text, delta, entries, finish, usage, timings, calls, first))

    def _close_stream(self) -> None:
        if self.job.include_usage:
            self.emit(self.replies.usage_chunk(usage_of(self.outputs), self.timings()))
        self.emit(b"data: [DONE]\n\n")

    # Whole answers

    def answer(self) -> dict[str, Any]:
        """The whole answer, once `done` and without a fault."""
        shown = []
        for prompt, running in enumerate(self.running):
            output = running.completion.output
            for rank, index in enumerate(self._best(output)):
                sample, choice = output.samples[index], prompt * self.job.choices + rank
                text, finish = sample.text, FINISH.get(sample.finish_reason or "", sample.finish_reason or "")
                calls = None
                if parser := self._parsers[choice]:
                    text, calls, finish = _parse(parser, text, finish)
                shown.append(self.replies.choice(choice, output, sample, text, finish or "stop", _whole_calls(calls)))
        return self.replies.whole(shown, usage_of(self.outputs), self.timings())

    def scores(self) -> dict[str, Any]:
        """The answer to a score request: of each prompt its tokens' log-probabilities, from the second on."""
        data = []
        for index, output in enumerate(self.outputs):
            entries = output.prompt_logprobs or []
            total = sum(entry.logprob for entry in entries)
            data.append(
                {
                    "index": index,
                    "token_ids": output.prompt_token_ids,
                    "logprobs": [self.replies.scored(entry) for entry in entries],
                    "total_logprob": total,
                    "mean_logprob": total / len(entries) if entries else None,
                }
            )
        return {
            "object": "list",
            "model": self.replies.model,
            "data": data,
            "usage": usage_of(self.outputs),
            "timings": self.timings(),
        }

    def _best(self, output: Output) -> list[int]:
        """Indices of the samples to show: of best_of, those with the highest mean log-probability."""
        if len(output.samples) == self.job.choices:
            return list(range(self.job.choices))
        scores = [sum(e.logprob for e in s.logprobs) / max(1, len(s.logprobs)) for s in output.samples]
        return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: self.job.choices]

    def timings(self) -> dict[str, Any]:
        """Milliseconds, and why: of several sequences the longest times, and the sums of the rest."""
        every = [sample.timings for output in self.outputs for sample in output.samples]
        waits = [running.waited_for for running in self.running if running.waited_for is not None]
        return {
            "queue_ms": round(1000 * max(one.queue for one in every), 3),
            "prefill_ms": round(1000 * max(one.prefill for one in every), 3),
            "decode_ms": round(1000 * max(one.decode for one in every), 3),
            "first_token_ms": None if self.first is None else round(1000 * (self.first - self.began), 3),
            "total_ms": round(1000 * (time.monotonic() - self.began), 3),
            "cached_tokens": sum(one.cached_tokens for one in every),
            "preemptions": sum(one.preemptions for one in every),
            "engine_restarts": max(running.deaths for running in self.running),
            "waited_for": waits[0] if waits else None,
        }


def _finish_name(delta: Delta) -> str | None:
    reason = delta.finish_reason
    return None if reason is None else FINISH.get(reason, reason)


def _parse(parser: TextParser, text: str, finish: str | None) -> tuple[str, list[dict[str, Any]] | None, str | None]:
    pieces = parser.push(text, final=finish is not None)
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    calls = [piece for piece in pieces if isinstance(piece, dict)]
    if finish == "stop" and parser.finish_reason:
        finish = parser.finish_reason
    return content, calls or None, finish


def _whole_calls(calls: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tool calls of a whole answer, from the entries of a stream: those of the same index are one call."""
    merged: dict[int, dict[str, Any]] = {}
    for entry in calls or ():
        one = merged.setdefault(
            entry.get("index", 0), {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        )
        one["id"] = entry.get("id") or one["id"]
        function = entry.get("function", {})
        one["function"]["name"] += function.get("name") or ""
        one["function"]["arguments"] += function.get("arguments") or ""
    return [merged[index] for index in sorted(merged)] or None
