"""Paths through the replicas that are there, and which of them a sequence takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from random import Random

from ..config import Routing
from ..errors import ConfigError, StageLostError
from .pages import UNBOUNDED, Pages, Path

Replica = tuple[int, int]  # stage, and number among the stage's replicas
MAX_PATHS = 4096


class Routes:
    """The paths of a plan, as its replicas come and go. A path is one replica of each stage, and all their pools.

    `pools(stage)` makes the pools of a replica of that stage. Of each path at most `depth` steps are in flight, and a
    step takes at most one of `parts` of its sequences, so that several steps fill the stages. With `late`, a step may
    name tokens that the one before it samples. `may_wait`: whether sequences may come while a stage has no replica.
    """

    def __init__(
        self,
        pools: Sequence[Callable[[], Sequence[Pages]]],
        *,
        routing: Routing = "shortest-queue",
        depth: int = UNBOUNDED,
        parts: int = 1,
        late: bool = True,
        may_wait: bool = True,
    ) -> None:
        self._may_wait = may_wait
        self._make, self._routing = tuple(pools), routing
        self._depth, self._parts, self._late = depth, parts, late
        self._replicas: list[dict[int, tuple[Pages, ...]]] = [{} for _ in self._make]
        self.leaving: set[Replica] = set()
        self._turn = 0
        self._random = Random(0)
        self.paths: list[Path] = []
        sample = [pool for make in self._make for pool in make()]
        self.page_size, self.capacity = sample[0].page_size, min(pool.capacity for pool in sample)

    @classmethod
    def alone(cls, path: Path) -> Routes:
        """The one path of a model that is not split."""
        routes = cls([lambda: path.pools])
        routes.paths = [path]
        return routes

    @property
    def pools(self) -> tuple[Pages, ...]:
        """All pools that there are, by stage and replica."""
        if not any(self._replicas):
            return tuple(pool for path in self.paths for pool in path.pools)
        return tuple(pool for stage in self._replicas for number in sorted(stage) for pool in stage[number])

    @property
    def missing(self) -> list[int]:
        """The stages that have no replica."""
        return [] if self.paths else [stage for stage, there in enumerate(self._replicas) if not there]

    def check_open(self) -> None:
        """StageLostError where a new sequence would wait for a stage that has no replica, and may not."""
        if not self._may_wait and (missing := self.missing):
            raise StageLostError(
                f"stage {missing[0]} has no replica now: its workers died and start again; try again in some seconds "
                '(or let requests wait for it, with lost: "wait" in the plan)'
            )

    def pools_of(self, replica: Replica) -> tuple[Pages, ...]:
        """A replica's own pools; none where it is not there."""
        stage, number = replica
        return self._replicas[stage].get(number, ())

    def join(self, replica: Replica) -> None:
        """A replica is there, with nothing in its pools."""
        stage, number = replica
        self._replicas[stage][number] = tuple(self._make[stage]())
        others = [[number] if i == stage else sorted(there) for i, there in enumerate(self._replicas)]
        for key in product(*others):
            if len(self.paths) == MAX_PATHS:
                raise ConfigError(f"the plan has more than {MAX_PATHS} paths through its replicas; take fewer replicas")
            pools = [pool for there, own in zip(self._replicas, key, strict=True) for pool in there[own]]
            path = Path(pools, key, self._depth, self._parts, self._late)
            path.closing = any((i, own) in self.leaving for i, own in enumerate(key))
            self.paths.append(path)
        self.paths.sort(key=lambda path: path.key)

    def pace(self, parts: int) -> None:
        """From now on let so many steps of a path fill its stages, and one more wait."""
        self._parts, self._depth = parts, parts + 1
        for path in self.paths:
            path.parts, path.depth = self._parts, self._depth

    def through(self, replica: Replica) -> list[Path]:
        """The paths that a replica is on."""
        stage, number = replica
        return [path for path in self.paths if path.key[stage] == number]

    def leave(self, replica: Replica) -> None:
        """No sequence is to take a replica any more."""
        self.leaving.add(replica)
        for path in self.through(replica):
            path.closing = True

    def lose(self, replica: Replica) -> list[Path]:
        """A replica is gone with all its pages; the paths that it was on."""
        self.leaving.discard(replica)
        lost = self.through(replica)
        for path in lost:
            path.closing = True
        self.paths = [path for path in self.paths if path not in lost]
        stage, number = replica
        self._replicas[stage].pop(number, None)
        return lost

    def open(self) -> list[Path]:
        """Paths that may have another step in flight, the one that has waited longest first."""
        found = [path for path in self.paths if path.in_flight < path.depth]
        if len(found) > 1:
            found.sort(key=lambda path: path.last_step)
        return found

    def choose(self, keys: Sequence[bytes], again: bool = False) -> Path | None:
        """The path for a sequence with these prefix keys, by the routing policy; None where there is none. One that
        starts `again` goes where most of it is kept, whatever the policy."""
        able = [path for path in self.paths if not path.closing]
        able = [path for path in able if not path.full] or able
        if len(able) < 2:
            return able[0] if able else None
        if again or self._routing == "longest-prefix":
            return min(able, key=lambda path: (-path.match(keys), path.load))
        if self._routing == "random":
            return self._random.choice(able)
        if self._routing == "round-robin":
            self._turn += 1
            return able[self._turn % len(able)]
        if self._routing == "least-kv":
            return min(able, key=lambda path: (path.held, path.load))
        return min(able, key=lambda path: path.load)
