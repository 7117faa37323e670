"""Cuts against every cut there is, costs against the model's own sums, micro-batches against a simulated pipe."""

from __future__ import annotations

import heapq
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import write_tiny

from headrace.errors import ConfigError
from headrace.formats.gguf import open_gguf
from headrace.model.families import read_spec
from headrace.model.spec import ExpertSpec
from headrace.model.weights import layer_bytes, step_bytes
from headrace.plan.partition import (
    DECODE,
    PREFILL,
    Costs,
    Load,
    blend,
    choose_micro_batches,
    cut,
    ideal_bubble,
    measured_costs,
    mixed_costs,
    model_costs,
    refine,
    round_seconds,
    seconds_of,
)

from .plans import model

# -- cuts --------------------------------------------------------------------------------------------------------------

whole = st.integers(0, 20)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_cut_is_the_best_of_all(data):
    layers = data.draw(st.lists(whole, min_size=1, max_size=9).filter(any))
    costs = Costs(tuple(map(float, layers)), data.draw(whole), data.draw(whole))
    speeds = data.draw(st.lists(st.sampled_from((0.5, 1.0, 2.0, 3.0)), min_size=1, max_size=min(5, len(layers))))

    def times(cuts: tuple[int, ...]) -> list[float]:
        return [cost / speed for cost, speed in zip(costs.stages(cuts), speeds, strict=True)]

    every = list(combinations(range(1, len(layers)), len(speeds) - 1))
    slowest = min(max(times(cuts)) for cuts in every)
    found = cut(costs, speeds)
    assert max(times(found)) <= slowest * (1 + 1e-9)
    among = [cuts for cuts in every if max(times(cuts)) <= slowest * (1 + 1e-9)]
    squares = {cuts: sum(time * time for time in times(cuts)) for cuts in among}
    least = min(squares.values())
    assert squares[found] <= least * (1 + 1e-9)
    assert found == min(cuts for cuts in among if squares[cuts] <= least * (1 + 1e-9))


def test_ties_go_to_the_left_and_evenness_before_that():
    assert cut(Costs((0.1,) * 30), (1, 1)) == (15,)
    assert cut(Costs((0.1,) * 5), (1, 1)) == (2,)
    assert cut(Costs((0.1,) * 10), (1, 1, 1)) == (3, 6)  # not (2, 6), whose slowest stage is as slow
    assert cut(Costs((1.0,) * 12), (2, 1)) == (8,)
    assert cut(Costs((1.0,) * 12, head=4.0), (1, 1)) == (8,)
    assert cut(Costs((1.0,) * 12, embedding=4.0), (1, 1)) == (4,)
    assert cut(Costs((1.0,) * 3), (1, 1, 1)) == (1, 2)
    assert cut(Costs((0.0, 0.0, 1.0)), (1, 1, 1)) == (1, 2)


def test_large_models_are_cut_exactly_too():
    costs = Costs(tuple(1.0 + (layer * 7 % 11) / 10 for layer in range(1024)), 3.0, 40.0)
    cuts = cut(costs, (1.0,) * 16)
    bound = max(costs.stages(cuts))
    for target in (bound * 0.9999,):  # a greedy filling shows that no cut is faster
        filled, own = 1, costs.embedding
        for layer, cost in enumerate(costs.layers):
            cost += costs.head if layer == 1023 else 0.0
            if own + cost > target:
                filled, own = filled + 1, 0.0
            own += cost
        assert filled > 16


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="cannot cut 3 layers into 4 stages; take 1 to 3"):
        cut(Costs((1.0,) * 3), (1,) * 4)
    with pytest.raises(ConfigError, match="more than 0"):
        cut(Costs((1.0,) * 3), (1, 0))
    for wrong in ((), (1.0, float("nan")), (1.0, -1.0)):
        with pytest.raises(ConfigError, match="costs must be finite"):
            Costs(wrong)


def test_refined_cuts_follow_what_was_measured():
    costs, cuts = Costs((1.0,) * 12), (6,)
    assert refine(costs, cuts, (0.3, 0.3)) == (6,)
    assert refine(costs, cuts, (0.2, 0.4)) == (7,)  # layers of 1/30 s, then of 1/15 s: 8/30 s and 5/15 s
    assert sum(measured_costs(costs, cuts, (0.2, 0.4)).layers) == pytest.approx(0.6)
    # The second stage has two threads: its layers are as heavy as the first's, and it goes on taking twice as many.
    assert refine(costs, (4,), (0.4, 0.4), (1.0, 2.0)) == (4,)
    assert refine(costs, (6,), (0.6, 0.3), (1.0, 2.0)) == (4,)
    with pytest.raises(ConfigError, match="2 stages need 2 times"):
        refine(costs, cuts, (0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match="more than 0 s"):
        refine(costs, cuts, (0.1, 0.0))
    with pytest.raises(ConfigError, match="cost nothing"):
        blend(costs, Costs((0.0, 0.0)))


@pytest.mark.parametrize("seed", range(8))
def test_refining_ends_near_the_best_cut(seed):
    """The true costs are unknown; each stage is measured, and cut again, from a guess that all layers are alike."""
    rng = Random(seed)
    real = Costs(tuple(rng.uniform(1, 3) for _ in range(30)), head=rng.uniform(5, 20))
    guess, speeds = Costs((1.0,) * 30), (1.0,) * 3
    cuts = cut(guess, speeds)
    first = slowest = max(real.stages(cuts))
    for _ in range(4):
        cuts = refine(guess, cuts, real.stages(cuts))
        slowest = min(slowest, max(real.stages(cuts)))
    assert slowest < first and slowest <= 1.1 * max(real.stages(cut(real, speeds)))


# -- costs -------------------------------------------------------------------------------------------------------------


def test_operations_are_the_model_s_own():
    spec = model(6, windows=(None, 4, None, 4, 4, None))
    load = Load(rows=3, logit_rows=3, context=10)
    costs = model_costs(spec, load, operations_per_byte=1e-9)  # so slow that only operations count
    assert (costs.total - costs.embedding) * 1e-9 == pytest.approx(3 * spec.flops_per_token(10))
    assert costs.layers[1] < costs.layers[0]


def test_bytes_are_the_file_s_own(tmp_path):
    file = open_gguf(write_tiny(tmp_path / "tiny.gguf", "Q8_0", layers=4))
    spec = read_spec(file)
    costs = model_costs(spec, Load(rows=1, logit_rows=1, context=0), file, operations_per_byte=1e9)
    assert sum(costs.layers) == sum(layer_bytes(file, spec)) > 0
    assert sum(costs.layers) + costs.head == step_bytes(file, spec)
    named = [sum(t.nbytes for n, t in file.tensors.items() if n.startswith(f"blk.{i}.")) for i in range(4)]
    assert list(layer_bytes(file, spec)) == named


def test_experts_are_read_as_they_are_chosen():
    dense, many = model(4), model(4, experts=ExpertSpec(count=8, chosen=2, ffn_dim=160, normalise=True))
    few = [model_costs(many, Load(rows, 1, 0), operations_per_byte=1e9).layers[0] for rows in (1, 64)]
    one = model_costs(dense, Load(1, 1, 0), operations_per_byte=1e9).layers[0]
    assert one < few[0] < few[1]


def test_the_head_weighs_more_the_more_tokens_are_sampled():
    spec = model(30, dim=576, heads=9, kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=49152)
    decode, prefill, mixed = (
        cut(costs, (1, 1)) for costs in (model_costs(spec, DECODE), model_costs(spec, PREFILL), mixed_costs(spec))
    )
    assert decode > mixed > prefill
    costs = blend(model_costs(spec, DECODE), model_costs(spec, PREFILL))
    assert costs.total == pytest.approx(1.0) and costs == mixed_costs(spec)


def test_a_part_of_the_costs_has_its_own_ends():
    costs = Costs((1.0, 2.0, 3.0), 10.0, 20.0)
    assert costs.of(range(0, 2)) == Costs((1.0, 2.0), 10.0, 0.0)
    assert costs.of(range(1, 3)) == Costs((2.0, 3.0), 0.0, 20.0)
    assert costs.stages((1, 2)) == (11.0, 2.0, 23.0) and costs.total == 36.0


# -- micro-batches -----------------------------------------------------------------------------------------------------


def simulate(stages: list[float], count: int, hop: float, host: float, rounds: int = 60) -> float:
    """Seconds a round of a pipe: `count` micro-batches go around host and stages, each of which serves one at a time in
    the order of arrival. Hops take time and nobody's attention."""
    free = [0.0] * (1 + len(stages))  # of the host, then of each stage
    served = (host, *stages)
    queue = [(0.0, batch, 0) for batch in range(count)]  # arrival, micro-batch, where
    finished: list[float] = []
    while len(finished) < count * rounds:
        arrival, batch, where = heapq.heappop(queue)
        free[where] = max(arrival, free[where]) + served[where]
        behind = (where + 1) % len(served)
        if behind == 0:
            finished.append(free[where])
        heapq.heappush(queue, (free[where] + (hop if where and behind else 0.0), batch, behind))
    half = rounds // 2
    return (finished[count * rounds - 1] - finished[count * half - 1]) / (rounds - half)


seconds = st.floats(0.001, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(seconds, min_size=1, max_size=5), st.integers(1, 8), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_round_takes_what_a_simulated_pipe_takes(stages, count, hop, host):
    assert round_seconds(stages, count, hop, host) == pytest.approx(simulate(stages, count, hop, host), rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 24),
    st.lists(st.tuples(seconds, seconds), min_size=1, max_size=4),
    st.floats(0, 0.3),
    st.floats(0, 0.3),
)
def test_the_chosen_number_of_micro_batches_is_the_simulated_pipe_s_best(rows, lines, hop, host):
    times = [{1: floor + slope / 10, 24: floor + 24 * slope / 10} for floor, slope in lines]

    def simulated(count: int) -> float:
        return simulate([seconds_of(stage, -(-rows // count)) for stage in times], count, hop, host, rounds=30)

    chosen = choose_micro_batches(rows, times, hop, host)
    assert 1 <= chosen <= rows
    assert simulated(chosen) == pytest.approx(min(map(simulated, range(1, rows + 1))), rel=1e-6)


def test_how_many_micro_batches_fill_a_pipe():
    flat, steep = {1: 0.01, 32: 0.01}, {1: 0.001, 32: 0.032}
    assert choose_micro_batches(32, [steep]) == 1
    assert choose_micro_batches(32, [flat] * 3) == 1  # rows cost nothing: splitting would
    assert choose_micro_batches(32, [steep] * 2) == 2
    assert choose_micro_batches(32, [steep] * 4) == 4
    assert choose_micro_batches(32, [steep] * 2, hop=0.001) > 2
    assert choose_micro_batches(32, [steep] * 2, host=1.0) == 1
    assert choose_micro_batches(1, [steep] * 4) == 1
    assert choose_micro_batches(1000, [{1: 1.0}] * 2, most=3) <= 3


def test_replicas_are_shared_by_the_paths_through_them():
    assert round_seconds([1.0, 2.0], 1) == 3.0
    # Two paths, each with two micro-batches: stage 0 serves all four, each replica of stage 1 two of them.
    assert round_seconds([1.0, 2.0], 2, replicas=(1, 2)) == 4.0
    assert round_seconds([1.0, 2.0], 2, replicas=(2, 2)) == 8.0
    assert round_seconds([0.1, 0.1], 1, host=1.0, replicas=(2, 2)) == 4.0
    steep = [{1: 0.001, 32: 0.032}, {1: 0.002, 32: 0.064}]
    assert choose_micro_batches(16, steep, replicas=(1, 2)) == 2


def test_measured_seconds_between_and_beyond_row_counts():
    times = {4: 1.0, 8: 2.0, 16: 3.0}
    assert [seconds_of(times, rows) for rows in (1, 4, 6, 8, 12, 16, 32)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 6.0]
    with pytest.raises(ConfigError, match="at least one row count"):
        seconds_of({}, 1)
    with pytest.raises(ConfigError, match="at least 1 row and 1 stage, got 0 rows and 1"):
        choose_micro_batches(0, [times])


def test_the_ideal_bubble_is_that_of_a_burst():
    for count in (1, 2, 8):
        for stages in (1, 2, 4):
            makespan, busy = count + stages - 1, count
            assert ideal_bubble(count, stages) == pytest.approx(1 - busy / makespan)
