"""What a split model did when, as one file in Chrome's trace event format, which Perfetto shows; and how much of the
time its stages were idle."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ResultsError
from ..plan.plan import Plan
from ..trace import Mark, StageSpan, StepTrace

COORDINATOR = 1  # its process number; replicas follow
Replica = tuple[int, int]  # stage, and number among the stage's replicas
Event = dict[str, Any]

_TIMES: Mapping[type, tuple[str, ...]] = {
    StepTrace: ("planned", "submitted", "started", "ended", "answered", "applied"),
    StageSpan: ("received", "hidden", "started", "ended", "sent", "reduce_seconds"),
    Mark: ("time",),
}

# Source of the fields: "Trace Event Format", the Chromium project.
_TICK = 0.001  # microseconds: the least difference that viewers keep


def timeline(
    steps: Iterable[StepTrace], spans: Iterable[StageSpan], marks: Iterable[Mark], plan: Plan | None = None
) -> dict[str, Any]:
    """A trace in Chrome's format, in microseconds since the first thing that happened.

    A process row for the coordinator and each replica (also those of the plan that did nothing), a thread row a rank;
    each step on each rank as a slice, with what it waited for before it, its reductions in it and its sending behind
    it; arrows from there to the same step on the next stage; marks as instants. `metadata` has the plan and each
    stage's idle share (see `bubble`). ResultsError where a time is not finite.
    """
    steps, spans, marks = list(steps), sorted(spans, key=lambda span: span.started), list(marks)
    _check_times((*steps, *spans, *marks))
    begin = min(
        (
            *(step.planned for step in steps),
            *(min(s.received, s.hidden, s.started) for s in spans),
            *(m.time for m in marks),
        ),
        default=0.0,
    )
    rows = _Rows(begin, spans, marks, plan)
    chunks = {step.number: step.chunks for step in steps}
    events = [*rows.names()]
    for step in sorted(steps, key=lambda step: step.planned):
        events += _of_coordinator(step, rows)
    drawn = _drawn(spans)
    for one in drawn:
        events += _of_rank(one, chunks, rows)
    events += _arrows(drawn, rows)
    events += (_instant(mark, rows) for mark in marks)
    idle = {f"stage {stage}": share for stage, share in bubble(spans, plan=plan).items()}
    about = {"plan": "" if plan is None else str(plan), "idle": idle}
    return {"traceEvents": events, "displayTimeUnit": "ms", "metadata": about}


def write_timeline(
    path: str | Path,
    steps: Iterable[StepTrace],
    spans: Iterable[StageSpan],
    marks: Iterable[Mark],
    plan: Plan | None = None,
) -> None:
    """Write `timeline` to a JSON file, whole or not at all. ResultsError where a time is not finite."""
    path = Path(path)
    text = json.dumps(timeline(steps, spans, marks, plan), separators=(",", ":"))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_times(entries: Iterable[StepTrace | StageSpan | Mark]) -> None:
    for entry in entries:
        for name in _TIMES[type(entry)]:
            if not math.isfinite(value := getattr(entry, name)):
                raise ResultsError(f"{name} of {entry} is {value}; a timeline holds finite times only, find out why")


class _Rows:
    """Process and thread numbers, and times as the format has them."""

    def __init__(self, begin: float, spans: Sequence[StageSpan], marks: Sequence[Mark], plan: Plan | None) -> None:
        self._begin = begin
        ranks: dict[Replica, int] = {}
        self._titles: dict[Replica, str] = {}
        for stage, replica, title, count in _planned(plan):
            ranks[stage, replica] = count
            self._titles[stage, replica] = title
        for one in (*spans, *marks):
            if one.stage is not None and one.replica is not None:
                key = (one.stage, one.replica)
                ranks[key] = max(ranks.get(key, 1), (one.rank or 0) + 1)
        self._ranks = dict(sorted(ranks.items()))
        self._process = {key: number for number, key in enumerate(self._ranks, COORDINATOR + 1)}

    def at(self, seconds: float) -> float:
        return round((seconds - self._begin) * 1e6, 3)

    def place(self, stage: int, replica: int, rank: int) -> Event:
        return {"pid": self._process[stage, replica], "tid": rank + 1}

    def slice(self, name: str, start: float, end: float, place: Event, **args: Any) -> Event:
        at = self.at(start)
        length = round(max(0.0, self.at(end) - at), 3)
        return {"ph": "X", "name": name, "ts": at, "dur": length, **place, **({"args": args} if args else {})}

    def names(self) -> Iterator[Event]:
        """Titles of rows, in order."""
        yield from self._titled(COORDINATOR, "coordinator", ["steps"])
        for (stage, replica), count in self._ranks.items():
            title = self._titles.get((stage, replica), f"stage {stage} replica {replica}")
            yield from self._titled(self._process[stage, replica], title, [f"rank {rank}" for rank in range(count)])

    def _titled(self, process: int, title: str, threads: Sequence[str]) -> Iterator[Event]:
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}}
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
        for number, name in enumerate(threads, 1):
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": number, "args": {"name": name}}


def _planned(plan: Plan | None) -> Iterator[tuple[int, int, str, int]]:
    for s, stage in enumerate(plan.stages if plan else ()):
        for r, replica in enumerate(stage.replicas):
            layers = "" if stage.is_open else f", layers {stage.first}-{stage.last}"
            host = "" if replica.host is None else f" @{replica.host}"
            yield s, r, f"stage {s} replica {r}{host}{layers}", len(replica.ranks)


def _of_coordinator(step: StepTrace, rows: _Rows) -> list[Event]:
    """The host's work as slices, and the time in flight as a pair of its own: several steps are in flight at once."""
    place = {"pid": COORDINATOR, "tid": 1}
    flight = {"cat": "step", "id": step.number, "name": f"step {step.number}", **place}
    return [
        rows.slice(f"plan step {step.number}", step.planned, step.submitted, place, rows=step.rows, chunks=step.chunks),
        {"ph": "b", "ts": rows.at(step.submitted), "args": {"rows": step.rows, "chunks": step.chunks}, **flight},
        {"ph": "e", "ts": rows.at(step.answered), **flight},
        rows.slice(f"apply step {step.number}", step.answered, step.applied, place),
    ]


@dataclass(frozen=True)
class _Drawn:
    """A span on its rank's row: nothing is there from `free` to its own start, and from `done` to the next span's."""

    span: StageSpan
    free: float
    done: float


def _drawn(spans: Sequence[StageSpan]) -> list[_Drawn]:
    by_rank: dict[tuple[int, int, int], list[StageSpan]] = defaultdict(list)
    for span in spans:
        by_rank[span.stage, span.replica, span.rank].append(span)
    found = []
    for own in by_rank.values():
        free = -math.inf
        for span, following in zip(own, [*(after.started for after in own[1:]), math.inf]):
            done = max(span.ended, min(span.sent, following))  # sending may go on beside the next step
            found.append(_Drawn(span, free, done))
            free = done
    return found


def _of_rank(drawn: _Drawn, chunks: Mapping[int, int], rows: _Rows) -> Iterator[Event]:
    span = drawn.span
    place = rows.place(span.stage, span.replica, span.rank)
    title = f"step {span.step}: {_count(span.rows, 'row')}"
    if span.step in chunks:
        title += f", {_count(chunks[span.step], 'chunk')}"
    came, waiting = min(span.hidden, span.started), max(span.received, drawn.free)
    if came > waiting:
        yield rows.slice("waits for hidden states", waiting, came, place, step=span.step)
    known = {"step": span.step, "rows": span.rows, "reduces": span.reduces, "reduce_bytes": span.reduce_bytes}
    yield rows.slice(title, span.started, span.ended, place, **known)
    if span.reduce_seconds > 0:
        name = f"{_count(span.reduces, 'reduction')}, {span.reduce_bytes} bytes (their sum, shown at the end)"
        start = max(span.started, span.ended - span.reduce_seconds)
        yield rows.slice(name, start, span.ended, place, step=span.step, seconds=span.reduce_seconds)
    if drawn.done > span.ended:
        yield rows.slice("sends", span.ended, drawn.done, place, step=span.step)


def _arrows(drawn: Sequence[_Drawn], rows: _Rows) -> Iterator[Event]:
    """From where a step was sent to where the next stage had its hidden states and was free for them: from the same
    rank, or the first that sent it."""
    senders: dict[tuple[int, int], dict[int, _Drawn]] = defaultdict(dict)
    for one in drawn:
        if one.span.sent:
            senders[one.span.step, one.span.stage][one.span.rank] = one
    for number, target in enumerate(drawn, 1):
        span = target.span
        sources = senders.get((span.step, span.stage - 1))
        if not sources:
            continue
        source = sources.get(span.rank) or sources[min(sources)]
        sender = rows.place(source.span.stage, source.span.replica, source.span.rank)
        arrow = {"cat": "hop", "name": "hidden states", "id": number, "args": {"step": span.step}}
        # An arrow starts in the slice around its first time, so before that ends; and ends at the slice that begins
        # next, so before that begins.
        yield {"ph": "s", "ts": round(rows.at(source.done) - _TICK, 3), **sender, **arrow}
        end = min(rows.at(max(target.free, span.hidden)), round(rows.at(span.started) - _TICK, 3))
        yield {"ph": "f", "ts": end, **rows.place(span.stage, span.replica, span.rank), **arrow}


def _instant(mark: Mark, rows: _Rows) -> Event:
    """A line across a rank's row, its replica's rows, or all."""
    name = f"{mark.kind}: {mark.text}" if mark.text else mark.kind
    args = {key: value for key in ("stage", "replica", "rank") if (value := getattr(mark, key)) is not None}
    event = {"ph": "i", "cat": "mark", "name": name, "ts": rows.at(mark.time), "args": args}
    if mark.stage is None or mark.replica is None:
        return {**event, "s": "g", "pid": COORDINATOR, "tid": 1}
    return {**event, "s": "p" if mark.rank is None else "t", **rows.place(mark.stage, mark.replica, mark.rank or 0)}


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


# -- idle shares -------------------------------------------------------------------------------------------------------


def bubble(
    spans: Iterable[StageSpan], window: tuple[float, float] | None = None, plan: Plan | None = None
) -> dict[int, float]:
    """The share of the time in which each stage's ranks computed nothing: of the `window` (from, to, in seconds), or
    from the first start to the last end of all.

    Ranks are those of the plan; without one, those that have spans. Reductions count as work. {} where nothing ran.
    """
    spans = list(spans)
    if window is not None and window[1] <= window[0]:
        raise ResultsError(f"a window must end after it begins; it goes from {window[0]} to {window[1]} s")
    if not any(span.busy > 0 for span in spans):
        return {}
    start, end = window or (min(span.started for span in spans), max(span.ended for span in spans))
    busy: dict[int, float] = defaultdict(float)
    ranks: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for s, r, _, count in _planned(plan):
        ranks[s] |= {(r, rank) for rank in range(count)}
    for span in spans:
        ranks[span.stage].add((span.replica, span.rank))
        busy[span.stage] += max(0.0, min(span.ended, end) - max(span.started, start))
    return {stage: 1 - busy[stage] / (len(own) * (end - start)) for stage, own in sorted(ranks.items())}


def burst_bubble(spans: Iterable[StageSpan], plan: Plan | None = None) -> float:
    """The idle share of a burst, empty to empty: 1 - sum of busy times / (p stages x makespan). Of m equal
    micro-batches over p equal stages it is (p - 1) / (m + p - 1) at best (see `partition.ideal_bubble`). ResultsError
    where nothing ran."""
    shares = bubble(spans, plan=plan)
    if not shares:
        raise ResultsError("a bubble needs the spans of at least one step, got none; trace the burst itself")
    return sum(shares.values()) / len(shares)
