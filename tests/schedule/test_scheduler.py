"""The scheduler against a plain model. The worker here is not a mock of one: it keeps a memory of pages, writes a
fingerprint of the whole prefix where a model would write keys and values, and reads back everything that attention
would read."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.config import Policy, SchedulerConfig
from headrace.engine import Engine
from headrace.errors import CapacityError, RequestError
from headrace.schedule.pages import Pages, Path
from headrace.schedule.routes import Routes
from headrace.schedule.scheduler import Scheduler
from headrace.types import NO_TOKEN, Event, Request, SamplingParams, Step, StepResult
from headrace.workers.executor import NullExecutor
from headrace.workers.residents import Residents, Rows

PAGE = 4
STOP = 0
CONTEXT = 40


def next_token(tokens: tuple[int, ...], sample_index: int) -> int:
    """What the 'model' says after these tokens; 0 ends a sequence."""
    return hash((tokens, sample_index)) % 11


def expected(request: Request) -> tuple[list[int], str]:
    """The plain model: one request alone."""
    tokens = list(request.prompt_ids)
    while True:
        tokens.append(next_token(tuple(tokens), request.sample_index))
        if tokens[-1] == STOP:
            return tokens[len(request.prompt_ids) :], "stop"
        if len(tokens) >= min(CONTEXT, len(request.prompt_ids) + request.params.max_tokens):
            return tokens[len(request.prompt_ids) :], "length"


class Worker:
    def __init__(self, windows: tuple[int | None, ...], sequences: int) -> None:
        self.windows = windows
        self.residents = Residents(sequences, CONTEXT, PAGE, len(windows))
        self.memory: list[dict[int, int]] = [{} for _ in windows]
        self.touched: dict[
            int, tuple[set[tuple[int, int, int]], set[tuple[int, int, int]]]
        ] = {}  # step -> reads, writes

    def _touched(self, rows: Rows) -> tuple[set[tuple[int, int, int]], set[tuple[int, int, int]]]:
        """(pool, page, handle) that a step reads, and that it writes."""
        reads, writes = set(), set()
        for pool, (window, group) in enumerate(zip(self.windows, rows.groups, strict=True)):
            for index, chunk in enumerate(rows.chunks):
                end = chunk.start + len(chunk.tokens)
                first = 0 if window is None else max(0, chunk.start - window + 1)
                reads |= {(pool, int(group.page_table[index][p // PAGE]), chunk.seq) for p in range(first, end)}
                writes |= {(pool, int(group.page_table[index][p // PAGE]), chunk.seq) for p in range(chunk.start, end)}
        return reads, writes

    def lose(self) -> None:
        self.memory = [{} for _ in self.windows]
        self.residents.clear()

    def run(self, step: Step) -> StepResult:
        self.residents.update(step)
        for move in step.transfers:
            memory = self.memory[move.pool]
            for offset in range(PAGE):
                memory[move.target * PAGE + offset] = memory.get(move.source * PAGE + offset, 0)
        rows = self.residents.rows(step)
        self.touched[step.number] = self._touched(rows)
        prefixes = []
        for index, (chunk, resident) in enumerate(zip(rows.chunks, rows.residents, strict=True)):
            first = int(rows.chunk_rows[index])
            for offset, token in enumerate(chunk.tokens):
                position = chunk.start + offset
                assert position < len(resident.tokens), "a late token must be known when its step runs"
                assert token < 0 or token == resident.tokens[position]
                for memory, group in zip(self.memory, rows.groups, strict=True):
                    slot = int(group.slots[first + offset])
                    assert slot >= PAGE, "nothing real is written to the trash page"
                    memory[slot] = hash(tuple(resident.tokens[: position + 1]))
            prefixes.append((index, chunk, resident))
        sampled = []
        for index, chunk, resident in prefixes:
            last = chunk.start + len(chunk.tokens) - 1
            for window, memory, group in zip(self.windows, self.memory, rows.groups, strict=True):
                for position in range(0 if window is None else max(0, last - window + 1), last + 1):
                    slot = int(group.page_table[index][position // PAGE]) * PAGE + position % PAGE
                    assert memory.get(slot) == hash(tuple(resident.tokens[: position + 1])), (
                        "attention would read a wrong key"
                    )
            token = NO_TOKEN
            if chunk.samples:
                assert last + 1 == len(resident.tokens)
                token = next_token(tuple(resident.tokens), resident.request.sample_index)
                resident.tokens.append(token)
            sampled.append(token)
        return StepResult(step.number, tuple(sampled))


class SchedulerMachine(RuleBasedStateMachine):
    windows: tuple[int | None, ...] = (None,)
    policy: Policy = "fcfs"

    def __init__(self) -> None:
        super().__init__()
        pools = [Pages(CONTEXT // PAGE + 4, PAGE, window) for window in self.windows]
        config = SchedulerConfig(
            max_batch_tokens=12, max_sequences=4, max_logit_rows=6, max_context=CONTEXT, policy=self.policy
        )
        self.scheduler = Scheduler(config, Routes.alone(Path(pools)))
        self.worker = Worker(self.windows, 4)
        self.flight: list[tuple[Step, StepResult]] = []
        self.requests: dict[tuple[str, int], Request] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.now = 0.0

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=25),
        count=st.integers(1, 3),
        new=st.integers(1, 14),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "a"]),
        deadline=st.one_of(st.none(), st.integers(5, 60)),
    )
    def add(self, prompt: list[int], count: int, new: int, priority: int, salt: str, deadline: int | None) -> None:
        name = str(len(self.requests))
        for index in range(count):
            request = Request(
                id=name,
                prompt_ids=tuple(prompt),
                params=SamplingParams(max_tokens=new, n=count),
                seed=0,
                stop_ids=(STOP,),
                sample_index=index,
                arrival=self.now,
                priority=priority,
                salt=salt,
                deadline=None if deadline is None else self.now + deadline,
            )
            self.scheduler.add(request)
            self.requests[name, index], self.outputs[name, index] = request, []

    @precondition(lambda self: len(self.flight) < 3)
    @rule()
    def plan(self) -> None:
        self.now += 1
        self.take(self.scheduler.expire(self.now))
        step = self.scheduler.plan(self.now)
        if step is None:
            assert self.flight or not self.scheduler.unfinished, (
                "work is left, nothing is in flight, and nothing was planned"
            )
            return
        assert 0 < step.rows <= 12 and sum(chunk.logit_rows for chunk in step.chunks) <= 6
        result = self.worker.run(step)
        for earlier, _ in self.flight:
            reads, _ = self.worker.touched[earlier.number]
            for pool, page, handle in self.worker.touched[step.number][1]:
                assert not any((pool, page) == (p, q) and handle != h for p, q, h in reads), (
                    "a page in use by a step in flight was given away"
                )
        self.flight.append((step, result))

    @precondition(lambda self: self.flight)
    @rule()
    def apply(self) -> None:
        _, result = self.flight.pop(0)
        self.take(self.scheduler.apply(result, self.now))

    @precondition(lambda self: self.flight)
    @rule()
    def revoke_the_newest(self) -> None:
        step, _ = self.flight.pop()
        self.scheduler.revoke(step.number)

    @rule(lost=st.integers(0, 5))
    def revoke_everything(self, lost: int) -> None:
        if lost:  # rarely
            return
        self.scheduler.revoke_pools()
        self.flight.clear()
        self.worker.lose()

    @precondition(lambda self: self.scheduler.unfinished)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name, index = data.draw(st.sampled_from(sorted(self.scheduler._sequences)))
        whole = data.draw(st.booleans())
        self.take(self.scheduler.finish(name, None if whole else index))

    def take(self, events: list[Event]) -> None:
        for event in events:
            key = (event.request_id, event.sample_index)
            output = self.outputs[key]
            output.extend(event.tokens)
            tokens, reason = expected(self.requests[key])
            if event.finish_reason in ("stop", "length"):
                assert (output, event.finish_reason) == (tokens, reason)
            else:
                assert output == tokens[: len(output)], "tokens do not depend on the schedule"
            if event.finish_reason:
                assert event.timings is not None
                del self.outputs[key]

    @invariant()
    def sound(self) -> None:
        self.scheduler.check()

    def teardown(self) -> None:
        for _ in range(4000):
            if not self.scheduler.unfinished and not self.flight:
                break
            self.plan()
            if self.flight:
                self.apply()
        assert not self.scheduler.unfinished and not self.outputs, "everything ends"
        self.scheduler.check()
        free = [pool.available for pool in self.scheduler.routes.pools]
        assert free == [pool.count - 1 for pool in self.scheduler.routes.pools], "no page is lost"


class WindowedMachine(SchedulerMachine):
    windows = (None, 6)


class LongestPrefixMachine(SchedulerMachine):
    policy = "longest-prefix"


class StaticMachine(SchedulerMachine):
    policy = "static"


FAST = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=90, deadline=None)  # over 10,000 operations
for machine in (WindowedMachine, LongestPrefixMachine, StaticMachine):
    machine.TestCase.settings = FAST
TestWindowed, TestLongestPrefix, TestStatic = (
    WindowedMachine.TestCase,
    LongestPrefixMachine.TestCase,
    StaticMachine.TestCase,
)


def request(name: str, prompt: list[int], new: int = 4, **options: object) -> Request:
    return Request(id=name, prompt_ids=tuple(prompt), params=SamplingParams(max_tokens=new), seed=0, **options)  # type: ignore[arg-type]


def make(pages: int = 100, depth: int = 64, **config: object) -> Scheduler:
    path = Path([Pages(pages, PAGE)], depth=depth)
    return Scheduler(SchedulerConfig(**{"max_context": 400, **config}), Routes.alone(path))  # type: ignore[arg-type]


def test_two_hundred_requests_through_pages_for_three() -> None:
    scheduler = make(pages=3 * 10 + 1, max_context=CONTEXT, max_batch_tokens=64)
    worker = Worker((None,), 64)
    requests = [request(str(i), [1 + i % 2] * (3 + i % 20), 15, arrival=float(i)) for i in range(200)]
    for one in requests:
        scheduler.add(one)
    outputs: dict[str, list[int]] = {one.id: [] for one in requests}
    flight: list[StepResult] = []
    steps = preemptions = 0
    while scheduler.unfinished:
        while len(flight) < 3 and (step := scheduler.plan(float(steps))):
            flight.append(worker.run(step))
        for event in scheduler.apply(flight.pop(0), float(steps)):
            outputs[event.request_id].extend(event.tokens)
            preemptions += event.timings.preemptions if event.timings else 0
        steps += 1
        assert steps < 5000, "no livelock"
    while flight:
        scheduler.apply(flight.pop(0), float(steps))
    scheduler.check()
    for one in requests:
        tokens = list(one.prompt_ids)
        while len(tokens) < min(CONTEXT, len(one.prompt_ids) + 15):
            tokens.append(next_token(tuple(tokens), 0))
        assert outputs[one.id] == tokens[len(one.prompt_ids) :]
    assert preemptions > 0, "the test must have forced preemptions"


def test_decodes_come_first_and_prompts_fill_the_rest() -> None:
    scheduler = make(max_batch_tokens=10)
    scheduler.add(request("old", [1, 2, 3]))
    step = scheduler.plan(0)
    assert step
    scheduler.apply(StepResult(step.number, (5,)), 0)
    scheduler.add(request("new", [7] * 30, priority=5))
    step = scheduler.plan(1)
    assert step and [len(chunk.tokens) for chunk in step.chunks] == [1, 9]
    assert [chunk.samples for chunk in step.chunks] == [True, False] and [
        chunk.logit_rows for chunk in step.chunks
    ] == [1, 0]


def test_late_bound_tokens_name_the_step_that_samples_them() -> None:
    scheduler = make()
    scheduler.add(request("a", [1, 2, 3]))
    steps = [scheduler.plan(0) for _ in range(6)]
    chunks = [step.chunks[0] for step in steps if step]
    assert [(chunk.start, chunk.tokens, chunk.late_step) for chunk in chunks] == [
        (0, (1, 2, 3), -1),
        (3, (-1,), 0),
        (4, (-1,), 1),
        (5, (-1,), 2),
    ]


def test_samples_share_the_prompt_and_copy_its_last_page() -> None:
    scheduler = make()
    for index in range(3):
        scheduler.add(request("n", [1] * 10, sample_index=index))
    step = scheduler.plan(0)
    assert step and len(step.chunks) == 1, "siblings wait for the prompt"
    scheduler.apply(StepResult(step.number, (5,)), 0)
    step = scheduler.plan(1)
    assert step and [(chunk.start, len(chunk.tokens)) for chunk in step.chunks] == [(10, 1), (9, 1), (9, 1)]
    assert len(step.transfers) == 2 and len({move.source for move in step.transfers}) == 1
    first, second = (chunk.new_pages[0] for chunk in step.chunks[1:])
    assert first[:2] == second[:2] and first[2] != second[2]
    scheduler.check()


def test_a_cached_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    scheduler = make()
    for name, salt, start in (("a", "", 0), ("b", "", 8), ("c", "other", 0)):
        scheduler.add(request(name, [3] * 12, 1, salt=salt))
        step = scheduler.plan(0)
        assert step and step.chunks[0].start == start
        events = scheduler.apply(StepResult(step.number, (5,)), 0)
        assert events[0].timings and events[0].timings.cached_tokens == start


def test_prompt_logprobs_ask_for_every_row_once() -> None:
    scheduler = make(max_batch_tokens=7, max_logit_rows=5)
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    scheduler.add(Request(id="s", prompt_ids=tuple(range(1, 13)), params=params, seed=0))
    rows = []
    while step := scheduler.plan(0):
        rows.append((step.chunks[0].start, len(step.chunks[0].tokens), step.chunks[0].logit_rows))
        scheduler.apply(StepResult(step.number, (5,)), 0)
        if len(rows) == 2:
            scheduler.revoke_pools()
    assert rows == [(0, 5, 5), (5, 5, 5), (0, 7, 0), (7, 5, 2), (12, 1, 1)]


def test_priorities_overtake_and_ranks_decide_who_is_preempted() -> None:
    scheduler = make(pages=7, max_context=24)
    scheduler.add(request("low", [1] * 8, 15, arrival=0.0))
    scheduler.add(request("high", [2] * 8, 15, arrival=1.0, priority=1))
    finished = []
    while step := scheduler.plan(0):
        events = scheduler.apply(
            StepResult(step.number, tuple(5 if chunk.samples else NO_TOKEN for chunk in step.chunks)), 0
        )
        finished += [(event.request_id, event.timings.preemptions) for event in events if event.timings]
    assert finished == [("high", 0), ("low", 1)]


def test_deadlines_end_waiting_and_running_sequences() -> None:
    scheduler = make(max_sequences=1)
    scheduler.add(request("runs", [1], 50, deadline=5.0))
    scheduler.add(request("waits", [1], 50, deadline=4.0))
    step = scheduler.plan(0)
    assert [(event.request_id, event.finish_reason) for event in scheduler.expire(6.0)] == [
        ("waits", "deadline"),
        ("runs", "deadline"),
    ]
    assert step and scheduler.apply(StepResult(step.number, (5,)), 6.0) == []
    scheduler.check()
    assert scheduler.routes.pools[0].available == 99


def test_longest_prefix_goes_first_and_nobody_is_passed_over_for_ever() -> None:
    scheduler = make(policy="longest-prefix", max_sequences=1, max_batch_tokens=64)
    warm = request("warm", [9] * 17, 1)
    scheduler.add(warm)
    order = []
    for index in range(40):
        scheduler.add(
            request(
                f"cold{index}" if index == 0 else f"hot{index}",
                [1] * 17 if index == 0 else [9] * 17,
                1,
                arrival=index + 1.0,
            )
        )
    while step := scheduler.plan(0):
        for event in scheduler.apply(StepResult(step.number, (5,)), 0):
            order.append(event.request_id)
    assert order[:2] == ["warm", "hot1"] and order.index("cold0") == 33


def test_refusals() -> None:
    scheduler = make(pages=6)
    assert scheduler.max_context == 21
    with pytest.raises(RequestError, match="no tokens"):
        scheduler.add(request("a", []))
    with pytest.raises(CapacityError, match="21 tokens; at most 20 fit"):
        scheduler.add(request("a", [1] * 21))
    scheduler.add(request("a", [1] * 20, 100))
    with pytest.raises(RequestError, match="unique"):
        scheduler.add(request("a", [1]))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_engine_ends_everything_with_any_number_of_steps_in_flight(depth: int) -> None:
    engine = Engine(make(depth=depth), NullExecutor(token=7))
    for index in range(10):
        engine.add(request(str(index), [1] * (index + 1), index + 1))
    counts = dict.fromkeys(map(str, range(10)), 0)
    while engine.busy:
        for event in engine.step():
            counts[event.request_id] += len(event.tokens)
    assert counts == {str(index): index + 1 for index in range(10)}
    assert len(engine.trace) > 0
    engine.scheduler.check()
    engine.close()


def test_a_prompt_to_score_needs_room_for_every_token() -> None:
    scheduler = make(pages=4)
    prompt = tuple([1] * 13)
    with pytest.raises(CapacityError, match="13 tokens; at most 12"):
        scheduler.add(Request(id="s", prompt_ids=prompt, params=SamplingParams(), seed=0, kind="score"))


def test_a_static_batch_fills_over_several_steps_and_then_closes() -> None:
    scheduler = make(policy="static", max_batch_tokens=8, max_sequences=5)
    for index in range(7):
        scheduler.add(request(str(index), [1 + index] * 8, 3))
    batches = []
    while step := scheduler.plan(0):
        batches.append(scheduler.running)
        scheduler.apply(StepResult(step.number, tuple(5 if chunk.samples else NO_TOKEN for chunk in step.chunks)), 0)
    assert max(batches) == 3, "the first ends after three tokens, which closes the batch"
    assert batches[-1] >= 1 and not scheduler.unfinished


def test_waiting_too_long_is_time_in_the_queue() -> None:
    scheduler = make(max_sequences=1)
    scheduler.add(request("late", [1], deadline=5.0, arrival=1.0))
    (event,) = scheduler.expire(6.0)
    assert event.timings and (event.timings.queue, event.timings.prefill, event.timings.decode) == (5.0, 0.0, 0.0)


def test_finished_sequences_leave_their_deadlines() -> None:
    scheduler = make()
    for index in range(500):
        scheduler.add(request(str(index), [1], 1, deadline=1e9))
        step = scheduler.plan(0)
        assert step
        scheduler.apply(StepResult(step.number, (5,)), 0)
    assert len(scheduler._deadlines) < 100
