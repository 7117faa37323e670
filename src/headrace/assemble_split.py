"""From a model and a plan to a running engine of several processes, and, in each of those, to its part of the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any

import msgspec

from .assemble import Model, open_model, resolve_settings, scheduler_config, tokenizer_maker
from .config import Resolved, Settings
from .engine import Engine
from .errors import ConfigError, ModelFileError
from .formats.fingerprint import fingerprint
from .grammar.compiled import Grammars
from .kernels import choose_ops
from .kernels.native import Limits
from .kernels.ops import Group
from .kernels.reference import ReferenceOps
from .memory.kv import PoolShape, kv_format
from .model.decoder import Decoder
from .model.shares import Share, split
from .model.spec import KVGroup
from .model.weights import column_blocks, load_weights
from .parallel.group import GroupSizes
from .plan.partition import mixed_costs
from .plan.plan import Plan
from .schedule.pages import Pages
from .schedule.routes import Routes
from .schedule.scheduler import Scheduler
from .trace import Trace
from .workers.control import Place, Start
from .workers.lobby import Lobby
from .workers.pace import MOST, Pace
from .workers.residents import Residents
from .workers.runner import NativeRunner, Runner
from .workers.staged import Layout, StagedExecutor

_OWN: dict[str, Any] = {"plan": None, "listen": None, "secret_file": None}  # settings that are the coordinator's
FEWEST_ROWS = 64  # of a step, however many stages share out a prompt


def resolve_plan(plan: Plan, model: Model) -> Plan:
    """A plan with nothing left open. Raises ConfigError."""
    return plan.resolve(model.spec, mixed_costs(model.spec, model.file), sorted(os.sched_getaffinity(0)))


# The coordinator


def build_split_engine(model: Model, settings: Settings) -> tuple[Engine, Resolved]:
    """Start the plan's processes, and wait until all have loaded their parts."""
    parts = _Parts(model, settings)
    trace = Trace()
    executor = StagedExecutor(parts.layout(), trace, parts.lobby())
    executor.wait_ready()
    routes = parts.routes()
    if parts.paced:
        executor.pace = Pace(routes, len(parts.plan.stages))
    engine = Engine(Scheduler(scheduler_config(parts.resolved), routes), executor, trace)
    engine.tend()
    return engine, parts.resolved


class _Parts:
    """What follows from a plan for each of its replicas and ranks."""

    def __init__(self, model: Model, settings: Settings) -> None:
        assert settings.plan is not None
        asked = Plan.parse(settings.plan, model.spec)
        self.model, self.plan = model, resolve_plan(asked, model)
        stages = len(self.plan.stages)
        self.paced = stages > 1 and asked.micro_batches is None
        self.parts = 1 if stages == 1 else self.plan.micro_batches or stages
        self.in_flight = settings.steps_in_flight if stages == 1 else self.parts + 1
        most_in_flight = MOST + 1 if self.paced else self.in_flight
        rows = settings.max_batch_tokens
        if stages > 1:  # a long prompt is cut so that its parts fill the stages
            rows = min(rows, max(FEWEST_ROWS, rows // stages))
        self.settings = msgspec.structs.replace(settings, max_batch_tokens=rows, steps_in_flight=most_in_flight)
        self._ops = choose_ops(settings.kernels, 1, settings.activations)
        resolved = resolve_settings(model, self.settings, self._ops, self._shapes)
        threads = sum(rank.threads or 1 for stage in self.plan.stages for one in stage.replicas for rank in one.ranks)
        self.resolved = msgspec.structs.replace(
            resolved, threads=threads, pages=self._page_counts(resolved), plan=str(self.plan)
        )

    def _groups(self, stage: int) -> tuple[KVGroup, ...]:
        return self.model.spec.kv_groups_of(self.plan.stages[stage].layers)

    def _shapes(self, kv_dtype: str) -> list[PoolShape]:
        """The pools of a path, in its order; bytes of a page in all replicas of its stage."""
        ops, spec = self._ops, self.model.spec
        head_dim = -(-spec.head_dim // ops.kv_head_multiple) * ops.kv_head_multiple
        shapes = []
        for index, stage in enumerate(self.plan.stages):
            heads = sum(
                len(share.kv_heads) if share else spec.kv_heads
                for replica in stage.replicas
                for share in self._shares(len(replica.ranks))
            )
            per_layer = kv_format(kv_dtype).token_bytes(1, heads, head_dim) * self.settings.page_size
            shapes += [PoolShape(group.window, len(group.layers) * per_layer) for group in self._groups(index)]
        return shapes

    def _shares(self, ranks: int) -> tuple[Share | None, ...]:
        spec = self.model.spec
        return split(spec, ranks, column_blocks(self.model.file, spec)) if ranks > 1 else (None,)

    def _page_counts(self, resolved: Resolved) -> tuple[int, ...]:
        """Pages of each pool of a path: what memory allows, or what the plan says."""
        wanted = [stage.kv_pages for i, stage in enumerate(self.plan.stages) for _ in self._groups(i)]
        return tuple(own or most for own, most in zip(wanted, resolved.pages, strict=True))

    def _pages_of(self, stage: int) -> tuple[int, tuple[int, ...]]:
        """The place of a stage's first pool in a path, and the pages of its pools."""
        first = sum(len(self._groups(i)) for i in range(stage))
        return first, self.resolved.pages[first : first + len(self._groups(stage))]

    def routes(self) -> Routes:
        def maker(stage: int) -> Callable[[], list[Pages]]:
            ahead = self.resolved.steps_in_flight * self.resolved.max_batch_tokens
            pools = list(zip(self._pages_of(stage)[1], self._groups(stage), strict=True))
            return lambda: [Pages(pages, self.resolved.page_size, group.window, ahead) for pages, group in pools]

        stages = len(self.plan.stages)
        return Routes(
            [maker(stage) for stage in range(stages)],
            routing=self.plan.routing,
            depth=self.in_flight,
            parts=self.parts,
            late=stages == 1,
            may_wait=self.plan.lost == "wait",
        )

    def lobby(self) -> Lobby | None:
        """Where workers of the hosts that the plan names join."""
        hosts, listen, secret_file = self.plan.hosts, self.settings.listen, self.settings.secret_file
        if not hosts:
            if listen is not None:
                raise ConfigError(f"listen is for workers of other hosts, and the plan {self.plan} names none (@name)")
            return None
        if listen is None or secret_file is None:
            lacking = "listen (host:port)" if listen is None else "secret_file"
            names = ", ".join(hosts)
            raise ConfigError(f"the plan has replicas on {names}, whose workers join over the network: give {lacking}")
        return Lobby(listen, secret_file, hosts)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model.path)

    def layout(self) -> Layout:
        spec, resolved = self.model.spec, self.resolved
        messages = resolved.steps_in_flight + 2
        return Layout(self.plan, self._start, self._group_sizes, resolved.max_batch_tokens, spec.dim, messages)

    def _group_sizes(self, stage: int, ranks: int) -> GroupSizes:
        resolved, columns, logits = self.resolved, 0, 0
        if stage == len(self.plan.stages) - 1:
            columns, logits = max(len(share.vocab) for share in self._shares(ranks) if share), resolved.max_logit_rows
        return GroupSizes(ranks, resolved.max_batch_tokens, self.model.spec.dim, logits, columns)

    def _start(self, stage: int, replica: int, rank: int) -> Start:
        own, resolved = self.plan.stages[stage], self.resolved
        planned = own.replicas[min(replica, len(own.replicas) - 1)]
        ranks, path = planned.ranks, self.model.path.absolute()
        added = replica >= len(own.replicas)  # later than the plan: it takes no cores of its own
        first_pool, pages = self._pages_of(stage)
        settings = msgspec.structs.replace(
            self.settings, kv_dtype=resolved.kv_dtype, max_sequences=resolved.max_sequences, **_OWN
        )
        return Start(
            model=str(path) if planned.host is None or os.path.exists(self.model.name) else self.model.name,
            settings=settings,
            place=Place(stage, len(self.plan.stages), replica, rank, len(ranks)),
            layers=(own.layers.start, own.layers.stop),
            pages=pages,
            first_pool=first_pool,
            max_context=resolved.max_context,
            max_logit_rows=resolved.max_logit_rows,
            threads=ranks[rank].threads or (1 if planned.host is None else 0),
            cores=() if added else ranks[rank].cores or (),
            heartbeat=self.plan.heartbeat,
            fingerprint="" if planned.host is None else self._fingerprint,
            kernels="" if planned.host is None else resolved.kernels,
        )


# A rank


def build_rank(start: Start, group: Group | None) -> Runner | NativeRunner:
    """Load what a rank holds, in its process. `group`: the ranks of its replica. ModelFileError or ConfigError where
    the model's files or the kernels are others than the coordinator's."""
    model, settings, place = open_model(start.model), start.settings, start.place
    if start.fingerprint and (ours := fingerprint(model.path)) != start.fingerprint:
        problem = f"is another model than the coordinator's: {ours} here, {start.fingerprint} there; copy it here"
        raise ModelFileError(model.path, "file", problem)
    spec, layers, ends = model.spec, range(*start.layers), place.stage == place.stages - 1
    share = split(spec, place.ranks, column_blocks(model.file, spec))[place.rank] if place.ranks > 1 else None
    ops = choose_ops(settings.kernels, start.threads, settings.activations, group)
    if start.kernels and ops.name != start.kernels:
        problem = f"the kernels are {ops.name} here and {start.kernels} there, which round differently"
        raise ConfigError(f"{problem}; set HEADRACE_ISA to an instruction set that all hosts have (headrace info)")
    decoder = Decoder(spec, load_weights(model.file, spec, ops, layers, share), layers, start.max_context, share)
    kv_heads = len(share.kv_heads) if share else spec.kv_heads
    caches = [
        ops.kv_cache(len(one.layers), pages, settings.page_size, kv_heads, spec.head_dim, settings.kv_dtype)
        for one, pages in zip(decoder.kv_groups, start.pages, strict=True)
    ]
    residents = Residents(
        settings.max_sequences,
        start.max_context,
        settings.page_size,
        len(caches),
        Grammars(tokenizer_maker(model), spec.vocab_size) if ends else None,
        start.first_pool,
    )
    if isinstance(ops, ReferenceOps):
        return Runner(decoder, ops, caches, residents)
    limits = Limits(
        rows=settings.max_batch_tokens,
        logits=start.max_logit_rows if ends else 0,
        chunks=settings.max_sequences,
        sequences=settings.max_sequences,
        pages=(-(-start.max_context // settings.page_size),) * len(caches),
    )
    hidden = None if layers.start == 0 else spec.dim
    program = ops.capture(lambda batch: decoder.forward(ops, batch, caches), limits, hidden)
    ops.finish_packing()
    return NativeRunner(program, ops, caches, residents, ends)
