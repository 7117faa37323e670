"""The executor of a split model: sends each step to the replicas of its path, and keeps the replicas alive.

submit ──Run──▶ every rank of the path          hidden states go from replica to replica, without passing here
collect ◀─Answer── the last stage               a replica that died or fell silent: Change("lost"), and a new one
"""

from __future__ import annotations

import itertools
import secrets
import selectors
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError, EngineDeadError, HeadraceError
from ..parallel.group import GroupSizes, SharedGroup
from ..parallel.shm import ShmEdge
from ..plan.plan import Plan
from ..schedule.routes import Replica
from ..trace import Mark, MarkKind, Trace
from ..types import Step
from . import control
from .control import Answer, Beat, Broke, Connected, Failed, FromRank, Listening, Run, Spans, Start
from .crew import Crew, Rank
from .executor import Broken, Change, Outcome
from .wire import error_of_kind

START_SECONDS = 60.0  # for a process to give its first sign of life
LOOK_SECONDS = 0.05  # between looks at who has fallen silent
PAUSES = (0.0, 0.1, 0.5, 2.0, 5.0)  # before another start, by how many have failed in a row
MAX_STARTS = len(PAUSES)
END_SECONDS = 2.0
MAX_MESSAGES = 66  # that an edge holds: more than steps in flight


@dataclass(frozen=True)
class Layout:
    """What the executor must know of a split model. `start(stage, replica, rank)` says what a rank is to load;
    `group(stage, ranks)` how much its ranks must give each other; `width` of hidden states, `rows` of a step."""

    plan: Plan
    start: Callable[[int, int, int], Start]
    group: Callable[[int, int], GroupSizes]
    rows: int
    width: int


@dataclass(eq=False)
class _Edge:
    number: int
    name: str
    transport: str
    sender: tuple[Crew, Rank]
    receiver: tuple[Crew, Rank]
    within: bool
    memory: ShmEdge | None = None
    open_ends: int = 0


class StagedExecutor:
    """Starts a plan's processes (see `wait_ready`). For one thread, that calls `collect` often: nothing is noticed in
    between."""

    def __init__(self, layout: Layout, trace: Trace) -> None:
        self._layout, self._plan, self._trace = layout, layout.plan, trace
        self._selector = selectors.DefaultSelector()
        self._crews: dict[Replica, Crew] = {}
        self._known: dict[Replica, Crew] = {}  # as the engine knows them: it has not heard yet of the last changes
        self._starts: dict[Replica, tuple[float, int]] = {}  # when to start again, and starts that failed before
        self._edges: dict[int, _Edge] = {}
        self._between: dict[tuple[Crew, Crew], int] = {}
        self._numbers = itertools.count()
        self._steps: dict[int, list[Crew]] = {}
        self._holders: dict[int, list[Crew]] = {}  # of each sequence's residence
        self._outcomes: deque[tuple[Outcome, Crew | None]] = deque()  # a crew with each change
        self._next_step = 0
        self._looked = time.monotonic()
        self._secret = secrets.token_bytes(32)
        self.restarts = 0
        self._replicas = {s: dict(enumerate(stage.replicas)) for s, stage in enumerate(self._plan.stages)}
        try:
            for stage, replicas in self._replicas.items():
                for number in replicas:
                    self._launch((stage, number), 0)
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        """Wait until every replica has joined. Raises what kept one from starting."""
        try:
            while not all(crew.joined for crew in self._crews.values()) or self._starts:
                self._turn(LOOK_SECONDS)
        except BaseException:
            self.close()
            raise

    # Executor

    def submit(self, step: Step) -> None:
        self._next_step = step.number + 1
        for handle in step.finished:
            for crew in self._holders.pop(handle, ()):
                crew.drops.append(handle)
        crews = [self._known[at] for at in enumerate(step.path)]
        self._steps[step.number] = crews
        if any(crew.state == "gone" for crew in crews):
            return  # the engine is about to hear of it, and revokes the step
        for opened in step.opened:
            self._holders[opened.seq] = crews
        for stage, crew in enumerate(crews):
            drops, crew.drops = tuple(crew.drops), []
            own = Step(step.number, step.chunks, step.opened, step.transfers, drops)
            target = self._between[crew, crews[stage + 1]] if stage + 1 < len(crews) else None
            for rank in crew.ranks:
                rank.link.send(Run(own, stage > 0, target if rank is crew.leader else None))

    def collect(self, at_most: float | None = None) -> Outcome | None:
        end = time.monotonic() + (at_most if at_most is not None else 1e9)
        while not self._outcomes:
            left = end - time.monotonic()
            self._turn(max(0.0, min(left, LOOK_SECONDS)))
            if left <= 0:
                break
        if not self._outcomes:
            return None
        outcome, crew = self._outcomes.popleft()
        if crew is not None and isinstance(outcome, Change):
            if outcome.kind == "joined":
                self._known[outcome.replica] = crew
            elif outcome.kind == "lost":
                self._known.pop(outcome.replica)
        return outcome

    def forget(self, numbers: list[int]) -> None:
        skips: dict[Crew, list[int]] = {}
        for number in numbers:
            for crew in self._steps.pop(number, ()):
                if crew.state != "gone":
                    skips.setdefault(crew, []).append(number)
        for crew, skipped in skips.items():
            crew.say(control.Skip(tuple(skipped)))
        forgotten = set(numbers)
        kept = (both for both in self._outcomes if getattr(both[0], "number", None) not in forgotten)
        self._outcomes = deque(kept)
        if numbers:
            self._mark("revoked", None, f"{len(numbers)} steps in flight")

    def stop(self, replica: Replica) -> None:
        crew = self._known.pop(replica)
        self._mark("left", crew.key, "has done what it had")
        self._abandon(replica)

    def reset(self) -> None:
        self._steps.clear()
        self._outcomes = deque(both for both in self._outcomes if isinstance(both[0], Change))
        self._holders.clear()
        for crew in list(self._crews.values()):
            crew.drops.clear()
            if len(crew.ranks) > 1:  # one of them may wait for another's sums
                self._lose(crew, "must begin anew, for a step broke")
            else:
                crew.say(control.Reset(self._next_step))

    def close(self) -> None:
        crews, self._crews = list(self._crews.values()), {}
        for crew in crews:
            crew.say(control.Stop())
        deadline = time.monotonic() + END_SECONDS
        for crew in crews:
            for rank in crew.ranks:
                if rank.process is not None and rank.ready:
                    try:
                        rank.process.wait(max(0.0, deadline - time.monotonic()))
                    except Exception:
                        break
        for crew in crews:
            self._cut(crew)
        self._selector.close()

    def scale(self, stage: int, replicas: int) -> None:
        """Have so many replicas of a stage: more are started, as the first one is; the newest leave when they have done
        what they have. ConfigError where that cannot be."""
        if not 0 <= stage < len(self._plan.stages):
            raise ConfigError(f"stage {stage} of a plan with stages 0 to {len(self._plan.stages) - 1}")
        if not 1 <= replicas <= 64:
            raise ConfigError(f"a stage has from 1 to 64 replicas, got {replicas}")
        there = self._replicas[stage]
        for number in sorted(there)[replicas:]:
            crew = self._crews.get((stage, number))
            if crew is None or not crew.joined:
                self._abandon((stage, number))
            else:
                self._outcomes.append((Change("leaving", (stage, number)), crew))
        while len(there) < replicas:
            number = max(there, default=-1) + 1
            there[number] = self._plan.stages[stage].replicas[0]
            self._launch((stage, number), 0)

    # A turn: what has come, who has fallen silent, who is to start again

    def _turn(self, seconds: float) -> None:
        for key, mask in self._selector.select(seconds):
            crew, rank = key.data
            if crew.state == "gone":
                continue
            if mask & selectors.EVENT_WRITE:
                rank.link.flush()
            if mask & selectors.EVENT_READ:
                self._hear(crew, rank)
        now = time.monotonic()
        if now >= self._looked + LOOK_SECONDS:
            self._look(now)
        for replica, (due, failed) in list(self._starts.items()):
            if now >= due:
                del self._starts[replica]
                self._launch(replica, failed)

    def _look(self, now: float) -> None:
        """See who has said nothing for too long. Silence while nobody listened does not count."""
        silence = self._plan.heartbeat
        deaf = now - self._looked > silence / 2
        self._looked = now
        for crew in list(self._crews.values()):
            for rank in crew.ranks:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if rank.link.unsent else 0)
                if self._selector.get_key(rank.link).events != wanted:
                    self._selector.modify(rank.link, wanted, (crew, rank))
                if deaf:
                    rank.heard = now
                if now - rank.heard > (silence if rank.beating else START_SECONDS):
                    self._lose(crew, f"has been silent for {now - rank.heard:.1f} s")
                    break

    def _hear(self, crew: Crew, rank: Rank) -> None:
        try:
            messages = rank.link.receive()
        except HeadraceError as error:
            self._lose(crew, f"talks nonsense: {error}")
            return
        rank.heard = time.monotonic()
        for message in messages:
            self._take(crew, rank, message)
        if rank.link.closed and crew.state != "gone":
            self._lose(crew, crew.why())

    def _take(self, crew: Crew, rank: Rank, message: FromRank) -> None:
        if isinstance(message, Answer):
            if self._steps.pop(message.result.number, None) is not None:
                self._outcomes.append((message.result, None))
        elif isinstance(message, Beat):
            rank.beating = True
        elif isinstance(message, Spans):
            for span in message.spans:
                self._trace.add(span)
        elif isinstance(message, Broke):
            if self._steps.pop(message.number, None) is not None:
                self._outcomes.append((Broken(message.number, message.error), None))
        elif isinstance(message, control.Ready):
            rank.ready = True
            if all(one.ready for one in crew.ranks):
                self._connect(crew)
        elif isinstance(message, Failed):
            crew.error = message.message
            if not crew.joined and self._failures(crew.key) == 0 and not self.restarts:
                raise error_of_kind(message.kind, message.message)
        elif isinstance(message, Listening):
            if (edge := self._edges.get(message.edge)) is not None:
                edge.sender[1].link.send(self._order(edge, sends=True, address=message.address))
        elif isinstance(message, Connected):
            self._opened(message)

    # Replicas

    def _launch(self, replica: Replica, failed: int) -> None:
        stage, number = replica
        if number not in self._replicas[stage]:
            return
        ranks = len(self._replicas[stage][number].ranks)
        group = SharedGroup.create(self._layout.group(stage, ranks)) if ranks > 1 else None
        starts = [self._layout.start(stage, number, rank) for rank in range(ranks)]
        crew = self._crews[replica] = Crew(replica, starts, group, ())
        crew.failed = failed
        for rank in crew.ranks:
            self._selector.register(rank.link, selectors.EVENT_READ, (crew, rank))

    def _failures(self, replica: Replica) -> int:
        return self._crews[replica].failed if replica in self._crews else 0

    def _lose(self, crew: Crew, why: str) -> None:
        """A replica is no more: end what is left of it, tell its neighbours and the engine, and start another."""
        if crew.error:
            why = f"cannot start: {crew.error}"
        self._mark("lost", crew.key, why)
        del self._crews[crew.key]
        self._cut(crew)
        self.restarts += 1
        if crew.joined:
            self._outcomes.append((Change("lost", crew.key), crew))
        failed = 0 if crew.joined else crew.failed + 1
        if failed >= MAX_STARTS:
            stage, number = crew.key
            raise EngineDeadError(f"replica {number} of stage {stage} {why}; {failed} starts in a row have failed")
        self._starts[crew.key] = (time.monotonic() + PAUSES[failed], failed)

    def _abandon(self, replica: Replica) -> None:
        """End a replica for good."""
        self._replicas[replica[0]].pop(replica[1], None)
        self._starts.pop(replica, None)
        if (crew := self._crews.pop(replica, None)) is not None:
            self._cut(crew)

    def _cut(self, crew: Crew) -> None:
        """End a crew's processes and its edges."""
        for rank in crew.ranks:
            self._selector.unregister(rank.link)
        crew.end()
        cut: dict[Rank, list[int]] = {}
        for edge in [edge for edge in self._edges.values() if crew in (edge.sender[0], edge.receiver[0])]:
            del self._edges[edge.number]
            self._between.pop((edge.sender[0], edge.receiver[0]), None)
            if edge.memory is not None:
                edge.memory.abandon()
                edge.memory.close()
            for other, rank in (edge.sender, edge.receiver):
                if other is not crew:
                    cut.setdefault(rank, []).append(edge.number)
                    other.opening.discard(edge.number)
        for rank, numbers in cut.items():
            rank.link.send(control.Disconnect(tuple(numbers)))
        for other in list(self._crews.values()):
            self._join_if_open(other)

    # Edges

    def _connect(self, crew: Crew) -> None:
        """Open the edges between a crew and those of the stages beside it, and to its own ranks."""
        crew.state = "connecting"
        stage, _ = crew.key
        for key, other in self._crews.items():
            if other.state in ("connecting", "ready") and abs(key[0] - stage) == 1:
                first, second = (other, crew) if key[0] < stage else (crew, other)
                transport = self._transport(first.key, second.key)
                edge = self._open(transport, (first, first.leader), (second, second.leader), within=False)
                self._between[first, second] = edge.number
        if stage > 0:
            for rank in crew.ranks[1:]:
                self._open("shm", (crew, crew.leader), (crew, rank), within=True)
        self._join_if_open(crew)

    def _transport(self, first: Replica, second: Replica) -> str:
        chosen = self._plan.channels[first[0]]
        if chosen != "auto":
            return chosen
        hosts = {self._replicas[stage][number].host for stage, number in (first, second)}
        return "shm" if len(hosts) == 1 else "tcp"

    def _open(self, transport: str, sender: tuple[Crew, Rank], receiver: tuple[Crew, Rank], within: bool) -> _Edge:
        number = next(self._numbers)
        name = f"edge {number} from {_name(sender[0].key)} to {_name(receiver[0].key)}"
        edge = self._edges[number] = _Edge(number, name, transport, sender, receiver, within)
        for crew, _ in (sender, receiver):
            crew.opening.add(number)
        if transport == "shm":
            edge.memory = ShmEdge.create(self._layout.rows * self._layout.width * 4, MAX_MESSAGES)
            for (_, rank), sends in ((sender, True), (receiver, False)):
                rank.link.send(self._order(edge, sends=sends), tuple(edge.memory.fds))
        else:
            receiver[1].link.send(self._order(edge, sends=False))
        return edge

    def _order(self, edge: _Edge, *, sends: bool, address: tuple[str, int] | None = None) -> control.Connect:
        return control.Connect(
            edge=edge.number,
            name=edge.name,
            transport=edge.transport,
            sends=sends,
            within=edge.within,
            max_bytes=self._layout.rows * self._layout.width * 4,
            messages=MAX_MESSAGES,
            address=address,
            secret=self._secret if edge.transport == "tcp" else b"",
        )

    def _opened(self, message: Connected) -> None:
        edge = self._edges.get(message.edge)
        if edge is None:
            return
        if message.error is not None:
            newer = max((edge.sender[0], edge.receiver[0]), key=lambda crew: crew.began)
            newer.error = f"{edge.name}: {message.error}"
            self._lose(newer, "cannot be reached")
            return
        edge.open_ends += 1
        if edge.open_ends == 2:
            for crew, _ in (edge.sender, edge.receiver):
                crew.opening.discard(edge.number)
                self._join_if_open(crew)

    def _join_if_open(self, crew: Crew) -> None:
        if crew.state == "connecting" and not crew.opening:
            crew.state, crew.joined = "ready", True
            self._mark("joined", crew.key, f"{time.monotonic() - crew.began:.2f} s after its start")
            self._outcomes.append((Change("joined", crew.key), crew))

    def _mark(self, kind: MarkKind, replica: Replica | None, text: str) -> None:
        stage, number = replica or (None, None)
        self._trace.add(Mark(time.monotonic(), kind, stage, number, None, text))


def _name(replica: Replica) -> str:
    return f"{replica[0]}.{replica[1]}"
