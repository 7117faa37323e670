"""What a plan leaves open, filled in for a model and its machines: threads and cores, cuts, micro-batches, channels."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec

from .partition import Costs, cut, mixed_costs
from .plan import Channel, Plan, PlanError, Rank, Replica, Stage

if TYPE_CHECKING:
    from rich.table import Table

    from ..model.spec import ModelSpec

replace = msgspec.structs.replace


def resolve(
    plan: Plan, spec: ModelSpec, costs: Costs | None, cores: Sequence[int], hosts: Mapping[str, Sequence[int]]
) -> Plan:
    """See `Plan.resolve`."""
    plan.check(spec)
    costs = costs or mixed_costs(spec)
    plan = _share_cores(plan, costs, {None: cores, **hosts})
    plan = replace(plan, stages=_cut_open(plan.stages, costs))
    most = max(len(stage.replicas) for stage in plan.stages)
    replicas = sum(len(stage.replicas) for stage in plan.stages)
    # As many as keep every replica busy, and on one stage two, so that the second waits there when the first ends.
    micro_batches = plan.micro_batches or max(2, -(-replicas // most))
    return replace(plan, channel=_channels(plan), micro_batches=micro_batches)


# -- threads and cores -------------------------------------------------------------------------------------------------


def _share_cores(plan: Plan, costs: Costs, hosts: Mapping[str | None, Sequence[int]]) -> Plan:
    """Give open ranks the threads that are left on their host, at least one, and cores of their own where all threads
    find one."""
    work = _replica_work(plan, costs)
    given: dict[tuple[int, int], Replica] = {}
    for host, cores in hosts.items():
        here = {
            (s, r): replica
            for s, stage in enumerate(plan.stages)
            for r, replica in enumerate(stage.replicas)
            if replica.host == host
        }
        if here and cores:
            _check_cores(here, host, set(cores))
            given |= _pin(_give_threads(here, work, len(set(cores))), sorted(set(cores)))
    return replace(
        plan,
        stages=tuple(
            replace(stage, replicas=tuple(given.get((s, r), one) for r, one in enumerate(stage.replicas)))
            for s, stage in enumerate(plan.stages)
        ),
    )


def _check_cores(replicas: Mapping[tuple[int, int], Replica], host: str | None, cores: set[int]) -> None:
    for (stage, number), replica in replicas.items():
        for core in (core for rank in replica.ranks for core in rank.cores or ()):
            if core not in cores:
                where = "this process" if host is None else f"a process on {host}"
                raise PlanError(
                    f"stage {stage} replica {number} is put on core {core}; {where} may use {len(cores)} cores, "
                    f"{min(cores)} to {max(cores)}: choose among them",
                    stage=stage,
                )


def _replica_work(plan: Plan, costs: Costs) -> dict[tuple[int, int], float]:
    """What a replica has to do: its share of its stage, where stages that are yet to be cut share evenly."""
    shares = [None if stage.is_open else costs.of(stage.layers).total for stage in plan.stages]
    rest = max(0.0, costs.total - sum(share or 0.0 for share in shares))
    even = rest / max(1, shares.count(None))
    return {
        (s, r): (even if shares[s] is None else shares[s] or 0.0) / len(stage.replicas)
        for s, stage in enumerate(plan.stages)
        for r in range(len(stage.replicas))
    }


def _give_threads(
    replicas: Mapping[tuple[int, int], Replica], work: Mapping[tuple[int, int], float], cores: int
) -> dict[tuple[int, int], Replica]:
    """Threads for every rank: what is asked for, and for open ranks one more at a time, to all of the replica with the
    most work a thread, as long as cores are left."""
    threads = {key: [rank.threads or len(rank.cores or ()) for rank in one.ranks] for key, one in replicas.items()}
    open_ranks = {key: each.count(0) for key, each in threads.items()}
    left = cores - sum(map(sum, threads.values())) - sum(open_ranks.values())
    more = dict.fromkeys(threads, 1)
    queue = [(-work[key], key) for key, count in open_ranks.items() if count]
    heapq.heapify(queue)
    while queue:
        _, key = heapq.heappop(queue)
        if open_ranks[key] <= left:
            left -= open_ranks[key]
            more[key] += 1
            heapq.heappush(queue, (-work[key] / more[key], key))
    return {
        key: replace(
            one, ranks=tuple(replace(rank, threads=own or more[key]) for rank, own in zip(one.ranks, threads[key]))
        )
        for key, one in replicas.items()
    }


def _pin(replicas: dict[tuple[int, int], Replica], cores: Sequence[int]) -> dict[tuple[int, int], Replica]:
    """Cores for the ranks that name none, next to each other. Where not every thread finds one, the system may move all
    of them: pinned threads that share a core would wait for each other."""
    taken = {core for one in replicas.values() for rank in one.ranks for core in rank.cores or ()}
    free = [core for core in cores if core not in taken]
    wanted = sum(rank.threads or 1 for one in replicas.values() for rank in one.ranks if rank.cores is None)
    if wanted > len(free):
        return replicas
    source = iter(free)

    def pinned(rank: Rank) -> Rank:
        return rank if rank.cores else replace(rank, cores=tuple(next(source) for _ in range(rank.threads or 1)))

    return {key: replace(one, ranks=tuple(map(pinned, one.ranks))) for key, one in sorted(replicas.items())}


# -- cuts and channels -------------------------------------------------------------------------------------------------


def stage_speeds(stages: Sequence[Stage]) -> tuple[float, ...]:
    """How many threads work on each stage at once: what its speed is proportional to, where nothing was measured."""
    ranks = ([rank for one in stage.replicas for rank in one.ranks] for stage in stages)
    return tuple(float(sum(rank.threads or 1 for rank in each)) for each in ranks)


def _cut_open(stages: Sequence[Stage], costs: Costs) -> tuple[Stage, ...]:
    """Share out the layers between stages that have theirs over those that have none."""
    found: list[Stage] = []
    start = 0
    for is_open, group in groupby(enumerate(stages), key=lambda each: each[1].is_open):
        run = list(group)
        if not is_open:
            found += [stage for _, stage in run]
            start = found[-1].layers.stop
            continue
        behind = run[-1][0] + 1
        stop = stages[behind].layers.start if behind < len(stages) else len(costs.layers)
        own = [stage for _, stage in run]
        cuts = cut(costs.of(range(start, stop)), stage_speeds(own))
        edges = (start, *(start + one for one in cuts), stop)
        found += [replace(stage, first=a, last=b - 1) for stage, a, b in zip(own, edges, edges[1:])]
    return tuple(found)


def _channels(plan: Plan) -> tuple[Channel, ...]:
    """Each edge's channel; "auto" stays where an edge has pairs within a host and pairs between hosts."""

    found: list[Channel] = []
    for edge in range(len(plan.stages) - 1):
        sources, targets = (range(len(plan.stages[s].replicas)) for s in (edge, edge + 1))
        kinds: set[Channel] = {plan.channel_between(edge, a, b) for a in sources for b in targets}
        found.append(kinds.pop() if len(kinds) == 1 else "auto")
    return tuple(found)


# -- as a table --------------------------------------------------------------------------------------------------------


def describe(plan: Plan, costs: Costs | None) -> Table:
    """See `Plan.describe`."""
    from rich.table import Table

    options = {"channel": plan.channel if isinstance(plan.channel, str) else ", ".join(plan.channel)}
    options |= {"routing": plan.routing, "without a replica": plan.lost, "heartbeat": f"{plan.heartbeat:g} s"}
    options |= {"micro-batches a path": _text(plan.micro_batches), "paths": plan.paths, "workers": plan.workers}
    table = Table(title=f"Plan {plan}", caption="; ".join(f"{name}: {value}" for name, value in options.items()))
    for name in ("stage", "layers", *["cost"] * (costs is not None), "replica", "host", "ranks"):
        table.add_column(name)
    for name in ("threads", "cores", "KV pages"):
        table.add_column(name)
    for s, stage in enumerate(plan.stages):
        layers = "by cost" if stage.first is None else f"{stage.first}-{stage.last}"
        share = [] if costs is None else ["" if stage.is_open else f"{costs.of(stage.layers).total / costs.total:.1%}"]
        for r, one in enumerate(stage.replicas):
            head = [str(s), layers, *share] if r == 0 else ["", "", *[""] * len(share)]
            threads = " / ".join(_text(rank.threads) for rank in one.ranks)
            cores = " / ".join(_text(rank.cores and ",".join(map(str, rank.cores))) for rank in one.ranks)
            pages = _text(stage.kv_pages)
            table.add_row(*head, str(r), one.host or "", str(len(one.ranks)), threads, cores, pages)
    return table


def _text(value: object) -> str:
    return "auto" if value is None else str(value)
