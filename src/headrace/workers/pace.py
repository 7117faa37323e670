"""How many micro-batches each path has in flight, by what the stages are seen to take."""

from __future__ import annotations

from collections.abc import Sequence

from ..plan.partition import choose_micro_batches
from ..schedule.routes import Routes
from ..trace import StageSpan

LOOK_SECONDS = 1.0  # between two choices
MOST = 8  # micro-batches of a path
FEWEST_SPANS = 20  # of each stage, before a choice
COARSE_ROWS = 64  # above, row counts are taken together in steps of these
ONE_ROW = 0.3  # of the time of the fewest rows seen, at a guess
FRESH = 0.1  # weight of the newest time


class Pace:
    """Watches the spans of a plan's stages, and sets the number of micro-batches where the plan leaves it open."""

    def __init__(self, routes: Routes, stages: int) -> None:
        self._routes, self._stages = routes, stages
        self._times: list[dict[int, float]] = [{} for _ in range(stages)]
        self._counts = [0] * stages
        self._hop = self._host = 0.0
        self._looked = 0.0

    def add(self, span: StageSpan) -> None:
        if span.rank:
            return
        rows = span.rows if span.rows <= COARSE_ROWS else -(-span.rows // COARSE_ROWS) * COARSE_ROWS
        self._times[span.stage][rows] = _mixed(self._times[span.stage].get(rows), span.busy)
        self._counts[span.stage] += 1
        if span.sent:
            self._hop = _mixed(self._hop or None, span.sent - span.ended)

    def answered(self, ended: float, now: float) -> None:
        """The coordinator has a result of a step that ended then; the next step takes as long to come back."""
        self._host = _mixed(self._host or None, 2 * (now - ended))

    def look(self, now: float, replicas: Sequence[int]) -> None:
        """Choose anew, now and then; `replicas` of each stage."""
        if now < self._looked + LOOK_SECONDS or min(self._counts) < FEWEST_SPANS:
            return
        self._looked = now
        rows = max((path.running for path in self._routes.paths), default=0)
        if rows > 1:
            times = [_with_one_row(seen) for seen in self._times]
            self._routes.pace(choose_micro_batches(rows, times, self._hop, self._host, replicas, MOST))


def _with_one_row(seen: dict[int, float]) -> dict[int, float]:
    """The times by rows, with a guess at one row's until it is seen: else fewer rows would never look faster."""
    return {1: seen[min(seen)] * ONE_ROW} | seen


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + FRESH * (new - old)
