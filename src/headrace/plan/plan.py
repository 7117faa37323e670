"""How a model is split, as data: stages of layers, each stage's replicas, each replica's ranks.

stage 0 ──channel──▶ stage 1 ──channel──▶ ... last stage     a *stage* is a range of layers
  replica 0            replica 0                             a *replica* has all of it, and fails as a whole
  replica 1              rank 0                              a *rank* is one process, with a share of each layer
                         rank 1                              a *path* is one replica of each stage
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import msgspec

from ..config import Routing
from ..errors import ConfigError
from ..schedule.routes import MAX_PATHS

if TYPE_CHECKING:
    from rich.table import Table

    from ..model.spec import ModelSpec
    from .partition import Costs

Channel = Literal["auto", "shm", "tcp", "gloo"]
Lost = Literal["wait", "fail"]

MAX_STAGES = 64
MAX_REPLICAS = 64  # of a stage
MAX_RANKS = 16  # of a replica
MAX_WORKERS = 1024  # ranks of a plan
MAX_THREADS = 1024  # of a rank
MAX_CORE = 4095
MAX_LAYER = 1023
MAX_PAGES = 2**31 - 1
MAX_MICRO_BATCHES = 64
MIN_HEARTBEAT, MAX_HEARTBEAT = 0.05, 60.0  # seconds
MAX_FILE_BYTES = 1 << 18

HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})")


class PlanError(ConfigError, ValueError):
    """A plan is wrong; `stage` is the number of the stage that is, `field` the plan's field. As a ValueError, decoding
    a file adds the place in the file."""

    def __init__(self, problem: str, stage: int | None = None, field: str | None = None) -> None:
        super().__init__(problem)
        self.stage, self.field = stage, field


def _check_choice(field: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise PlanError(f"{field} must be one of {', '.join(choices)}, got {value!r:.80}", field=field)


def _check_whole(name: str, value: object, low: int, high: int, field: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise PlanError(f"{name} must be a whole number from {low} to {high}, got {value!r:.80}", field=field)


def _tuple_of(field: str, struct: msgspec.Struct, kind: type, most: int) -> tuple[Any, ...]:
    """A field that must hold 1 to `most` of a kind; a list becomes a tuple."""
    value = getattr(struct, field)
    if not isinstance(value, list | tuple) or not all(isinstance(one, kind) for one in value[: most + 1]):
        raise PlanError(f"{field} must be a list of {kind.__name__}, got {value!r:.80}", field=field)
    if not 1 <= len(value) <= most:
        raise PlanError(f"{field} must number from 1 to {most}, got {len(value)}", field=field)
    msgspec.structs.force_setattr(struct, field, tuple(value))
    return tuple(value)


def _twice(cores: Sequence[int]) -> int:
    return next(core for index, core in enumerate(cores) if core in cores[:index])


class Rank(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One process: its threads, and the cores that it stays on. None leaves both to `Plan.resolve`."""

    threads: int | None = None
    cores: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_THREADS)] | None = None

    def __post_init__(self) -> None:
        if self.threads is not None:
            _check_whole("threads of a rank", self.threads, 1, MAX_THREADS)
        if self.cores is None:
            return
        cores = _tuple_of("cores", self, int, MAX_THREADS)
        for core in cores:
            _check_whole("cores: a core's number", core, 0, MAX_CORE)
        if len(set(cores)) < len(cores):
            raise PlanError(f"cores of a rank name core {_twice(cores)} twice; name each once")
        if self.threads is not None and self.threads > len(cores):
            raise PlanError(
                f"threads of a rank: {self.threads} for {len(cores)} cores; give as many cores, or fewer threads"
            )


class Replica(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All of a stage, split over ranks that work on each layer together. `host` is the name of the machine that it runs
    on, None for the coordinator's own."""

    ranks: Annotated[tuple[Rank, ...], msgspec.Meta(max_length=MAX_RANKS)] = (Rank(),)
    host: str | None = None

    def __post_init__(self) -> None:
        ranks = _tuple_of("ranks", self, Rank, MAX_RANKS)
        cores = [core for rank in ranks for core in rank.cores or ()]
        if len(set(cores)) < len(cores):
            raise PlanError(f"cores: two ranks of a replica are on core {_twice(cores)}; give each rank its own cores")
        if self.host is not None and not (isinstance(self.host, str) and HOST_NAME.fullmatch(self.host)):
            raise PlanError(f"host must be a name of 1 to 253 letters, digits, '.', '_' and '-', got {self.host!r:.80}")


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Layers `first` to `last`, both included; without both of them `Plan.resolve` cuts by cost.

    `kv_pages`: pages in each of the KV pools of each replica (page 0 included); a pool of layers with a window may be
    given fewer. None shares out the memory for keys and values.
    """

    first: int | None = None
    last: int | None = None
    replicas: Annotated[tuple[Replica, ...], msgspec.Meta(max_length=MAX_REPLICAS)] = (Replica(),)
    kv_pages: int | None = None

    def __post_init__(self) -> None:
        _tuple_of("replicas", self, Replica, MAX_REPLICAS)
        if self.kv_pages is not None:
            _check_whole("kv_pages", self.kv_pages, 2, MAX_PAGES)
        if self.first is None and self.last is None:
            return
        if self.first is None or self.last is None:
            given, other = ("last", "first") if self.first is None else ("first", "last")
            raise PlanError(
                f"a stage has {given} layer {self.first or self.last or 0} and no {other}; give both or none"
            )
        _check_whole("first layer of a stage", self.first, 0, MAX_LAYER)
        _check_whole("last layer of a stage", self.last, 0, MAX_LAYER)
        if self.first > self.last:
            raise PlanError(f"a stage's first layer {self.first} comes after its last, {self.last}; exchange them")

    @property
    def is_open(self) -> bool:
        """Whether its layers are yet to be chosen."""
        return self.first is None

    @property
    def layers(self) -> range:
        """Its layers. ConfigError where they are yet to be chosen."""
        if self.first is None or self.last is None:
            raise PlanError("the layers of a stage are yet to be chosen; call Plan.resolve with the model first")
        return range(self.first, self.last + 1)


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A model's stages, from its first layer on without a gap, and how they work together. `str(plan)` is its notation.

    `channel`: what carries hidden states, for all edges between neighbouring stages or for each ("auto": shared memory
    on the coordinator's host, TCP elsewhere). `routing`: how a new sequence chooses its path. `lost`: whether requests
    wait or fail while some stage has no replica. `micro_batches`: steps in flight on each path. `heartbeat`: seconds of
    silence after which a worker counts as dead.

    PlanError (a ConfigError) where something is out of bounds or does not fit together.
    """

    stages: Annotated[tuple[Stage, ...], msgspec.Meta(max_length=MAX_STAGES)] = (Stage(),)
    channel: Channel | Annotated[tuple[Channel, ...], msgspec.Meta(max_length=MAX_STAGES)] = "auto"
    routing: Routing = "shortest-queue"
    lost: Lost = "wait"
    micro_batches: int | None = None
    heartbeat: float = 1.0

    def __post_init__(self) -> None:
        _tuple_of("stages", self, Stage, MAX_STAGES)
        for index, problem in _misplaced(self.stages):
            raise PlanError(problem, stage=index)
        _check_size(self)
        _check_channels(self)
        _check_choice("routing", self.routing, get_args(Routing))
        _check_choice("lost", self.lost, get_args(Lost))
        if self.micro_batches is not None:
            _check_whole("micro_batches", self.micro_batches, 1, MAX_MICRO_BATCHES, field="micro_batches")
        beat = self.heartbeat
        if isinstance(beat, bool) or not isinstance(beat, int | float) or not MIN_HEARTBEAT <= beat <= MAX_HEARTBEAT:
            low, high = MIN_HEARTBEAT, MAX_HEARTBEAT
            raise PlanError(f"heartbeat must be from {low} to {high} seconds, got {beat!r:.80}", field="heartbeat")
        msgspec.structs.force_setattr(self, "heartbeat", float(beat))

    # What it says

    @property
    def paths(self) -> int:
        """How many ways lead through the stages."""
        return math.prod(len(stage.replicas) for stage in self.stages)

    @property
    def workers(self) -> int:
        """How many processes it takes: the ranks of all replicas."""
        return sum(len(replica.ranks) for stage in self.stages for replica in stage.replicas)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of the other hosts that replicas are on."""
        named = {replica.host for stage in self.stages for replica in stage.replicas}
        return tuple(sorted(host for host in named if host is not None))

    @property
    def cuts(self) -> tuple[int, ...]:
        """The first layer of each stage but the first. ConfigError where one is yet to be chosen."""
        return tuple(stage.layers.start for stage in self.stages[1:])

    @property
    def channels(self) -> tuple[Channel, ...]:
        """`channel` of each edge: from each stage but the last to the next."""
        return (self.channel,) * (len(self.stages) - 1) if isinstance(self.channel, str) else self.channel

    def channel_between(self, stage: int, replica: int, next_replica: int) -> Channel:
        """What carries hidden states from a stage's replica to one of the next stage: never "auto"."""
        chosen = self.channels[stage]
        if chosen != "auto":
            return chosen
        hosts = {self.stages[stage].replicas[replica].host, self.stages[stage + 1].replicas[next_replica].host}
        return "shm" if hosts == {None} else "tcp"  # the coordinator can pass shared memory to its own host alone

    def oversubscribed(self, cores: int) -> bool:
        """Whether the ranks on the coordinator's host have more threads than `cores`; an open rank counts as one."""
        ranks = (rank for stage in self.stages for one in stage.replicas if one.host is None for rank in one.ranks)
        return sum(rank.threads or 1 for rank in ranks) > cores

    def check(self, spec: ModelSpec) -> None:
        """PlanError where the stages are not the model's layers, or a replica has more ranks than a layer has heads."""
        stages, layers = len(self.stages), spec.layers
        if stages > layers:
            raise PlanError(f"plan has {stages} stages, the model has {layers} layers; take fewer stages")
        given = max((index for index, stage in enumerate(self.stages) if not stage.is_open), default=None)
        if given is not None:
            end, behind = self.stages[given].layers.stop, stages - 1 - given
            if behind == 0 and end != layers:
                wanted = f"end the last stage at {layers - 1}"
                raise PlanError(f"plan covers layers 0 to {end - 1}, the model has {layers}; {wanted}", stage=given)
            if end + behind > layers:
                raise PlanError(
                    f"plan leaves {max(0, layers - end)} of the model's {layers} layers to its last {behind} stages; "
                    f"end stage {given} at {layers - 1 - behind} or before",
                    stage=given,
                )
        for index, stage in enumerate(self.stages):
            most = max(len(replica.ranks) for replica in stage.replicas)
            if most > spec.heads:
                raise PlanError(f"stage {index} has {most} ranks, a layer {spec.heads} heads; take fewer", stage=index)

    def resolve(
        self,
        spec: ModelSpec,
        costs: Costs | None = None,
        cores: Sequence[int] = (),
        hosts: Mapping[str, Sequence[int]] | None = None,
    ) -> Plan:
        """The plan with nothing left open, for this model: layers cut by cost, threads and cores shared out,
        micro-batches and channels chosen; only `kv_pages` may stay None, for memory to decide.

        `costs`: of the model's parts, computed from its sizes where None. `cores`: numbers of those that this process
        may use, and `hosts`: those of other hosts, by name; ranks where no cores are known stay open. PlanError as
        `check` raises it, and where a rank is put on a core that is not there.
        """
        from .resolve import resolve

        return resolve(self, spec, costs, cores, hosts or {})

    # As text

    @classmethod
    def parse(cls, source: str | FilePath, spec: ModelSpec | None = None) -> Plan:
        """A plan from a file (.yaml, .yml or .json) or from its notation (see `notation.py`), checked against the model
        where one is given. Raises PlanError."""
        from .notation import parse_notation

        in_file = isinstance(source, FilePath) or source.endswith((".yaml", ".yml", ".json"))
        plan = cls.read(source) if in_file else parse_notation(str(source), spec)
        if spec is not None:
            plan.check(spec)
        return plan

    @classmethod
    def read(cls, path: str | FilePath) -> Plan:
        """A plan from a YAML or JSON file."""
        import yaml

        path = FilePath(path).expanduser()
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise PlanError(f"plan {path} cannot be read: {error.strerror}") from None
        if len(data) > MAX_FILE_BYTES:
            raise PlanError(f"plan {path} is larger than {MAX_FILE_BYTES} bytes; a plan is a short list of stages")
        try:
            if path.suffix == ".json":
                return msgspec.json.decode(data, type=cls)
            # Not msgspec's own decoder: it takes libyaml, which deep nesting crashes.
            return msgspec.convert(yaml.safe_load(data), cls)
        except (msgspec.MsgspecError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise PlanError(f"plan {path}: {error}") from None

    def write(self, path: str | FilePath) -> None:
        """Write it to a YAML or JSON file, by the ending of its name."""
        path = FilePath(path)
        if path.suffix not in (".yaml", ".yml", ".json"):
            raise PlanError(f"a plan's file ends in .yaml, .yml or .json, got {path.name!r:.80}")
        text = msgspec.json.format(msgspec.json.encode(self)) if path.suffix == ".json" else msgspec.yaml.encode(self)
        path.write_bytes(text)

    def __str__(self) -> str:
        from .notation import to_notation

        return to_notation(self)

    def describe(self, costs: Costs | None = None) -> Table:
        """It as a table, a line a replica; with each stage's share of the costs where they are given."""
        from .resolve import describe

        return describe(self, costs)


def _misplaced(stages: Sequence[Stage]) -> list[tuple[int, str]]:
    """What is wrong with the first stage that does not continue the one before it: its number and the problem."""
    start, left_open = 0, 0  # where the next stage may begin, and stages since then that are yet to be cut
    for index, stage in enumerate(stages):
        if stage.first is None or stage.last is None:
            left_open += 1
            continue
        first = stage.first
        if left_open and first < start + left_open:
            return [(index, f"stage {index} begins at layer {first}, with {left_open} stages before it that need one "
                            f"layer each from {start} on; begin at {start + left_open} or later")]  # fmt: skip
        if not left_open and index == 0 and first != 0:
            return [(0, f"stage 0 begins at layer {first}; a plan begins at layer 0")]
        if not left_open and first > start:
            return [(index, f"stage {index} begins at layer {first} and stage {index - 1} ends at {start - 1}, which "
                            f"leaves a gap; begin at {start}")]  # fmt: skip
        if not left_open and first < start:
            return [(index, f"stage {index} begins at layer {first} and stage {index - 1} ends at {start - 1}, so they "
                            f"overlap; begin at {start}")]  # fmt: skip
        start, left_open = stage.last + 1, 0
    return []


def _check_size(plan: Plan) -> None:
    if plan.paths > MAX_PATHS:
        raise PlanError(f"replicas: {plan.paths} paths lead through the stages, at most {MAX_PATHS} may; take fewer")
    if plan.workers > MAX_WORKERS:
        raise PlanError(f"ranks: the plan has {plan.workers} in all, at most {MAX_WORKERS} may be; take fewer")


def _check_channels(plan: Plan) -> None:
    if not isinstance(plan.channel, str):
        each = plan.channel if isinstance(plan.channel, list | tuple) else None
        edges = len(plan.stages) - 1
        if each is None or len(each) != edges:
            got = f"{plan.channel!r:.80}" if each is None else len(each)
            raise PlanError(f"channel must be a name, or one for each of the {edges} edges, got {got}", field="channel")
        for channel in each:
            _check_choice("channel", channel, get_args(Channel))
        same = {*each} or {"auto"}
        msgspec.structs.force_setattr(plan, "channel", same.pop() if len(same) == 1 else tuple(each))
    if isinstance(plan.channel, str):
        _check_choice("channel", plan.channel, get_args(Channel))
    for edge, channel in enumerate(plan.channels):
        hosts = {one.host for stage in plan.stages[edge : edge + 2] for one in stage.replicas}
        if channel == "shm" and hosts != {None}:
            names = " and ".join(sorted(host or "the coordinator's host" for host in hosts)[:2])
            raise PlanError(
                f"channel shm stays within the coordinator's host, stages {edge} and {edge + 1} are on {names}; take "
                "tcp or auto",
                field="channel",
            )
