"""Timelines of synthetic pipes: rows, slices that nest, arrows that land where they should, bubbles that are known."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ResultsError
from headrace.plan.partition import ideal_bubble
from headrace.plan.plan import Plan
from headrace.trace import Mark, StageSpan, StepTrace, Trace
from headrace.workers.timeline import bubble, burst_bubble, timeline, write_timeline

START = 1000.0  # of the clock, in seconds
EXACT = 0.0015  # microseconds, the last digit of a timeline


def pipe(count: int, stages: int, seconds: float = 0.01, hop: float = 0.0, rank: int = 0) -> list[StageSpan]:
    """A burst of equal micro-batches through equal stages, all submitted at once."""
    spans = []
    free = [START] * stages
    for step in range(count):
        hidden = START
        for stage in range(stages):
            started = max(free[stage], hidden)
            ended = free[stage] = started + seconds
            sent = ended + hop / 2 if stage < stages - 1 else 0.0
            spans.append(StageSpan(step, 16, stage, 0, rank, START, hidden, started, ended, sent))
            hidden = ended + hop
    return spans


def steps_of(count: int) -> list[StepTrace]:
    return [
        StepTrace(n, 4, 16, START + n / 1e3, START + n / 1e3 + 2e-4, START, START + 0.1, START + 0.1 + n / 1e3,
                  START + 0.1 + n / 1e3 + 5e-4)
        for n in range(count)
    ]  # fmt: skip


def of(events: list[dict[str, Any]], phase: str, **wanted: Any) -> list[dict[str, Any]]:
    found = [event for event in events if event["ph"] == phase]
    return [event for event in found if all(event.get(key) == value for key, value in wanted.items())]


# -- bubbles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count,stages", [(1, 1), (1, 2), (4, 2), (8, 3), (3, 5), (64, 4)])
def test_the_bubble_of_a_burst_is_the_known_one(count, stages):
    spans = pipe(count, stages)
    assert burst_bubble(spans) == pytest.approx(ideal_bubble(count, stages), abs=1e-9)
    shares = bubble(spans)
    assert list(shares) == list(range(stages))
    assert all(share == pytest.approx(ideal_bubble(count, stages), abs=1e-9) for share in shares.values())


def test_a_filled_pipe_has_no_bubble_but_its_imbalance():
    spans = pipe(40, 3)
    inside = (START + 0.03, START + 0.4)
    assert all(share == pytest.approx(0.0, abs=1e-9) for share in bubble(spans, inside).values())
    uneven = [s if s.stage == 0 else StageSpan(s.step, 16, 1, 0, 0, START, s.hidden, s.started, s.started + 0.004)
              for s in pipe(40, 2)]  # fmt: skip
    assert bubble(uneven, (START + 0.1, START + 0.3))[1] == pytest.approx(0.6, abs=1e-9)


def test_a_window_counts_only_what_lies_in_it():
    spans = [StageSpan(0, 1, 0, 0, 0, START, START, START, START + 4.0)]
    assert bubble(spans, (START + 3.0, START + 5.0)) == {0: pytest.approx(0.5)}
    assert bubble(spans, (START + 4.0, START + 5.0)) == {0: 1.0}
    with pytest.raises(ResultsError, match="must end after it begins"):
        bubble(spans, (START, START))
    assert bubble([]) == bubble([StageSpan(0, 1, 0, 0, 0, START, START, START, START)]) == {}
    with pytest.raises(ResultsError, match="at least one step"):
        burst_bubble([])


def test_replicas_and_ranks_share_a_stage_s_time():
    one = StageSpan(0, 1, 0, 0, 0, START, START, START, START + 1.0)
    two = StageSpan(0, 1, 0, 0, 1, START, START, START, START + 0.5)
    assert bubble([one, two]) == {0: pytest.approx(0.25)}
    assert bubble([one, two], plan=Plan.parse("0-3 x3/2")) == {0: pytest.approx(0.75)}  # two replicas did nothing
    assert bubble([one], plan=Plan.parse("0-3 | 4-5")) == {0: 0.0, 1: 1.0}


# -- the timeline ------------------------------------------------------------------------------------------------------


def test_rows_are_the_coordinator_replicas_and_ranks():
    plan = Plan.parse("0-3 x2 | 4-5 /2 @b")
    events = timeline([], [], [], plan)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in of(events, "M", name="process_name")}
    assert list(names.values()) == [
        "coordinator",
        "stage 0 replica 0, layers 0-3",
        "stage 0 replica 1, layers 0-3",
        "stage 1 replica 0 @b, layers 4-5",
    ]
    threads = [(names[e["pid"]][:15], e["tid"], e["args"]["name"]) for e in of(events, "M", name="thread_name")]
    assert threads[-2:] == [("stage 1 replica", 1, "rank 0"), ("stage 1 replica", 2, "rank 1")]
    joined = timeline([], [StageSpan(0, 1, 1, 1, 0, 1.0, 1.0, 1.0, 2.0)], [], plan)["traceEvents"]
    assert "stage 1 replica 1" in [event["args"]["name"] for event in of(joined, "M", name="process_name")]


def test_steps_are_slices_of_their_rank():
    trace = timeline(steps_of(2), pipe(2, 2, hop=0.001), [], Plan.parse("0-3 | 4-5"))
    events = trace["traceEvents"]
    (slice_,) = of(events, "X", name="step 1: 16 rows, 4 chunks", pid=3)
    assert slice_["ts"] == pytest.approx(21_000) and slice_["dur"] == pytest.approx(10_000)
    waits = of(events, "X", name="waits for hidden states")
    assert [(w["pid"], round(w["ts"]), round(w["dur"])) for w in waits] == [(3, 0, 11_000)]
    sends = of(events, "X", name="sends")
    assert [(send["pid"], round(send["dur"])) for send in sends] == [(2, 500)]  # step 0 is sent beside step 1
    idle = {"stage 0": pytest.approx(11 / 31), "stage 1": pytest.approx(11 / 31)}
    assert trace["metadata"] == {"plan": "0-3 | 4-5", "idle": idle} and trace["displayTimeUnit"] == "ms"
    bare = timeline([], pipe(1, 1), [])["traceEvents"]
    assert of(bare, "X", name="step 0: 16 rows") and not of(bare, "X", name="waits for hidden states")


def test_the_coordinator_s_steps_overlap_and_its_work_does_not():
    events = timeline(steps_of(3), [], [])["traceEvents"]
    begun, ended = of(events, "b"), of(events, "e")
    assert [event["id"] for event in begun] == [event["id"] for event in ended] == [0, 1, 2]
    assert begun[1]["ts"] < ended[0]["ts"] and begun[1]["args"] == {"rows": 16, "chunks": 4}
    work = sorted(of(events, "X"), key=lambda event: event["ts"])
    assert [event["name"] for event in work[:4]] == ["plan step 0", "plan step 1", "plan step 2", "apply step 0"]
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(work))


def test_hops_are_arrows_from_sent_to_hidden():
    spans = pipe(1, 3, hop=0.002)
    events = timeline([], spans, [])["traceEvents"]
    starts, ends = of(events, "s"), of(events, "f")
    assert [event["id"] for event in starts] == [event["id"] for event in ends] and len(starts) == 2
    assert [round(event["ts"]) for event in starts] == [11_000, 23_000]  # sent
    assert [event["ts"] for event in ends] == [pytest.approx(12_000), pytest.approx(24_000)]  # hidden
    assert [(s["pid"], e["pid"]) for s, e in zip(starts, ends, strict=True)] == [(2, 3), (3, 4)]


def test_arrows_go_to_every_rank_from_its_own_or_the_first():
    first = StageSpan(0, 1, 0, 0, 0, 0.0, 0.0, 0.0, 1.0, 1.5)
    ranks = [StageSpan(0, 1, 1, 2, rank, 0.0, 2.0, 2.0, 3.0, 4.0 + rank) for rank in (0, 1)]
    last = [StageSpan(0, 1, 2, 0, rank, 0.0, 5.0, 5.0, 6.0) for rank in (0, 1, 2)]
    events = timeline([], [first, *ranks, *last], [])["traceEvents"]
    arrows = [((s["pid"], s["tid"]), (f["pid"], f["tid"])) for s, f in zip(of(events, "s"), of(events, "f"))]
    assert arrows == [((2, 1), (3, 1)), ((2, 1), (3, 2)), ((3, 1), (4, 1)), ((3, 2), (4, 2)), ((3, 1), (4, 3))]


def test_reductions_lie_in_their_step():
    span = StageSpan(7, 4, 0, 0, 1, 0.0, 0.0, 0.0, 1.0, 0.0, 60, 138240, 0.25)
    events = timeline([], [span], [])["traceEvents"]
    (slice_,) = [event for event in of(events, "X") if "60 reductions, 138240 bytes" in event["name"]]
    assert (slice_["ts"], slice_["dur"], slice_["tid"]) == (750_000, 250_000, 2)


def test_marks_are_instants_where_they_happened():
    marks = [
        Mark(START + 0.001, "lost", 1, 0, 1, "kill -9"),
        Mark(START + 0.002, "restarted", 1, 0),
        Mark(START + 0.003, "revoked", text="3 sequences"),
    ]
    events = of(timeline([], pipe(1, 2), marks)["traceEvents"], "i")
    assert [(e["name"], e["s"], e["pid"], e["tid"], round(e["ts"])) for e in events] == [
        ("lost: kill -9", "t", 3, 2, 1000),
        ("restarted", "p", 3, 1, 2000),
        ("revoked: 3 sequences", "g", 1, 1, 3000),
    ]
    assert events[0]["args"] == {"stage": 1, "replica": 0, "rank": 1}


moments = st.integers(0, 10_000).map(lambda microseconds: microseconds / 1e6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[moments] * 5), min_size=1, max_size=6), st.integers(1, 3), st.booleans())
def test_slices_nest_and_arrows_are_anchored(times, stages, beside):
    """What a viewer needs: on a row a slice lies in another or beside it, an arrow starts in its sender's slice, and
    the next slice from its end on is the step that it belongs to."""
    spans = []
    for stage in range(stages):
        now = START
        for step, (wait, late, run, send, reduce) in enumerate(times):
            hidden = START + wait * 5
            started = max(now, hidden) + late + 1e-5
            ended = started + run + 1e-5
            sent = ended + send + 1e-5 if stage < stages - 1 else 0.0
            now = ended if beside else max(ended, sent)
            spans.append(StageSpan(step, 1, stage, 0, 0, START, hidden, started, ended, sent, 2, 8, reduce))
    events = timeline([], spans, [])["traceEvents"]
    assert all(event["ts"] >= 0 and event.get("dur", 0) >= 0 for event in events if event["ph"] != "M")
    rows = defaultdict(list)
    for event in of(events, "X"):
        rows[event["pid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    for row in rows.values():
        row.sort(key=lambda each: (each[0], -each[1]))
        for (_, end, _), (start, stop, _) in pairwise(row):
            assert start >= end - EXACT or stop <= end + EXACT
    starts, ends = of(events, "s"), of(events, "f")
    assert len(starts) == len(ends) == len(times) * (stages - 1)
    for start, end in zip(starts, ends, strict=True):
        step = start["args"]["step"]
        inside = [name for a, b, name in rows[start["pid"]] if a <= start["ts"] < b]
        assert "sends" in inside or (beside and any(name.startswith(f"step {step}:") for name in inside))
        behind = next(name for a, _, name in rows[end["pid"]] if a > end["ts"])
        assert behind.startswith(f"step {step}:")


def test_a_timeline_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "timeline.json"
    write_timeline(path, steps_of(2), pipe(2, 2), [], Plan.parse("2"))
    before = path.read_text()
    assert json.loads(before) == timeline(steps_of(2), pipe(2, 2), [], Plan.parse("2"))
    broken = StageSpan(0, 1, 0, 0, 0, START, START, START, float("nan"))
    with pytest.raises(ResultsError, match=r"ended of StageSpan.* is nan"):
        write_timeline(path, [], [broken], [])
    assert path.read_text() == before and [each.name for each in tmp_path.iterdir()] == ["timeline.json"]


def test_the_trace_keeps_the_last_of_each_kind():
    trace = Trace(capacity=2, spans=3, marks=1)
    for step in steps_of(5):
        trace.add(step)
    for span in pipe(5, 1):
        trace.add(span)
    for number in range(5):
        trace.add(Mark(float(number), "joined", 0, number))
    assert [step.number for step in trace] == [3, 4] and len(trace) == 2
    assert [span.step for span in trace.spans] == [2, 3, 4]
    assert [mark.replica for mark in trace.marks] == [4]
    trace.clear()
    assert (len(trace), trace.spans, trace.marks) == (0, (), ())
