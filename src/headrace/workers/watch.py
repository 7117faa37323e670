"""Watches a split model's replicas, and says how they stand."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, defaultdict

from ..schedule.routes import Replica
from ..schedule.scheduler import Scheduler
from ..trace import Mark, StageSpan, Trace
from .staged import RankStatus, StagedExecutor
from .wire import HOP_SECONDS, ReplicaStatus, Status

LOOK_SECONDS = 0.05  # between looks for a change
TELL_SECONDS = 1.0  # between two statuses where nothing changes
MAX_HALVES = 4096  # hops of which one end is known


class StageWatch:
    """Sums up an engine's spans and marks, those of its start included."""

    def __init__(self, scheduler: Scheduler, executor: StagedExecutor, trace: Trace) -> None:
        self._scheduler, self._executor, self._plan = scheduler, executor, executor.plan
        stages = len(self._plan.stages)
        self._busy, self._reduces = [0.0] * stages, [0.0] * stages
        self._own: defaultdict[Replica, float] = defaultdict(float)  # busy seconds
        self._restarts: defaultdict[Replica, int] = defaultdict(int)
        self._joined: dict[Replica, float] = {}
        self._lost: dict[Replica, tuple[float, str]] = {}
        self._given_up: set[Replica] = set()
        self._hops, self._hop_seconds = [0] * (len(HOP_SECONDS) + 1), 0.0
        self._sent: OrderedDict[tuple[int, int], float] = OrderedDict()  # by step and the stage that follows
        self._come: OrderedDict[tuple[int, int], float] = OrderedDict()
        self._looked = self._told = 0.0
        self._seen: object = None
        for entry in (*trace.spans, *trace.marks):
            self._hear(entry)
        trace.observer = self._hear

    def scale(self, stage: int, replicas: int) -> None:
        """Have so many replicas of a stage. ConfigError where that cannot be."""
        self._executor.scale(stage, replicas)
        self._given_up = {one for one in self._given_up if one[0] != stage}

    def news(self, now: float) -> Status | None:
        """A status, where something has changed or the last one is a second old. Cheap where it is None."""
        if now < self._looked + LOOK_SECONDS:
            return None
        self._looked = now
        ranks = self._executor.status()
        if now < self._told + TELL_SECONDS and self._seen == self._state(ranks):
            return None
        return self.status(now, ranks)

    def status(self, now: float, ranks: list[RankStatus] | None = None) -> Status:
        """How all replicas stand."""
        ranks = self._executor.status() if ranks is None else ranks
        self._told, self._seen = now, self._state(ranks)
        crews: dict[Replica, list[RankStatus]] = {}
        for rank in sorted([*ranks, *(RankStatus(*replica, 0, 0, "given up") for replica in self._given_up)]):
            crews.setdefault((rank.stage, rank.replica), []).append(rank)
        return Status(
            now,
            self._plan.lost,
            [(stage.layers.start, stage.layers.stop - 1) for stage in self._plan.stages],
            [self._replica(replica, own) for replica, own in crews.items()],
            list(self._busy),
            list(self._reduces),
            list(self._hops),
            self._hop_seconds,
        )

    def _state(self, ranks: list[RankStatus]) -> object:
        """What is told at once where it changes."""
        return ranks, set(self._scheduler.routes.leaving), self._scheduler.unfinished > 0

    def _replica(self, replica: Replica, ranks: list[RankStatus]) -> ReplicaStatus:
        stage, number = replica
        scheduler, planned = self._scheduler, self._plan.stages[stage].replicas
        pools = scheduler.routes.pools_of(replica)
        lost, why = self._lost.get(replica, (0.0, ""))
        return ReplicaStatus(
            stage,
            number,
            "leaving" if replica in scheduler.routes.leaving else ranks[0].state,
            planned[min(number, len(planned) - 1)].host,
            tuple(rank.pid for rank in ranks),
            len(scheduler.on(replica)),
            sum(path.in_flight for path in scheduler.routes.through(replica)),
            sum(pool.count - 1 - pool.available for pool in pools),
            sum(pool.count - 1 for pool in pools),
            self._restarts[replica],
            self._joined.get(replica, 0.0),
            lost,
            why,
            self._own[replica],
        )

    def _hear(self, entry: StageSpan | Mark) -> None:
        if isinstance(entry, StageSpan):
            self._add(entry)
        elif entry.stage is not None and entry.replica is not None:
            replica = (entry.stage, entry.replica)
            if entry.kind == "joined":
                self._joined[replica] = entry.time
                self._given_up.discard(replica)
            elif entry.kind == "lost":
                self._restarts[replica] += 1
                self._lost[replica] = entry.time, entry.text
            elif entry.kind == "left" and self._lost.get(replica, (0.0, ""))[0] > self._joined.get(replica, 0.0):
                self._given_up.add(replica)  # what leaves as it was told to has been there till then

    def _add(self, span: StageSpan) -> None:
        self._busy[span.stage] += span.busy
        self._reduces[span.stage] += span.reduce_seconds
        self._own[span.stage, span.replica] += span.busy
        if span.rank:
            return
        if span.stage:
            self._pair((span.step, span.stage), span.hidden, self._come, self._sent)
        if span.sent:
            self._pair((span.step, span.stage + 1), span.ended, self._sent, self._come)

    def _pair(
        self,
        hop: tuple[int, int],
        time: float,
        own: OrderedDict[tuple[int, int], float],
        others: OrderedDict[tuple[int, int], float],
    ) -> None:
        """One end of a hop; spans of both come in any order."""
        other = others.pop(hop, None)
        if other is None:
            own[hop] = time
            if len(own) > MAX_HALVES:
                own.popitem(last=False)
            return
        seconds = abs(time - other)
        self._hops[bisect_left(HOP_SECONDS, seconds)] += 1
        self._hop_seconds += seconds
