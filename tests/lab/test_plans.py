"""Benches and tuning of plans, on a tiny model: what they report, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.lab.bench import parse_tests
from headrace.lab.bursts import expected_bubble, measure_bursts, write_bursts
from headrace.lab.plans import ALONE, hop_us, measure_plans, write_plans
from headrace.lab.tune import tune_plan
from headrace.plan.partition import ideal_bubble
from headrace.results import read_results
from headrace.trace import StageSpan


def no_progress(done: int, count: int) -> None:
    assert 0 < done <= count


def test_a_plan_is_measured_beside_one_process(tiny: str, tmp_path: Path) -> None:
    report = measure_plans(tiny, ["0-0 | 1-2"], parse_tests("b2,pp64x3"), 2, no_progress)
    assert report.engines == [ALONE, "0-0 | 1-2"]
    for test in ("b2", "pp64x3"):
        assert len(report.of(ALONE, test)) == len(report.of("0-0 | 1-2", test)) == 2
        for run in report.of("0-0 | 1-2", test):
            assert len(run.idle) == 2 and all(0 <= share < 1 for share in run.idle)
    write_plans(report, tmp_path / "plans.json")
    assert "pp64x3 0-0 | 1-2" in read_results(tmp_path / "plans.json")["summary"]


def test_bursts_and_their_timeline(tiny: str, tmp_path: Path) -> None:
    config, bursts = measure_bursts(tiny, "0-1 | 2-2", [1, 3], 2, no_progress, tmp_path / "trace.json")
    assert [burst.micro_batches for burst in bursts] == [1, 3]
    for burst in bursts:
        assert 0 < burst.bubble < 1 and len(burst.stage_s) == len(burst.idle) == 2
    assert bursts[0].bubble >= 0.5 - 1e-9, "one micro-batch is in one stage at a time"
    write_bursts(config, bursts, tmp_path / "bursts.json")
    assert read_results(tmp_path / "bursts.json")["runs"][1]["micro_batches"] == 3
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert any(name.startswith("step") for name in names)
    with pytest.raises(ConfigError, match="one stage"):
        measure_bursts(tiny, "0-2", [1], 1, no_progress)


def test_cuts_move_to_where_they_were_seen_to_be_best(tiny: str) -> None:
    tuned = tune_plan(tiny, "0-0 | 1-2", 1, no_progress)
    assert tuned.before.cuts == (1,) and 1 <= tuned.after.cuts[0] <= 2
    assert set(tuned.seconds) == {"decode", "prefill"} and all(min(each) > 0 for each in tuned.seconds.values())


@given(st.integers(1, 40), st.integers(2, 6))
def test_equal_stages_have_the_ideal_bubble(micro_batches: int, stages: int) -> None:
    assert expected_bubble(micro_batches, [0.5] * stages) == pytest.approx(ideal_bubble(micro_batches, stages))


def test_a_hop_counts_where_the_next_stage_waited_for_it() -> None:
    def span(step: int, stage: int, hidden: float, started: float, ended: float, sent: float = 0.0) -> StageSpan:
        return StageSpan(step, 1, stage, 0, 0, 0.0, hidden, started, ended, sent)

    first = [span(1, 0, 0.0, 0.0, 1.0, 1.01), span(2, 0, 1.0, 1.0, 2.0, 2.01)]
    second = [span(1, 1, 1.5, 1.5, 3.0), span(2, 1, 3.0, 3.0, 4.0)]  # busy when the second step's came
    assert hop_us([*first, *second]) == pytest.approx(0.5e6)
    assert hop_us(second) is None
