"""The scheduler over several stages and replicas that come and go, against the plain model of test_scheduler."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from tests.schedule.test_scheduler import CONTEXT, PAGE, SchedulerMachine, Worker, expected, request

from headrace.config import Routing, SchedulerConfig
from headrace.schedule.pages import Pages, Path
from headrace.schedule.routes import Routes
from headrace.schedule.scheduler import Scheduler
from headrace.types import Chunk, Step, StepResult, Transfer


class Stages:
    """A worker for each replica, each with the pools of its stage, and what the executor does with finished handles."""

    def __init__(self, windows: list[tuple[int | None, ...]]) -> None:
        self.windows = windows
        self.workers: dict[tuple[int, int], Worker] = {}
        self.holders: dict[int, list[tuple[int, int]]] = {}
        self.drops: dict[tuple[int, int], list[int]] = {}
        self.touched: dict[int, tuple[set[tuple[int, int, int]], set[tuple[int, int, int]]]] = {}

    def join(self, replica: tuple[int, int]) -> None:
        self.workers[replica] = Worker(self.windows[replica[0]], 16)
        self.drops[replica] = []

    def lose(self, replica: tuple[int, int]) -> None:
        del self.workers[replica], self.drops[replica]

    def run(self, step: Step) -> StepResult:
        for handle in step.finished:
            for replica in self.holders.pop(handle):
                if replica in self.workers and handle in self.workers[replica].residents._by_handle:
                    self.drops[replica].append(handle)
        path = list(enumerate(step.path))
        for opened in step.opened:
            self.holders[opened.seq] = path
        result, offset = None, 0
        for replica in path:
            worker, count = self.workers[replica], len(self.windows[replica[0]])
            chunks = tuple(
                Chunk(c.seq, c.start, c.tokens, c.new_pages[offset : offset + count], c.logit_rows, c.samples)
                for c in step.chunks
            )
            moves = tuple(
                Transfer(t.pool - offset, t.source, t.target) for t in step.transfers if 0 <= t.pool - offset < count
            )
            offset += count
            drops, self.drops[replica] = self.drops[replica], []
            result = worker.run(Step(step.number, chunks, step.opened, moves, tuple(drops)))
            mine = [{(replica[0] * 10 + replica[1], *x[1:]) for x in xs} for xs in worker.touched[step.number]]
            reads, writes = self.touched.setdefault(step.number, (set(), set()))
            reads |= mine[0]
            writes |= mine[1]
        assert result is not None
        return result


class StagedMachine(SchedulerMachine):
    """Two stages, of up to two and three replicas; one pool has a window."""

    routing: Routing = "shortest-queue"

    def __init__(self) -> None:
        super().__init__()
        config = SchedulerConfig(max_batch_tokens=12, max_sequences=6, max_logit_rows=6, max_context=CONTEXT)
        windows: list[tuple[int | None, ...]] = [(None,), (6, None)]
        pools = [lambda own=own: [Pages(CONTEXT // PAGE + 4, PAGE, w, 36) for w in own] for own in windows]
        self.scheduler = Scheduler(config, Routes(pools, routing=self.routing, depth=3, parts=2, late=False))
        self.stages = Stages(windows)
        self.worker = self.stages  # type: ignore[assignment]
        self.join(0)
        self.join(2)

    @rule(which=st.integers(0, 4))
    def join(self, which: int) -> None:
        replica = (0, which) if which < 2 else (1, which - 2)
        if replica not in self.stages.workers:
            self.stages.join(replica)
            self.scheduler.join(replica)

    @rule(data=st.data(), rarely=st.integers(0, 3))
    def lose(self, data: st.DataObject, rarely: int) -> None:
        if self.stages.workers and not rarely:
            replica = data.draw(st.sampled_from(sorted(self.stages.workers)))
            if data.draw(st.booleans()):
                self.take(self.scheduler.blame(replica, self.now))
            self.stages.lose(replica)
            gone = self.scheduler.lose(replica)
            self.flight = [(step, result) for step, result in self.flight if step.number not in gone]

    @rule(data=st.data(), rarely=st.integers(0, 3))
    def leave(self, data: st.DataObject, rarely: int) -> None:
        if self.stages.workers and not rarely:
            self.scheduler.leave(data.draw(st.sampled_from(sorted(self.stages.workers))))

    @precondition(lambda self: self.flight)
    @rule(data=st.data())
    def apply_any(self, data: st.DataObject) -> None:
        """Paths answer in any order; one path's steps in theirs."""
        path = data.draw(st.sampled_from(sorted({step.path for step, _ in self.flight})))
        index = next(i for i, (step, _) in enumerate(self.flight) if step.path == path)
        _, result = self.flight.pop(index)
        self.take(self.scheduler.apply(result, self.now))

    @precondition(lambda self: len(self.flight) < 8)
    @rule()
    def plan(self) -> None:
        self.now += 1
        self.take(self.scheduler.expire(self.now))
        for replica in self.scheduler.left:
            self.scheduler.lose(replica)
            self.stages.lose(replica)
        if len({stage for stage, _ in self.stages.workers}) < 2:
            for which in (0, 2):
                self.join(which)
        if step := self.scheduler.plan(self.now):
            assert -1 not in {token for chunk in step.chunks for token in chunk.tokens}, "no token is late here"
            self.flight.append((step, self.stages.run(step)))
        else:
            assert self.flight or not self.scheduler.unfinished, "work is left, and nothing was planned"

    def revoke_everything(self, lost: int) -> None:
        """Not here: `lose` does more."""

    def teardown(self) -> None:
        for which in (0, 2):
            self.join(which)
        super().teardown()


class RoundRobinMachine(StagedMachine):
    routing = "round-robin"


class PrefixMachine(StagedMachine):
    routing = "longest-prefix"


TestStaged, TestRoundRobin, TestPrefix = (m.TestCase for m in (StagedMachine, RoundRobinMachine, PrefixMachine))
TestStaged.settings = settings(max_examples=60, stateful_step_count=80, deadline=None)
TestRoundRobin.settings = TestPrefix.settings = settings(max_examples=30, stateful_step_count=60, deadline=None)


def routes(replicas: int, pages: int = 40, **options: object) -> Routes:
    made = Routes([lambda: [Pages(pages, PAGE)]], **options)  # type: ignore[arg-type]
    for number in range(replicas):
        made.join((0, number))
    return made


def spread(routing: Routing, requests: int) -> Counter[tuple[int, ...]]:
    """Over which paths requests that come one by one are spread."""
    scheduler = Scheduler(SchedulerConfig(max_batch_tokens=64), routes(3, routing=routing, depth=1))
    chosen: Counter[tuple[int, ...]] = Counter()
    for index in range(requests):
        scheduler.add(request(str(index), [index + 1] * 9, 30, arrival=float(index)))
        while step := scheduler.plan(float(index)):
            chosen[step.path] += len(step.opened)
            scheduler.apply(StepResult(step.number, (1,) * len(step.chunks)), float(index))
            if step.opened:
                break
    return chosen


@pytest.mark.parametrize("routing", ["round-robin", "shortest-queue", "least-kv"])
def test_requests_are_spread_evenly(routing: Routing) -> None:
    assert set(spread(routing, 9).values()) == {3}


def test_random_routing_uses_all_paths() -> None:
    assert len(spread("random", 30)) == 3


def test_the_longest_prefix_finds_its_path_again() -> None:
    scheduler = Scheduler(SchedulerConfig(), routes(3, routing="longest-prefix"))
    for round_ in range(2):
        seen = []
        for index in range(3):
            one = request(f"{round_} {index}", [index + 1] * 20, 1)
            scheduler.add(one)
            if round_ == 0:
                for other in scheduler.routes.paths:
                    other.closing = other.key != (index,)
            step = scheduler.plan(0.0)
            assert step
            for other in scheduler.routes.paths:
                other.closing = False
            seen.append((step.path, step.chunks[0].start))
            scheduler.apply(StepResult(step.number, (1,)), 0.0)
        assert seen == [((i,), 16 if round_ else 0) for i in range(3)]


def test_a_full_path_gives_its_queue_to_others() -> None:
    scheduler = Scheduler(SchedulerConfig(), routes(2, pages=11, routing="round-robin"))
    for index in range(4):  # each fills a pool
        scheduler.add(request(str(index), [index + 1] * 30, 9))
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert first and second and {first.path, second.path} == {(0,), (1,)}
    scheduler.lose((0, 0))
    rest = [scheduler.plan(0.0) for _ in range(3)]
    assert all(step is None or step.path == (1,) for step in rest)
    scheduler.check()


def test_no_path_no_step() -> None:
    scheduler = Scheduler(SchedulerConfig(), routes(1))
    scheduler.lose((0, 0))
    scheduler.add(request("a", [1, 2, 3]))
    assert scheduler.plan(0.0) is None and scheduler.waiting == 1
    scheduler.join((0, 7))
    step = scheduler.plan(0.0)
    assert step and step.path == (7,)


def test_parts_fill_the_stages() -> None:
    """Of 8 sequences on two stages, four are in each step, and both steps are in flight at once."""
    made = Routes([lambda: [Pages(99, PAGE)]] * 2, depth=2, parts=2, late=False)
    made.join((0, 0))
    made.join((1, 0))
    scheduler = Scheduler(SchedulerConfig(), made)
    for index in range(8):
        scheduler.add(request(str(index), [index + 1] * 3, 20))
    step = scheduler.plan(0.0)
    assert step and scheduler.plan(0.0) is None
    scheduler.apply(StepResult(step.number, (1,) * 8), 0.0)
    for _ in range(3):
        steps = [scheduler.plan(0.0), scheduler.plan(0.0)]
        assert [len(step.chunks) for step in steps if step] == [4, 4] and scheduler.plan(0.0) is None
        for step in steps:
            assert step
            scheduler.apply(StepResult(step.number, (1,) * 4), 0.0)


def test_a_path_of_one_stage_binds_late_and_matches_alone() -> None:
    one = request("a", [1, 2, 3], 4)
    alone = Scheduler(SchedulerConfig(), Routes.alone(Path([Pages(40, PAGE)])))
    other = Scheduler(SchedulerConfig(), routes(1))
    for scheduler in (alone, other):
        scheduler.add(one)
    for _ in range(3):
        a, b = alone.plan(0.0), other.plan(0.0)
        assert a and b and a.chunks == b.chunks
    assert expected(one)[1] in ("stop", "length")
