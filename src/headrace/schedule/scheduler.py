"""The scheduler: which tokens of which sequences the next step computes.

There are no phases. A sequence has `computed <= scheduled <= length` tokens and catches up; prefill, chunked
prefill, decode and recomputation after a preemption are the same thing. `length` counts tokens that are known and
those that steps in flight will sample, so step n+1 can be planned before step n has answered.

    add ──▶ waiting ──admit──▶ running ──apply──▶ finished        residence: what a running sequence has on the workers,
               ▲                  │                               a handle and pages. It is closed when the sequence
               stops
               └──preempt, revoke─┘                               running; its pages come free when no step in flight
               names it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from operator import itemgetter

from ..config import SchedulerConfig
from ..errors import CapacityError, RequestError
from ..types import LATE, Chunk, Event, FinishReason, Opened, Request, Step, StepResult, Transfer
from .pages import Pages, PageTable, Path
from .routes import Replica, Routes
from .sequence import Residence, Sequence

LONELY_CRASHES = 2  # of a sequence's workers since its last token: from then on its steps are its own
MOST_CRASHES = 5  # and then it ends with an error
LOOK_AHEAD = 32  # waiting sequences that the longest-prefix policy compares, and times that one may be passed over


class _Draft:
    """A step while it is planned."""

    __slots__ = ("chunks", "logit_rows", "opened", "path", "rows", "transfers")

    def __init__(self, path: Path, rows: int, logit_rows: int) -> None:
        self.path = path
        self.rows, self.logit_rows = rows, logit_rows  # budgets left
        self.chunks: dict[int, Chunk] = {}
        self.opened: list[Opened] = []
        self.transfers: list[Transfer] = []


class Scheduler:
    def __init__(self, config: SchedulerConfig, routes: Routes) -> None:
        self.config, self.routes = config, routes
        # The last token's key and value are never needed.
        self.max_context = min(config.max_context, routes.capacity + 1)
        self._waiting: list[tuple[tuple[int, float, int], Sequence]] = []  # by rank
        self._running: list[tuple[tuple[int, float, int], Sequence]] = []  # by rank
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._residences: dict[int, Residence] = {}
        self._in_flight: dict[int, tuple[Step, Path]] = {}
        self._deadlines: list[tuple[float, int, tuple[str, int]]] = []  # deadline, order, request id and sample
        self._batch_open = False  # static policy: nothing of the batch has ended yet
        self._draining = 0  # closed residences whose pages wait for steps in flight
        self._suspects: list[Sequence] = []  # those whose steps are their own
        self._suspects_turn = False
        self._dropped: list[int] = []  # handles that the workers may forget
        self._next_step = self._next_handle = self._next_order = 0

    # What the engine calls

    def add(self, request: Request) -> None:
        """Queue a sequence. RequestError where it is malformed, CapacityError where it can never fit, EngineDeadError
        where it would have to wait for workers and may not."""
        self.routes.check_open()
        key = (request.id, request.sample_index)
        if key in self._sequences:
            raise RequestError(
                f"request {request.id!r} sample {request.sample_index} is already running; ids must be unique"
            )
        if not request.prompt_ids:
            raise RequestError("the prompt has no tokens; give at least one")
        # A generated sequence's last token needs no key and value; a prompt's tokens all do.
        limit = min(self.max_context - (request.kind == "generate"), self.routes.capacity)
        if len(request.prompt_ids) > limit:
            raise CapacityError(
                f"the prompt has {len(request.prompt_ids)} tokens; at most {limit} fit a context of "
                f"{self.max_context} (raise max_context or kv_memory)"
            )
        wanted = request.params.max_tokens if request.kind == "generate" else 0
        max_length = min(len(request.prompt_ids) + wanted, self.max_context)
        sequence = Sequence(request, self._next_order, max_length, self.routes.page_size)
        self._next_order += 1
        self._sequences[key] = sequence
        insort(self._waiting, (sequence.rank, sequence))
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, sequence.arrival_order, key))
            self._forget_deadlines()

    def plan(self, now: float) -> Step | None:
        """The next step, or None where nothing can run before a step in flight is applied."""
        if self._suspects:
            return self._plan_with_suspects(now)
        return self._plan_shared(now)

    def _plan_shared(self, now: float) -> Step | None:
        for path in self.routes.open():
            if step := self._plan_path(path, now):
                return step
        return None

    def _plan_with_suspects(self, now: float) -> Step | None:
        """Steps of suspects, one at a time with nothing beside it, in turn with all others' steps."""
        if any(chunk.seq in self._lonely for step, _ in self._in_flight.values() for chunk in step.chunks):
            return None
        if not self._suspects_turn and (step := self._plan_shared(now)):
            self._suspects_turn = True
            return step
        return None if self._in_flight else self._plan_lonely(now)

    @property
    def _lonely(self) -> set[int]:
        return {one.residence.handle for one in self._suspects if one.residence}

    def _plan_lonely(self, now: float) -> Step | None:
        self._suspects_turn = False
        for sequence in list(self._suspects):
            path = sequence.residence.path if sequence.residence else self._route(sequence)
            if path is None or not self._starts(sequence):
                continue
            draft = _Draft(path, self.config.max_batch_tokens, self.config.max_logit_rows)
            if sequence.residence:
                self._extend(draft, sequence, sequence.todo)
            elif len(self._running) < self.config.max_sequences:
                self._start(draft, bisect_left(self._waiting, sequence.rank, key=itemgetter(0)), now)
            if draft.chunks:
                self._suspects.remove(sequence)
                self._suspects.append(sequence)
                return self._step(draft)
        return self._plan_shared(now)

    def _plan_path(self, path: Path, now: float) -> Step | None:
        draft = _Draft(path, self.config.max_batch_tokens, self.config.max_logit_rows)
        preempted = self._plan_running(draft)
        if not preempted and not path.closing:
            self._plan_waiting(draft, now)
        return self._step(draft) if draft.chunks else None

    def _step(self, draft: _Draft) -> Step:
        path = draft.path
        step = Step(
            self._next_step,
            tuple(draft.chunks.values()),
            tuple(draft.opened),
            tuple(draft.transfers),
            tuple(self._dropped),
            path.key,
        )
        self._dropped.clear()
        path.last_step = self._next_step
        path.in_flight += 1
        self._next_step += 1
        self._in_flight[step.number] = (step, path)
        for handle in draft.chunks:
            self._residences[handle].in_flight += 1
        return step

    def apply(self, result: StepResult, now: float) -> list[Event]:
        """Take in what a step computed. What it computed for sequences that have stopped since is discarded."""
        step, path = self._in_flight.pop(result.number)
        path.in_flight -= 1
        events = []
        for index, chunk in enumerate(step.chunks):
            residence = self._residences[chunk.seq]
            residence.in_flight -= 1
            if residence.closed:
                self._drain(residence)
            elif event := self._advance(residence, chunk, result, index, now):
                events.append(event)
        return events

    def revoke(self, number: int) -> None:
        """A step will never be answered: its sequences start again from what is published, and later steps' answers
        for them are ignored."""
        step, path = self._in_flight.pop(number)
        path.in_flight -= 1
        for chunk in step.chunks:
            residence = self._residences[chunk.seq]
            residence.in_flight -= 1
            if residence.closed:
                self._drain(residence)
            else:
                self._requeue(residence.sequence)

    def revoke_pools(self) -> None:
        """The pools' memory is lost: every step in flight is revoked, every running sequence starts again, nothing
        stays published. Workers are taken to have forgotten everything."""
        for number in list(self._in_flight):
            self.revoke(number)
        for _, sequence in list(self._running):
            self._requeue(sequence)
        self._dropped.clear()
        for path in self.routes.paths:
            path.forget()

    def join(self, replica: Replica) -> None:
        """A replica has come, with nothing in its pools."""
        self.routes.join(replica)

    def leave(self, replica: Replica) -> None:
        """No more sequences for a replica; it is among `left` once those that it has are done."""
        self.routes.leave(replica)

    @property
    def left(self) -> list[Replica]:
        """Replicas that were to leave, and have nothing more to do: to be lost."""
        through = self.routes.through
        return [r for r in self.routes.leaving if not any(path.running or path.in_flight for path in through(r))]

    def blame(self, replica: Replica, now: float) -> list[Event]:
        """A replica crashed by itself, and is about to be lost: sequences in steps in flight there may be why. One of
        which a second worker dies without a token in between gets steps of its own; of a fifth, it ends."""
        events = []
        paths = self.routes.through(replica)
        handles = {chunk.seq for step, path in self._in_flight.values() if path in paths for chunk in step.chunks}
        for sequence in [self._residences[one].sequence for one in sorted(handles) if not self._residences[one].closed]:
            sequence.crashes += 1
            if sequence.crashes == LONELY_CRASHES:
                self._suspects.append(sequence)
            elif sequence.crashes == MOST_CRASHES:
                error = f"its workers crashed {MOST_CRASHES} times in a row"
                events.append(self._finish(sequence, "error", now, error))
        return events

    def lose(self, replica: Replica) -> list[int]:
        """A replica is gone, and its pages with it: steps in flight through it are revoked (their numbers come back),
        and the sequences that were on it start again on other paths, behind what is published there."""
        paths = self.routes.lose(replica)
        revoked = [number for number, (_, path) in self._in_flight.items() if path in paths]
        for number in revoked:
            self.revoke(number)
        for _, sequence in list(self._running):
            if sequence.residence is not None and sequence.residence.path in paths:
                self._requeue(sequence)
        return revoked

    def fail(self, number: int, message: str, now: float) -> list[Event]:
        """A step broke: its sequences end with an error, all others start again, as after `revoke_pools`."""
        residences = [self._residences[chunk.seq] for chunk in self._in_flight[number][0].chunks]
        events = [self._finish(one.sequence, "error", now, message) for one in residences if not one.closed]
        self.revoke_pools()
        return events

    def finish(
        self,
        request_id: str,
        sample_index: int | None = None,
        reason: FinishReason = "cancelled",
        now: float = 0.0,
    ) -> list[Event]:
        """End sequences of a request at once (all samples where no index is given); nothing more is scheduled for
        them. `now` is for their timings."""
        if sample_index is not None:
            found = [self._sequences.get((request_id, sample_index))]
        else:
            found = [sequence for (rid, _), sequence in self._sequences.items() if rid == request_id]
        return [self._finish(sequence, reason, now) for sequence in found if sequence]

    def expire(self, now: float) -> list[Event]:
        """End the sequences whose deadline has passed."""
        events = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, key = heapq.heappop(self._deadlines)
            sequence = self._sequences.get(key)
            if sequence and sequence.arrival_order == order:
                events.append(self._finish(sequence, "deadline", now))
        return events

    def _forget_deadlines(self) -> None:
        """Drop those of finished sequences once they are most of the heap."""
        if len(self._deadlines) > 64 + 2 * len(self._sequences):
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._sequences]
            heapq.heapify(self._deadlines)

    @property
    def unfinished(self) -> int:
        return len(self._sequences)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def on(self, replica: Replica) -> list[Sequence]:
        """The sequences that run on a replica."""
        stage, number = replica
        both = [(one, one.residence) for _, one in list(self._running)]
        return [one for one, residence in both if residence and residence.path.key[stage : stage + 1] == (number,)]

    @property
    def waits_for_siblings(self) -> bool:
        """Whether all who wait do so for the prompt of another sample of their request."""
        return bool(self._waiting) and not any(self._starts(sequence) for _, sequence in self._waiting)

    def check(self) -> None:
        """Prove the invariants, pages included. Raises AssertionError."""
        tables: dict[int, list[PageTable]] = {}
        for residence in self._residences.values():
            for pool, table in zip(residence.path.pools, residence.tables, strict=True):
                tables.setdefault(id(pool), []).append(table)
        for pool in self.routes.pools:
            pool.check(tables.get(id(pool), []))
        for path in self.routes.paths:
            assert path.running == sum(s.residence is not None and s.residence.path is path for _, s in self._running)
            assert path.bound == sum(s.route is path for _, s in self._waiting)
            assert path.in_flight == sum(other is path for _, other in self._in_flight.values())
        live = {residence.handle for residence in self._residences.values() if not residence.closed}
        assert live == {s.residence.handle for _, s in self._running if s.residence}
        assert len(self._waiting) + len(self._running) == len(self._sequences)
        assert self._draining == sum(residence.closed for residence in self._residences.values())
        for _, sequence in self._running:
            assert 0 <= sequence.computed <= sequence.scheduled <= sequence.length <= sequence.max_length

    # Planning

    def _plan_running(self, draft: _Draft) -> bool:
        """Decodes first, then whoever has more to catch up with, each in order of rank. True if a sequence was
        preempted."""
        path, before = draft.path, len(self._running)
        running = [one for _, one in self._running if one.residence is not None and one.residence.path is path]
        if self._suspects:
            running = [one for one in running if one not in self._suspects]
        # As many as make equal parts. The step that may wait beside them is for prompts: more parts would be smaller.
        decodes = -(-len(running) // path.parts) if path.parts == 1 or path.in_flight < path.parts else 0
        catching_up = []
        for sequence in running:
            todo = sequence.todo
            if todo == 1 and decodes:
                decodes -= 1
                self._extend(draft, sequence, 1)
            elif todo > 1:
                catching_up.append(sequence)
        for sequence in catching_up:
            self._extend(draft, sequence, sequence.todo)
        return len(self._running) < before

    def _extend(self, draft: _Draft, sequence: Sequence, todo: int) -> None:
        """Put the sequence's next tokens in the draft, preempting sequences of lower rank where pages run out."""
        residence = sequence.residence
        if residence is None:
            return  # preempted a moment ago
        count = self._count(draft, sequence, sequence.scheduled, todo)
        if count <= 0:
            return
        while (new_pages := residence.path.grow(residence.tables, sequence.scheduled + count)) is None:
            victim = self._victim(draft, sequence, residence.path.short(residence.tables, sequence.scheduled + count))
            if victim is None:
                return
            self._requeue(victim)
        self._put(draft, residence, count, new_pages)

    def _count(self, draft: _Draft, sequence: Sequence, start: int, todo: int) -> int:
        """How many of `todo` tokens from `start` on the budgets allow."""
        count = min(todo, draft.rows)
        if draft.logit_rows < 1:
            return 0
        if sequence.scores and start < sequence.prompt_length:
            # Rows already delivered before a preemption need no logits again.
            count = min(count, max(0, sequence.scored - start) + draft.logit_rows)
        return count

    def _put(self, draft: _Draft, residence: Residence, count: int, new_pages: tuple[tuple[int, ...], ...]) -> None:
        sequence = residence.sequence
        start, end = sequence.scheduled, sequence.scheduled + count
        known = len(sequence.tokens)
        late = end > known
        tokens = tuple(sequence.tokens[start:end]) if not late else (*sequence.tokens[start:known], LATE)
        samples = sequence.generates and end == sequence.length
        logit_rows = int(samples)
        if sequence.scores and (unscored := max(start, sequence.scored)) < sequence.prompt_length:
            logit_rows = max(logit_rows, end - unscored)
        draft.chunks[residence.handle] = Chunk(
            residence.handle, start, tokens, new_pages, logit_rows, samples, sequence.last_sampler if late else -1
        )
        draft.rows -= count
        draft.logit_rows -= logit_rows
        sequence.scheduled = end
        if samples:
            sequence.pending += 1
            sequence.last_sampler = self._next_step

    def _victim(self, draft: _Draft, sequence: Sequence, short: list[Pages]) -> Sequence | None:
        """The running sequence of lowest rank below `sequence` that has pages in a pool that is short of them, unless
        pages are about to come free anyway."""
        if self._draining:
            return None
        for rank, candidate in reversed(self._running):
            if rank <= sequence.rank:
                return None
            assert candidate.residence is not None
            helps = any(pool in candidate.residence.path.pools for pool in short)
            if helps and candidate.residence.handle not in draft.chunks:
                return candidate
        return None

    def _plan_waiting(self, draft: _Draft, now: float) -> None:
        if self.config.policy == "static" and not self._may_join():
            return
        while len(self._running) < self.config.max_sequences and draft.rows > 0 and (ready := self._ready(draft.path)):
            first, chosen = ready[0], self._choose(ready, draft.path)
            passed_over = self._waiting[first][1] if chosen != first else None
            if not self._start(draft, chosen, now):
                return
            if passed_over is not None:
                passed_over.passed_over += 1
        self._batch_open = bool(self._waiting)

    def _start(self, draft: _Draft, index: int, now: float) -> bool:
        """Admit the waiting sequence at an index. False, and nothing has changed, where it does not fit now."""
        sequence = self._waiting[index][1]
        if not self._admit(draft, sequence, now):
            return False
        self._unbind(sequence)
        del self._waiting[index]
        return True

    def _may_join(self) -> bool:
        """Static policy: a batch takes members, over several steps, until the queue is empty or one of them ends."""
        self._batch_open = self._batch_open or not self._running
        return self._batch_open

    def _ready(self, path: Path) -> list[int]:
        """Indices of the next waiting sequences that could start on a path."""
        most = LOOK_AHEAD if self.config.policy == "longest-prefix" else 1
        looks = len(self._waiting) if len(self.routes.paths) == 1 else LOOK_AHEAD * len(self.routes.paths)
        ready: list[int] = []
        for index, (rank, sequence) in enumerate(self._waiting[:looks]):
            if len(ready) == most or (ready and rank[0] != self._waiting[ready[0]][0][0]):
                break
            if self._starts(sequence) and sequence not in self._suspects and self._route(sequence) is path:
                ready.append(index)
        return ready

    def _starts(self, sequence: Sequence) -> bool:
        """Whether a sequence could start: siblings wait for the first sample's prompt."""
        parent = self._sibling(sequence)
        return parent is None or parent.computed >= sequence.prompt_length

    def _route(self, sequence: Sequence) -> Path | None:
        """The path that a waiting sequence is for: that of the sample whose prompt it may share, or the one that it was
        bound to, unless that is closed, or full while others are not."""
        paths = self.routes.paths
        if len(paths) == 1 and not paths[0].closing:
            return paths[0]
        parent = self._sibling(sequence)
        if parent is not None and parent.residence is not None and not parent.residence.path.closing:
            return parent.residence.path
        bound = sequence.route
        if bound is None or bound.closing or (bound.full and not all(path.full for path in paths)):
            self._unbind(sequence)
            self._bind(sequence, self.routes.choose(self._prefix_keys(sequence), sequence.preemptions > 0))
        return sequence.route

    def _bind(self, sequence: Sequence, path: Path | None) -> None:
        sequence.route = path
        if path is not None:
            path.bound += 1

    def _unbind(self, sequence: Sequence) -> None:
        if sequence.route is not None:
            sequence.route.bound -= 1
            sequence.route = None

    def _choose(self, ready: list[int], path: Path) -> int:
        """Index of the waiting sequence to admit next: the first, or the one with the longest cached prefix."""
        if len(ready) == 1 or self._waiting[ready[0]][1].passed_over >= LOOK_AHEAD:
            return ready[0]
        return max(ready, key=lambda i: (path.match(self._prefix_keys(self._waiting[i][1])), -i))

    def _prefix_keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages that may be taken from the cache: never all tokens, for the last one's logits are
        needed."""
        if not self.config.prefix_cache or (sequence.scores and sequence.scored < sequence.prompt_length):
            return []
        pages = (len(sequence.tokens) - 1) // self.routes.page_size
        return sequence.keys.extend(sequence.tokens, pages)

    def _sibling(self, sequence: Sequence) -> Sequence | None:
        """The running first sample of the same request, whose prompt this one may share."""
        if not sequence.request.sample_index or sequence.preemptions or self.config.policy == "static":
            return None
        first = self._sequences.get((sequence.request.id, 0))
        return first if first and first.residence and first.request.prompt_ids == sequence.request.prompt_ids else None

    def _admit(self, draft: _Draft, sequence: Sequence, now: float) -> bool:
        """Give a waiting sequence a residence and its first chunk. False, and nothing has changed, where it does
        not fit now."""
        path, tokens = draft.path, len(sequence.tokens)
        parent = self._sibling(sequence)
        if parent is not None and (parent.residence is None or parent.residence.path is not path):
            parent = None
        shared = sequence.prompt_length - 1
        forks = parent and parent.residence and path.can_fork(parent.residence.tables, shared, tokens)
        keys = self._prefix_keys(sequence)
        keys = [] if forks else keys[: path.match(keys)]
        cached = shared if forks else len(keys) * path.page_size
        count = self._count(draft, sequence, cached, tokens - cached)
        # Admitted only where all its tokens fit now, though pages are taken chunk by chunk: fewer preemptions.
        if count <= 0:
            return False
        if not (forks or path.fits(keys, tokens)):
            path.full = True
            return False
        if parent and parent.residence and forks:
            tables, transfers = path.fork(parent.residence.tables, shared)
        else:
            tables, transfers = path.open(keys), ()
        adopted = tuple(tuple(table.pages) for table in tables)
        sequence.scheduled = cached
        grown = path.grow(tables, cached + count)
        assert grown is not None
        residence = Residence(self._next_handle, sequence, path, tables)
        self._next_handle += 1
        self._residences[residence.handle] = residence
        sequence.residence = residence
        path.running += 1
        path.full = False
        sequence.computed, sequence.published = cached, len(keys)
        if not sequence.admitted:
            sequence.admitted, sequence.cached_tokens = now, cached
        insort(self._running, (sequence.rank, sequence))
        draft.opened.append(Opened(residence.handle, sequence.request, tuple(sequence.tokens)))
        draft.transfers.extend(transfers)
        self._put(draft, residence, count, tuple(a + g for a, g in zip(adopted, grown, strict=True)))
        return True

    # Applying

    def _advance(self, residence: Residence, chunk: Chunk, result: StepResult, index: int, now: float) -> Event | None:
        sequence = residence.sequence
        extras = result.extras.get(index) if result.extras else None
        if extras is not None and extras.error is not None:
            return self._finish(sequence, "error", now, extras.error)
        sequence.computed = end = chunk.start + len(chunk.tokens)
        if sequence.scores and chunk.start < sequence.prompt_length:
            sequence.scored = max(sequence.scored, min(end, sequence.prompt_length))
        tokens: tuple[int, ...] = ()
        reason: FinishReason | None = None
        if chunk.samples:
            token = result.tokens[index]
            tokens = (token,)
            if sequence.crashes:
                self._clear(sequence)
            sequence.tokens.append(token)
            sequence.pending -= 1
            sequence.last_token = now
            sequence.first_token = sequence.first_token or now
            if token in sequence.request.stop_ids:
                reason = "stop"
            elif len(sequence.tokens) >= sequence.max_length:
                reason = "length"
        elif not sequence.generates and end == sequence.prompt_length:
            sequence.first_token = sequence.last_token = now
            reason = "stop"
        self._publish(residence)
        if reason:
            self._close(sequence)
        if not tokens and extras is None and reason is None:
            return None
        return Event(
            sequence.request.id,
            sequence.request.sample_index,
            tokens,
            (extras.logprob,) if extras and extras.logprob else (),
            extras.prompt_logprobs if extras else (),
            extras.logits if extras else None,
            reason,
            None,
            sequence.timings(now) if reason else None,
        )

    def _publish(self, residence: Residence) -> None:
        """Publish the pages that have become full, and give back those that have left the window."""
        sequence = residence.sequence
        full = sequence.computed // residence.path.page_size
        if self.config.prefix_cache and full > sequence.published:
            keys = sequence.keys.extend(sequence.tokens, full)
            for index in range(sequence.published, full):
                residence.path.publish(residence.tables, index, keys[index])
            sequence.published = full
        residence.path.slide(residence.tables, sequence.computed)

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float, error: str | None = None) -> Event:
        if sequence.residence is None:
            del self._waiting[bisect_left(self._waiting, sequence.rank, key=itemgetter(0))]
            self._unbind(sequence)
        self._close(sequence)
        return Event(
            sequence.request.id,
            sequence.request.sample_index,
            finish_reason=reason,
            error=error,
            timings=sequence.timings(now),
        )

    def _close(self, sequence: Sequence) -> None:
        """Forget a finished sequence."""
        self._clear(sequence)
        del self._sequences[sequence.request.id, sequence.request.sample_index]
        if sequence.residence is not None:
            self._leave(sequence)

    def _clear(self, sequence: Sequence) -> None:
        """A sequence is not why workers crashed, or is no more."""
        if sequence in self._suspects:
            self._suspects.remove(sequence)
        sequence.crashes = 0

    def _requeue(self, sequence: Sequence) -> None:
        """Back to the queue, in its old place: what it computed is recomputed, or found in the prefix cache."""
        path = self._leave(sequence)
        if not path.closing and len(self.routes.paths) > 1:
            self._bind(sequence, path)  # its prefix may still be there
        sequence.preemptions += 1
        sequence.computed = sequence.scheduled = sequence.pending = sequence.published = 0
        sequence.last_sampler = -1
        insort(self._waiting, (sequence.rank, sequence))

    def _leave(self, sequence: Sequence) -> Path:
        """Close the sequence's residence, and say where it was; its pages come free now, or with the last step in
        flight that names them."""
        residence = sequence.residence
        assert residence is not None
        self._batch_open = False
        sequence.residence = None
        del self._running[bisect_left(self._running, sequence.rank, key=itemgetter(0))]
        self._dropped.append(residence.handle)
        residence.closed = True
        residence.path.running -= 1
        self._draining += 1
        self._drain(residence)
        return residence.path

    def _drain(self, residence: Residence) -> None:
        if residence.in_flight == 0:
            residence.path.release(residence.tables)
            residence.path.full = False
            del self._residences[residence.handle]
            self._draining -= 1
