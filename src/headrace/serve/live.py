"""What the live view shows: the last steps, the last requests as waterfalls, the pages as a map, and of a split model
what each rank did.

Hearing of a step costs an append; it is taken apart when somebody looks.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..async_llm import AsyncLLM
from ..workers.wire import OpenedPart, Report
from .faults import Fault
from .replies import dumps
from .stages import describe

if TYPE_CHECKING:
    from .exchange import Exchange
    from .metrics import Metrics
    from .models import Models, Served

MAX_STEPS = 600
MAX_ROWS = 96  # sequences shown
MAX_SPANS = 48  # of a sequence; what comes later widens the last one
MAX_HANDLES = 8192
MAX_CELLS = 2048  # of a pool's map
ASK_SECONDS = 0.5  # for which the engine is not asked the same again
PATIENCE = 1.0  # seconds to wait for its answer
LANE_SECONDS = 4.0  # shown of a split model's ranks
MAX_LANE_SPANS = 2000
JOIN_SECONDS = 0.25  # decode steps closer than this are drawn as one


@dataclass(slots=True)
class Row:
    """One sequence's way. Times are time.monotonic; spans are [kind, start, end, tokens], kind p (prefill) or d
    (decode)."""

    id: str
    model: str
    prompt: int
    began: float
    opened: list[float] = field(default_factory=list)  # admissions: the first, and those after preemptions
    first: float | None = None  # token, known at the end
    last: float | None = None  # token
    ended: float | None = None  # together with all sequences of its HTTP request
    reason: str | None = None
    generated: int = 0
    cached: int = 0
    spans: list[list[Any]] = field(default_factory=list)

    def compute(self, kind: str, start: float, end: float, tokens: int) -> None:
        last = self.spans[-1] if self.spans else None
        near = last is not None and last[0] == kind == "d" and start - last[2] < JOIN_SECONDS
        if last is not None and (near or len(self.spans) >= MAX_SPANS):
            last[2], last[3] = end, last[3] + tokens
        else:
            self.spans.append([kind, start, end, tokens])


class Live:
    """Hears the metrics' feed."""

    def __init__(self, metrics: Metrics, models: Models) -> None:
        self._metrics, self._models = metrics, models
        self._unread: deque[tuple[int, str, Report]] = deque(maxlen=MAX_STEPS)
        self._steps: deque[list[Any]] = deque(maxlen=MAX_STEPS)
        self._count = 0  # steps heard of
        self._rows: OrderedDict[tuple[str, int], Row] = OrderedDict()
        self._handles: OrderedDict[tuple[str, int], OpenedPart] = OrderedDict()
        self._answers: dict[tuple[str, str], tuple[float, asyncio.Task[Any]]] = {}
        metrics.watch(self._hear)

    def routes(self) -> list[Route]:
        return [Route("/live", self.state)]

    # Hearing

    def _hear(self, kind: str, what: Any) -> None:
        if kind == "steps":
            model, reports = what
            for report in reports:
                self._count += 1
                self._unread.append((self._count, model, report))
                for opened in report.opened:
                    self._open(model, opened, report.started)
        elif kind == "admitted":
            self._admit(what)
        elif kind == "finished":
            self._finish(what)
        elif kind == "restarted":
            self._digest()
            for key in [key for key in self._handles if key[0] == what[0]]:
                del self._handles[key]  # another engine counts them anew

    def _open(self, model: str, opened: OpenedPart, at: float) -> None:
        self._handles[model, opened.handle] = opened
        while len(self._handles) > MAX_HANDLES:
            self._handles.popitem(last=False)
        if row := self._rows.get((opened.request_id, opened.sample_index)):
            if not row.opened:
                row.cached = opened.cached
            row.opened = [*row.opened[:15], at]

    def _admit(self, exchange: Exchange) -> None:
        for running in exchange.running:
            prompt = len(running.requests[0].prompt_ids)
            for request in running.requests:
                self._rows[running.id, request.sample_index] = Row(
                    running.id, exchange.collector.model, prompt, exchange.began
                )
        while len(self._rows) > MAX_ROWS:
            self._rows.popitem(last=False)

    def _finish(self, exchange: Exchange) -> None:
        now = time.monotonic()
        for running in exchange.running:
            for index, sample in enumerate(running.completion.output.samples):
                if row := self._rows.get((running.id, index)):
                    row.ended, row.generated = now, len(sample.token_ids)
                    if row.opened and row.generated:
                        row.first = min(now, row.opened[0] + sample.timings.prefill)
                        row.last = min(now, row.first + sample.timings.decode)
                    row.reason = exchange.fault.code if exchange.fault else sample.finish_reason

    # Telling

    def _digest(self) -> None:
        """Take apart the steps that nobody has looked at."""
        while self._unread:
            number, model, report = self._unread.popleft()
            rows, chunks = [0, 0], [0, 0]  # of prefill, of decode
            for handle, start, tokens in report.parts:
                opened = self._handles.get((model, handle))
                decodes = start >= opened.length if opened else tokens == 1
                rows[decodes] += tokens
                chunks[decodes] += 1
                if opened and (row := self._rows.get((opened.request_id, opened.sample_index))):
                    row.compute("d" if decodes else "p", report.started, report.ended, tokens)
            held, pages = sum(report.pages_held), sum(report.pages)
            self._steps.append(
                [
                    number,
                    model,
                    report.started,
                    report.ended,
                    *rows,
                    *chunks,
                    report.running,
                    report.waiting,
                    held,
                    pages,
                ]
            )

    async def state(self, request: Request) -> Response:
        """Steps after number `since`, all rows, and what the pages of `model` hold (null where the engine does not
        tell). Times in seconds, on the clock of `now`."""
        try:
            since = int(request.query_params.get("since", "0")[:20])
        except ValueError:
            raise Fault(400, "since must be a step's number", param="since") from None
        served = self._models.find(request.query_params.get("model"))
        has_pages = served.state == "ready" and isinstance(served.engine, AsyncLLM)
        pages, lanes = await asyncio.gather(
            self._ask(served, "pages", _map, has_pages), self._ask(served, "lanes", _lanes, served.status is not None)
        )
        self._digest()
        status = served.status
        return _json(
            {
                "now": time.monotonic(),
                "model": served.name,
                "state": served.condition,
                "generated": self._metrics.tally.tokens.get(served.name, 0),
                "live": served.engine.live,
                "step": self._count,
                "steps": [step for step in self._steps if step[0] > since or since > self._count],
                "requests": list(self._rows.values()),
                "pages": pages,
                **({"at": status.at, "stages": describe(status), "lanes": lanes} if status else {}),
            }
        )

    async def _ask(
        self, served: Served, what: str, ask: Callable[[Served], Coroutine[Any, Any, Any]], is_there: bool
    ) -> Any:
        """One question of a kind to the engine at a time, for all who look. None where it does not answer."""
        if not is_there:
            return None
        asked, task = self._answers.get((served.name, what), (-1.0, None))
        now = time.monotonic()
        if task is None or (now - asked > ASK_SECONDS and task.done()):
            task = asyncio.create_task(ask(served))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, even if nobody waits
            self._answers[served.name, what] = now, task
        await asyncio.wait([task], timeout=PATIENCE)
        if not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()


async def _map(served: Served) -> list[dict[str, Any]]:
    return [cells(pool) for pool in (await served.llm.page_map()).pools]


async def _lanes(served: Served) -> dict[str, Any]:
    """What each rank did of late: spans as [step, stage, replica, rank, prefill (0 or 1), received, started, ended],
    and what befell the workers as [time, kind, stage, replica, why]."""
    recent = await served.llm.recent(LANE_SECONDS, MAX_LANE_SPANS)
    prefill = {step.number for step in recent.steps if step.rows > step.chunks}
    return {
        "seconds": LANE_SECONDS,
        "spans": [
            [one.step, one.stage, one.replica, one.rank, int(one.step in prefill)]
            + [round(time, 5) for time in (one.hidden, one.started, one.ended)]
            for one in recent.spans
        ],
        "marks": [[round(one.time, 5), one.kind, one.stage, one.replica, one.text] for one in recent.marks],
    }


def cells(pool: bytes) -> dict[str, Any]:
    """A pool's map in at most MAX_CELLS digits of `per_cell` pages each, and how many pages are in each state: 0 free,
    1 kept for its prefix, 2 held, 3 shared. A cell shows what most of its pages that are not free hold. The trash page
    is left out."""
    states = np.frombuffer(pool, np.uint8)[1:]
    per_cell = max(1, -(-len(states) // MAX_CELLS))
    padded = np.zeros(-(-len(states) // per_cell) * per_cell, np.uint8)
    padded[: len(states)] = states
    groups = padded.reshape(-1, per_cell)
    counts = np.stack([(groups == state).sum(axis=1) for state in (1, 2, 3)], axis=1)
    shown = np.where(counts.any(axis=1), counts.argmax(axis=1) + 1, 0)
    return {
        "pages": len(states),
        "per_cell": per_cell,
        "states": np.bincount(states, minlength=4)[:4].tolist(),
        "cells": "".join(map(str, shown.tolist())),
    }


def _json(content: Any) -> Response:
    return Response(dumps(content), media_type="application/json", headers={"cache-control": "no-store"})
