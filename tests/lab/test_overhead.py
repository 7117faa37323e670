from __future__ import annotations

from headrace.lab.overhead import LOADS, measure_overhead


def test_overhead_is_within_its_goals():
    rows = measure_overhead(steps=60)
    assert [(row["sequences"], row["tokens"]) for row in rows] == [(load.sequences, load.tokens) for load in LOADS]
    for row in rows:
        assert 0 < row["median_us"] <= row["goal_us"]
        assert row["median_us"] <= row["p99_us"]
