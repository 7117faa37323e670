"""Plans of every kind, and models of any number of layers, for tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from headrace.model.spec import ModelSpec
from headrace.plan.plan import Plan, Rank, Replica, Stage


def model(layers: int = 12, **fields: Any) -> ModelSpec:
    sizes: dict[str, Any] = dict(dim=64, heads=8, kv_heads=2, head_dim=8, ffn_dim=160, vocab_size=500)
    rest = dict(context_length=512, norm_eps=1e-5, tied=False, attention_scale=1.0)
    every = dict(windows=(None,) * layers, ropes=(None,) * layers)
    return ModelSpec(name="m", architecture="llama", layers=layers, **(sizes | rest | every | fields))


@st.composite
def replicas(draw: st.DrawFn) -> Replica:
    count = draw(st.integers(1, 3))
    pool = draw(st.permutations(range(12)))
    ranks = []
    for _ in range(count):
        cores = None
        if draw(st.booleans()):
            size = draw(st.integers(1, 4))
            cores, pool = tuple(pool[:size]), pool[size:]
        most = len(cores) if cores else 64
        ranks.append(Rank(draw(st.none() | st.integers(1, most)), cores))
    return Replica(tuple(ranks), draw(st.none() | st.sampled_from(("b", "worker-2", "10.0.0.7"))))


@st.composite
def plans(draw: st.DrawFn, most_stages: int = 5) -> Plan:
    """A plan with anything in it, and stages with and without layers."""
    stages, start, skipped = [], 0, 0
    for _ in range(draw(st.integers(1, most_stages))):
        kinds = draw(st.lists(replicas(), min_size=1, max_size=2))
        each = tuple(kind for kind in kinds for _ in range(draw(st.integers(1, 2))))
        pages = draw(st.none() | st.integers(2, 10**6))
        if draw(st.integers(0, 3)) == 0:
            stages.append(Stage(replicas=each, kv_pages=pages))
            skipped += 1
            continue
        first = start + skipped + (draw(st.integers(0, 3)) if skipped else 0)
        start, skipped = first + draw(st.integers(1, 9)), 0
        stages.append(Stage(first, start - 1, each, pages))
    hosts = [
        {replica.host for stage in stages[i : i + 2] for replica in stage.replicas} for i in range(len(stages) - 1)
    ]
    channel = tuple(draw(st.sampled_from(("auto", "tcp", "gloo") + ("shm",) * (names == {None}))) for names in hosts)
    return Plan(
        tuple(stages),
        channel,
        draw(st.sampled_from(("round-robin", "random", "shortest-queue", "least-kv", "longest-prefix"))),
        draw(st.sampled_from(("wait", "fail"))),
        draw(st.none() | st.integers(1, 64)),
        draw(st.floats(0.05, 60.0)),
    )
