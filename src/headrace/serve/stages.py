"""What operators see of split models: their stages and replicas, as JSON and as Prometheus metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from ..workers.wire import HOP_SECONDS, ReplicaStatus, Status

log = logging.getLogger("headrace.serve")

_BOUNDS = [*(f"{bound:g}" for bound in HOP_SECONDS), "+Inf"]


def describe(status: Status) -> list[dict[str, Any]]:
    """Each stage with all that is known of its replicas. `busy`: seconds that its ranks have computed, together;
    `lost_for`: how long ago it was lost last, in seconds, null for never."""
    return [
        {
            "stage": stage,
            "layers": list(layers),
            "ready": sum(one.state == "ready" for one in own),
            "replicas": [_replica(one, status.at) for one in own],
        }
        for stage, layers in enumerate(status.layers)
        for own in [[one for one in status.replicas if one.stage == stage]]
    ]


def _replica(one: ReplicaStatus, now: float) -> dict[str, Any]:
    facts = {name: getattr(one, name) for name in msgspec.structs.asdict(one)}
    del facts["stage"], facts["joined"], facts["lost"]
    return {"replica": facts.pop("number"), **facts, "lost_for": round(now - one.lost, 3) if one.lost else None}


def outline(status: Status) -> dict[str, Any]:
    """The same for everybody's eyes: how many replicas of each stage are ready, and which are not."""
    stages = [
        {"stage": each["stage"], "ready": each["ready"], "replicas": len(each["replicas"])} for each in describe(status)
    ]
    degraded = [
        {"stage": one.stage, "replica": one.number, "state": one.state}
        for one in status.replicas
        if one.state != "ready"
    ]
    return {"stages": stages, "degraded": degraded}


class Stages:
    """The last status of every split model; a collector, in Prometheus' sense. Counters begin anew with an engine's
    process."""

    def __init__(self) -> None:
        self._statuses: dict[str, Status] = {}

    def changed(self, model: str, status: Status) -> None:
        before = self._statuses.get(model)
        known = {(one.stage, one.number): one for one in before.replicas} if before else {}
        self._statuses[model] = status
        for one in status.replicas:
            old = known.get((one.stage, one.number))
            facts = {"model": model, "stage": one.stage, "replica": one.number}
            if old is not None and one.lost > old.lost:
                log.warning("replica lost", extra={"facts": {**facts, "reason": one.why}})
            if one.state == "ready" and (old is None or old.joined < one.joined):
                log.info("replica ready", extra={"facts": {**facts, "pids": one.pids}})

    def forget(self, model: str) -> None:
        self._statuses.pop(model, None)

    def collect(self) -> Iterator[Any]:
        replica, stage = ["model_name", "stage", "replica"], ["model_name", "stage"]
        up = GaugeMetricFamily("headrace_replica_up", "1 while a replica is ready.", labels=replica)
        restarts = CounterMetricFamily("headrace_replica_restarts", "Times that a replica was lost.", labels=replica)
        sequences = GaugeMetricFamily("headrace_replica_sequences", "Sequences on a replica.", labels=replica)
        pages = GaugeMetricFamily("headrace_kv_pages", "KV pages of a replica held by sequences.", labels=replica)
        room = GaugeMetricFamily("headrace_kv_pages_capacity", "KV pages of a replica.", labels=replica)
        busy = CounterMetricFamily(
            "headrace_stage_busy_seconds", "Seconds that a stage's ranks computed.", labels=stage
        )
        reduces = CounterMetricFamily("headrace_reduce_seconds", "Seconds of sums over a stage's ranks.", labels=stage)
        hops = HistogramMetricFamily(
            "headrace_hop_seconds",
            "From the end of a stage's step to its hidden states at the next stage.",
            labels=["model_name"],
        )
        for model, status in self._statuses.items():
            for one in status.replicas:
                labels = [model, str(one.stage), str(one.number)]
                for family, value in (
                    (up, one.state == "ready"),
                    (restarts, one.restarts),
                    (sequences, one.sequences),
                    (pages, one.pages_held),
                    (room, one.pages),
                ):
                    family.add_metric(labels, value)
            for index in range(len(status.layers)):
                busy.add_metric([model, str(index)], status.busy[index])
                reduces.add_metric([model, str(index)], status.reduces[index])
            counts = list(zip(_BOUNDS, accumulate(status.hops), strict=True))
            hops.add_metric([model], counts, status.hop_seconds)
        if self._statuses:
            yield from (up, restarts, sequences, pages, room, busy, reduces, hops)
