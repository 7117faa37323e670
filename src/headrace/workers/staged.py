"""The executor of a split model: sends each step to the replicas of its path, and keeps the replicas alive.

submit ──Run──▶ every rank of the path          hidden states go from replica to replica, without passing here
collect ◀─Answer── the last stage               a replica that died or fell silent: Change("lost"), and a new one
"""

from __future__ import annotations

import itertools
import math
import os
import secrets
import selectors
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import NamedTuple

import msgspec

from ..errors import ConfigError, EngineDeadError, HeadraceError
from ..parallel.group import GroupSizes, SharedGroup
from ..parallel.joining import SALT_BYTES, channel_secret
from ..parallel.shm import ShmEdge
from ..plan.plan import MAX_REPLICAS, Plan
from ..schedule.routes import MAX_PATHS, Replica
from ..trace import Mark, MarkKind, Trace
from ..types import Step
from . import control
from .control import Answer, Beat, Broke, Connected, Failed, FromRank, Listening, Run, Spans, Start
from .crew import MAX_STARTS, Crew, Rank, Tries
from .executor import Broken, Change, Outcome
from .lobby import Lobby, meeting_host
from .pace import Pace
from .wire import error_of_kind

START_SECONDS = 60.0  # for a process to give its first sign of life
QUIET_SECONDS = 0.3  # of waiting for other hosts before it is said, and again
LOOK_SECONDS = 0.05  # between looks at who has fallen silent
END_SECONDS = 2.0


@dataclass(frozen=True)
class Layout:
    """What the executor must know of a split model. `start(stage, replica, rank)` says what a rank is to load;
    `group(stage, ranks)` how much its ranks must give each other; `width` of hidden states, `rows` of a step;
    `messages`: how many of those an edge holds, so that nobody waits to send."""

    plan: Plan
    start: Callable[[int, int, int], Start]
    group: Callable[[int, int], GroupSizes]
    rows: int
    width: int
    messages: int

    @property
    def max_bytes(self) -> int:
        """Of a step's hidden states, float32."""
        return self.rows * self.width * 4


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


class RankStatus(NamedTuple):
    """A process: where it stands in the plan, its number in the system (0 where it is not started yet, or on another
    host), and what it does: "starting", "connecting", "ready", or "waiting" to be started again."""

    stage: int
    replica: int
    rank: int
    pid: int
    state: str


class StagedExecutor:
    """Starts a plan's processes (see `wait_ready`). For one thread, that calls `collect` often: nothing is noticed in
    between. `lobby`: where workers of other hosts join, if the plan names any; it is closed with the executor."""

    def __init__(self, layout: Layout, trace: Trace, lobby: Lobby | None = None) -> None:
        self._layout, self._plan, self._trace, self._lobby = layout, layout.plan, trace, lobby
        self._selector = selectors.DefaultSelector()
        if lobby is not None:
            self._selector.register(lobby, selectors.EVENT_READ)
        self._crews: dict[Replica, Crew] = {}
        self._known: dict[Replica, Crew] = {}  # as the engine knows them: it has not heard yet of the last changes
        self._starts: dict[Replica, tuple[float, Tries]] = {}  # when to start again, and what happened before
        self._edges: dict[int, _Edge] = {}
        self._between: dict[tuple[Crew, Crew], int] = {}
        self._numbers = itertools.count()
        self._steps: dict[int, list[Crew]] = {}
        self._holders: dict[int, list[Crew]] = {}  # of each sequence's residence
        self._outcomes: deque[tuple[Outcome, Crew | None]] = deque()  # a crew with each change
        self._next_step = 0
        self._looked = time.monotonic()
        self._starter = ThreadPoolExecutor(1, "headrace-starter")
        self._torn: dict[int, float] = {}  # edges that broke, and when their ends count as unreachable
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._secret = channel_secret(lobby.secret if lobby else secrets.token_bytes(32), self._salt)
        self.pace: Pace | None = None  # hears of spans and answers
        self.restarts = 0
        self._started = False
        self._dead: EngineDeadError | None = None
        self._replicas = {s: dict(enumerate(stage.replicas)) for s, stage in enumerate(self._plan.stages)}
        try:
            for stage, replicas in self._replicas.items():
                for number in replicas:
                    self._launch((stage, number), Tries())
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        """Wait until every replica has joined; those of other hosts, whose workers may come later, only until each
        stage has one. A warning says which workers are missing. Raises what kept a replica from starting."""
        told, quiet = "", time.monotonic() + QUIET_SECONDS
        try:
            while not self._can_begin():
                self._turn(LOOK_SECONDS)
                if time.monotonic() > quiet and (missing := self._missing()) != told:
                    told, quiet = missing, time.monotonic() + QUIET_SECONDS
                    if missing:
                        warnings.warn(missing, stacklevel=2)
        except BaseException:
            self.close()
            raise
        self._started = True

    def _can_begin(self) -> bool:
        hosts = {(stage, number): one.host for stage, each in self._replicas.items() for number, one in each.items()}
        waiting = [at for at in hosts if at not in self._crews]
        here = {at[0] for at, crew in self._crews.items() if crew.joined}
        return (
            all(crew.joined for crew in self._crews.values())
            and all(hosts[at] is not None for at in waiting)
            and here == self._replicas.keys()
        )

    def _missing(self) -> str:
        """Which workers of other hosts replicas wait for, in words; "" where they wait for none."""
        wanted: Counter[str] = Counter()
        for stage, number in self._starts:
            replica = self._replicas[stage][number]
            if replica.host is not None:
                wanted[replica.host] += len(replica.ranks)
        if self._lobby is None or not wanted:
            return ""
        (host, port), refused = self._lobby.address, self._lobby.refused
        lacking = {name: count - self._lobby.waiting(name) for name, count in wanted.items()}
        each = (f"{count} worker{'s' * (count > 1)} from host {name}" for name, count in lacking.items() if count > 0)
        hosts = " and ".join(each)
        last = f"; the last that was refused: {refused}" if refused else ""
        return f"listening at {host}:{port}, waiting for {hosts}{last}" if hosts else ""

    @property
    def plan(self) -> Plan:
        """As it was at the start."""
        return self._plan

    def status(self) -> list[RankStatus]:
        """Every process that there is, and the replicas that wait to be started."""
        there = [
            RankStatus(*crew.key, index, rank.pid, crew.state)
            for crew in list(self._crews.values())
            for index, rank in enumerate(crew.ranks)
        ]
        return sorted([*there, *(RankStatus(*replica, 0, 0, "waiting") for replica in list(self._starts))])

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
        if self._dead is not None:
            raise self._dead
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
                self._known.pop(outcome.replica, None)
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
        self._known.pop(replica, None)
        self._mark("left", replica, "has done what it had")
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
        if self._lobby is not None:
            self._lobby.close()
        self._starter.shutdown()

    def scale(self, stage: int, replicas: int) -> None:
        """Have so many replicas of a stage: more are started, those beyond the plan like its last; the newest leave
        when they have done what they have. ConfigError where that cannot be."""
        if not 0 <= stage < len(self._plan.stages):
            raise ConfigError(f"stage {stage} of a plan with stages 0 to {len(self._plan.stages) - 1}")
        if not 1 <= replicas <= MAX_REPLICAS:
            raise ConfigError(f"a stage has from 1 to {MAX_REPLICAS} replicas, got {replicas}")
        paths = math.prod(replicas if s == stage else len(each) for s, each in self._replicas.items())
        if paths > MAX_PATHS:
            raise ConfigError(f"{replicas} replicas of stage {stage} make {paths} paths, more than {MAX_PATHS}")
        there = self._replicas[stage]
        for number in sorted(there)[replicas:]:
            crew = self._crews.get((stage, number))
            if crew is None or not crew.joined:
                self._abandon((stage, number))
            else:
                del there[number]  # should it die before it has left, it is not started again
                self._outcomes.append((Change("leaving", (stage, number)), crew))
        while len(there) < replicas:
            taken = there.keys() | {number for at, number in (*self._crews, *self._known) if at == stage}
            number = next(number for number in itertools.count() if number not in taken)
            planned = self._plan.stages[stage].replicas
            there[number] = planned[min(number, len(planned) - 1)]
            self._launch((stage, number), Tries())

    # A turn: what has come, who has fallen silent, who is to start again

    def _turn(self, seconds: float) -> None:
        for key, mask in self._selector.select(seconds):
            if key.data is None:
                key.fileobj.hear()  # type: ignore[union-attr]
                continue
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
        for replica, (due, tries) in list(self._starts.items()):
            if now >= due:
                del self._starts[replica]
                self._launch(replica, tries)

    def _look(self, now: float) -> None:
        """See who has said nothing for too long. Silence while nobody listened does not count."""
        silence = self._plan.heartbeat
        deaf = now - self._looked > silence / 2
        self._looked = now
        if self.pace is not None:
            self.pace.look(now, [len(there) for there in self._replicas.values()])
        if self._lobby is not None:
            self._lobby.look(now, deaf=deaf)
        self._look_at_torn(now)
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

    def _look_at_torn(self, now: float) -> None:
        """An edge that broke although both its ends live: the way between their hosts is cut."""
        for number, due in list(self._torn.items()):
            edge = self._edges.get(number)
            if edge is None:
                del self._torn[number]
            elif now >= due:
                del self._torn[number]
                self._lose_newer(edge, f"{edge.name} is cut")

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
            self._lose(crew, crew.why(rank))

    def _take(self, crew: Crew, rank: Rank, message: FromRank) -> None:
        if isinstance(message, Answer):
            if self._steps.pop(message.result.number, None) is not None:
                result = rank.our_time(message.result)
                self._outcomes.append((result, None))
                if self.pace is not None:
                    self.pace.answered(result.ended, time.monotonic())
        elif isinstance(message, Beat):
            rank.beating = True
            if rank.there and not rank.clock.asks:
                rank.link.send(rank.clock.ping())
        elif isinstance(message, control.Pong):
            rank.clock.take(message)
        elif isinstance(message, Spans):
            for span in map(rank.our_time, message.spans):
                self._trace.add(span)
                if self.pace is not None:
                    self.pace.add(span)
        elif isinstance(message, Broke):
            if self._steps.pop(message.number, None) is not None:
                self._outcomes.append((Broken(message.number, message.error), None))
        elif isinstance(message, control.Ready):
            rank.ready = True
            if all(one.ready for one in crew.ranks):
                self._connect(crew)
        elif isinstance(message, Failed):
            crew.error = message.message if crew.host is None else f"host {crew.host}: {message.message}"
            if not self._started:
                raise error_of_kind(message.kind, f"replica {crew.key[1]} of stage {crew.key[0]}: {crew.error}")
        elif isinstance(message, Listening):
            if (edge := self._edges.get(message.edge)) is not None:
                edge.sender[1].link.send(self._order(edge, sends=True, address=message.address))
        elif isinstance(message, Connected):
            self._opened(message)
        elif isinstance(message, control.Meets):
            rank.meets = message.addresses
            if all(one.meets for one in crew.ranks):
                self._introduce(crew)
        elif isinstance(message, control.Torn):
            self._torn.setdefault(message.edge, time.monotonic() + self._plan.heartbeat)

    # Replicas

    def _launch(self, replica: Replica, tries: Tries) -> None:
        stage, number = replica
        host, ranks = self._replicas[stage][number].host, len(self._replicas[stage][number].ranks)
        guests = self._lobby.take(host, ranks) if self._lobby is not None and host is not None else []
        if host is not None and not guests:
            self._starts[replica] = (time.monotonic() + LOOK_SECONDS, tries)  # its workers have not joined yet
            return
        starts = [self._layout.start(stage, number, rank) for rank in range(ranks)]
        if guests:  # which share the cores of their host with its other ranks of the plan
            there = sum(len(one.ranks) for each in self._replicas.values() for one in each.values() if one.host == host)
            own = max(1, min(guest.cores for guest in guests) // there)
            starts = [msgspec.structs.replace(start, threads=start.threads or own) for start in starts]
        group = SharedGroup.create(self._layout.group(stage, ranks)) if ranks > 1 and not guests else None
        try:
            crew = self._crews[replica] = Crew(replica, starts, group, self._starter, guests)
        finally:
            if group is not None:
                os.close(group)
        crew.tries, crew.host = tries, host
        for rank in crew.ranks:
            self._selector.register(rank.link, selectors.EVENT_READ, (crew, rank))

    def _lose(self, crew: Crew, why: str) -> None:
        """A replica is no more: end what is left of it, tell its neighbours and the engine, and start another."""
        if crew.error:
            why = f"cannot start: {crew.error}"
        tries, crashed = Tries() if crew.joined else crew.tries.again(crew.killed), crew.crashed
        stage, number = crew.key
        self._mark("lost", crew.key, why)
        del self._crews[crew.key]
        self._cut(crew)
        self.restarts += 1
        if crew.joined:
            self._outcomes.append((Change("lost", crew.key, crashed), crew))
        if number not in self._replicas[stage]:
            return  # it was to leave
        if crew.host is None and (tries.failed >= MAX_STARTS or (tries.all >= MAX_STARTS and not self._started)):
            self._give_up(crew.key, f"{why}; {tries.all} starts in a row have failed")
        else:
            self._starts[crew.key] = (time.monotonic() + tries.pause, tries)

    def _give_up(self, replica: Replica, why: str) -> None:
        """A replica cannot be started: go on without it. EngineDeadError where its stage has no other."""
        stage, number = replica
        del self._replicas[stage][number]
        self._mark("left", replica, why)
        if not self._replicas[stage] or not self._started:
            self._dead = EngineDeadError(f"replica {number} of stage {stage} {why}")
            raise self._dead

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

    def _introduce(self, crew: Crew) -> None:
        """Tell the ranks of a replica on another host where they find each other."""
        sizes = astuple(self._layout.group(crew.key[0], len(crew.ranks)))
        name, patience = f"group {next(self._numbers)} of {_name(crew.key)}", max(1.0, self._plan.heartbeat)
        for index, rank in enumerate(crew.ranks):
            others = {at: other.meets[index] for at, other in enumerate(crew.ranks) if other is not rank}
            rank.link.send(control.Mesh(name, others, sizes, self._salt, patience))

    def _connect(self, crew: Crew) -> None:
        """Open the edges between a crew and those of the stages beside it, and to its own ranks."""
        crew.state = "connecting"
        stage, _ = crew.key
        for key, other in self._crews.items():
            if other.state in ("connecting", "ready") and abs(key[0] - stage) == 1:
                first, second = (other, crew) if key[0] < stage else (crew, other)
                transport = self._transport(first, second)
                edge = self._open(transport, (first, first.leader), (second, second.leader), within=False)
                self._between[first, second] = edge.number
        if stage > 0:
            for rank in crew.ranks[1:]:
                self._open("tcp" if crew.host else "shm", (crew, crew.leader), (crew, rank), within=True)
        self._join_if_open(crew)

    def _transport(self, first: Crew, second: Crew) -> str:
        chosen = self._plan.channels[first.key[0]]
        if chosen != "auto":
            return chosen
        return "shm" if first.host is None and second.host is None else "tcp"

    def _open(self, transport: str, sender: tuple[Crew, Rank], receiver: tuple[Crew, Rank], within: bool) -> _Edge:
        number = next(self._numbers)
        name = f"edge {number} from {_name(sender[0].key)} to {_name(receiver[0].key)}"
        edge = self._edges[number] = _Edge(number, name, transport, sender, receiver, within)
        for crew, _ in (sender, receiver):
            crew.opening.add(number)
        if transport == "shm":
            edge.memory = ShmEdge.create(self._layout.max_bytes, self._layout.messages)
            for (_, rank), sends in ((sender, True), (receiver, False)):
                rank.link.send(self._order(edge, sends=sends), tuple(edge.memory.fds))
        else:
            receiver[1].link.send(self._order(edge, sends=False))
        return edge

    def _order(self, edge: _Edge, *, sends: bool, address: tuple[str, int] | None = None) -> control.Connect:
        joined = (edge.sender if sends else edge.receiver)[1].there
        return control.Connect(
            edge=edge.number,
            name=edge.name,
            transport=edge.transport,
            sends=sends,
            within=edge.within,
            max_bytes=self._layout.max_bytes,
            messages=self._layout.messages,
            address=address,
            secret=b"" if edge.transport != "tcp" else self._salt if joined else self._secret,
            host="" if sends else meeting_host(edge.receiver[1], edge.sender[1]),
            patience=max(1.0, self._plan.heartbeat),
        )

    def _opened(self, message: Connected) -> None:
        edge = self._edges.get(message.edge)
        if edge is None:
            return
        if message.error is not None:
            self._lose_newer(edge, f"{edge.name}: {message.error}")
            return
        edge.open_ends += 1
        if edge.open_ends == 2:
            for crew, _ in (edge.sender, edge.receiver):
                crew.opening.discard(edge.number)
                self._join_if_open(crew)

    def _lose_newer(self, edge: _Edge, why: str) -> None:
        newer = max((edge.sender[0], edge.receiver[0]), key=lambda crew: crew.began)
        if not newer.joined:
            newer.error = why
        self._lose(newer, why)

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
