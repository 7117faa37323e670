"""What `resolve` fills in, and that it leaves alone what was said."""

from __future__ import annotations

from io import StringIO

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from headrace.errors import ConfigError
from headrace.plan.partition import Costs
from headrace.plan.plan import Plan, Stage

from .plans import model, plans

EVEN = Costs((1.0,) * 12)


def resolved(text: str, cores: int, costs: Costs = EVEN, **hosts: range) -> str:
    plan = Plan.parse(text).resolve(model(12), costs, range(cores), hosts)
    return str(plan).removesuffix(f"; micro={plan.micro_batches}").removesuffix("; channel=shm")


CASES = {
    ("*", 4): "0-11 t4 c0-3",
    ("2", 2): "0-5 t1 c0 | 6-11 t1 c1",
    ("2", 4): "0-5 t2 c0,1 | 6-11 t2 c2,3",
    ("* x2 | *", 3): "0-7 x1 t1 c0 + x1 t1 c1 | 8-11 t1 c2",
    ("2", 1): "0-5 t1 | 6-11 t1",  # nothing is pinned where threads must share a core
    ("* /2", 4): "0-11 /2 t2 c0,1/2,3",
    ("* /2", 5): "0-11 /2 t2 c0,1/2,3",  # ranks of a replica wait for each other: none gets more
    ("0-7 | 8-11", 3): "0-7 t2 c0,1 | 8-11 t1 c2",  # most work, most threads
    ("0-3 | 4-11", 3): "0-3 t1 c0 | 4-11 t2 c1,2",
    ("* t3 | *", 4): "0-8 t3 c0-2 | 9-11 t1 c3",
    ("* t3 | * t3", 4): "0-5 t3 | 6-11 t3",
    ("* c2,3 | *", 4): "0-5 t2 c2,3 | 6-11 t2 c0,1",
    ("0-2 | * | *", 3): "0-2 t1 c0 | 3-6 t1 c1 | 7-11 t1 c2",
    ("* | 9-11 | *", 3): None,
    ("* | 6-6 | *", 3): "0-5 t1 c0 | 6-6 t1 c1 | 7-11 t1 c2",
    ("* /1 + /2 | *", 4): "0-8 /1 t1 c0 + /2 t1 c1/2 | 9-11 t1 c3",
}


@pytest.mark.parametrize("text,cores", CASES)
def test_threads_cores_and_cuts(text, cores):
    wanted = CASES[text, cores]
    if wanted is None:
        with pytest.raises(ConfigError, match="leaves 0 of the model's 12 layers to its last 1 stages"):
            resolved(text, cores)
        return
    assert Plan.parse(resolved(text, cores)) == Plan.parse(wanted)


def test_cuts_follow_costs_and_speeds():
    heavy_head = Costs((1.0,) * 12, head=6.0)
    assert resolved("2", 2, heavy_head) == "0-8 t1 c0 | 9-11 t1 c1"
    assert resolved("* t1 | * t2", 3) == "0-3 t1 c0 | 4-11 t2 c1,2"
    assert Plan.parse("2").resolve(model(12)).stages[0].last is not None  # costs of the model itself


def test_other_hosts_have_their_own_cores():
    assert resolved("* | * @b", 2, b=range(8)) == "0-1 t2 c0,1 | 2-11 t8 c0-7 @b; channel=tcp"
    assert resolved("* | * @b", 2) == "0-7 t2 c0,1 | 8-11 @b; channel=tcp"  # nothing is known of it yet
    plan = Plan.parse("* + @b | * | *").resolve(model(12), EVEN, range(2), {"b": range(2)})
    assert plan.channels == ("auto", "shm")


def test_micro_batches_keep_every_replica_busy():
    for text, count in (("*", 2), ("2", 2), ("3", 3), ("* | * x2", 2), ("* x2 | * x2", 2), ("* x3", 2), ("5", 5)):
        assert Plan.parse(text).resolve(model(12), EVEN, range(2)).micro_batches == count
    assert Plan.parse("3; micro=7").resolve(model(12), EVEN, range(2)).micro_batches == 7


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 6), st.integers(1, 40))
def test_a_resolved_plan_is_whole_and_keeps_what_was_said(plan, more, cores):
    layers = len(plan.stages) + max((s.last for s in plan.stages if s.last is not None), default=0)
    if not plan.stages[-1].is_open:
        layers = plan.stages[-1].layers.stop
        assume(layers >= len(plan.stages))
    else:
        layers += more
    spec, costs = model(layers, heads=16), Costs((1.0,) * layers, head=3.0)
    hosts = {"b": range(12), "worker-2": range(20), "10.0.0.7": range(12)}
    asked = [rank for stage in plan.stages for one in stage.replicas if one.host is None for rank in one.ranks]
    if any(core >= cores for rank in asked for core in rank.cores or ()):
        with pytest.raises(ConfigError, match=f"this process may use {cores} cores"):
            plan.resolve(spec, costs, range(cores), hosts)
        return
    whole = plan.resolve(spec, costs, range(cores), hosts)
    whole.check(spec)
    assert [layer for stage in whole.stages for layer in stage.layers] == list(range(layers))
    assert whole.micro_batches is not None and Plan.parse(str(whole)) == whole
    assert whole.resolve(spec, costs, range(cores)) == whole
    used: list[int] = []
    for stage, before in zip(whole.stages, plan.stages, strict=True):
        assert before.is_open or stage.layers == before.layers
        assert stage.kv_pages == before.kv_pages
        for replica, old in zip(stage.replicas, before.replicas, strict=True):
            for rank, said in zip(replica.ranks, old.ranks, strict=True):
                assert rank.threads is not None and said.threads in (None, rank.threads)
                assert said.cores in (None, rank.cores)
                used += rank.cores or () if replica.host is None and said.cores is None else ()
    if all(rank.threads is None and rank.cores is None for rank in asked):
        assert whole.oversubscribed(cores) == (len(asked) > cores)
    assert len(set(used)) == len(used)


def test_a_plan_is_shown_as_a_table():
    plan = Plan.parse("0-7 p99 x2 | 8-11 /2; lost=fail").resolve(model(12), EVEN, range(4))
    console = Console(file=StringIO(), width=120)
    console.print(plan.describe(EVEN))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("0-7", "8-11", "66.7%", "33.3%", "1 / 1", "99", "auto", "fail", "workers: 4", "paths: 2"):
        assert words in text
    console.print(Plan((Stage(), Stage())).describe())
    assert "by cost" in console.file.getvalue()  # type: ignore[attr-defined]
