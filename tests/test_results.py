"""The results schema: statistics against known values, and files that are whole, finite and readable, or refused."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest

from headrace import results
from headrace.errors import ResultsError
from headrace.results import machine_facts, read_results, summarize, summarize_tests, write_results


def runs(*latencies, test="tg128"):
    return [{"test": test, "latency_s": x, "tokens_per_second": 128 / x} for x in latencies]


def test_statistics_by_their_stated_formulas():
    summary = summarize(runs(1.0, 4.0, 2.0, 3.0))
    assert summary["mean_latency_s"] == 2.5
    assert summary["median_latency_s"] == summary["p50_latency_s"] == 2.5
    assert (summary["min_latency_s"], summary["max_latency_s"]) == (1.0, 4.0)
    assert summary["p95_latency_s"] == pytest.approx(3.85)  # rank 1 + 3 * 0.95 = 3.85
    assert summary["p99_latency_s"] == pytest.approx(3.97)
    std = statistics.stdev([1, 2, 3, 4])
    assert summary["std_latency_s"] == pytest.approx(std)
    assert summary["ci95_latency_s"] == pytest.approx(3.182 * std / 2)
    assert summary["median_tokens_per_sec"] == pytest.approx((128 / 2 + 128 / 3) / 2)
    assert {key.split("_")[0] for key in summary} == {
        "mean",
        "std",
        "min",
        "max",
        "median",
        "p50",
        "p95",
        "p99",
        "ci95",
    }
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (10, 2.228), (11, 2.201), (20, 2.086), (120, 1.980), (10**9, 1.960)]
)
def test_student_t(degrees, quantile):
    assert results._student_t(degrees) == pytest.approx(quantile, abs=3e-3)


def test_one_run_has_no_spread():
    summary = summarize(runs(2.0))
    assert summary["mean_latency_s"] == summary["p99_latency_s"] == 2.0
    assert summary["std_latency_s"] is None and summary["ci95_latency_s"] is None


def test_a_metric_is_in_all_runs_or_in_none():
    rates = [{"test": "b8", "tokens_per_second": 5.0}, {"test": "b8", "tokens_per_second": 7}]
    assert "mean_latency_s" not in summarize(rates) and summarize(rates)["mean_tokens_per_sec"] == 6.0
    assert summarize(rates, {"tokens_per_second": "rate"})["max_rate"] == 7.0
    with pytest.raises(ResultsError, match="1 of 3 runs have latency_s"):
        summarize([*rates, *runs(1.0)])
    for bad in (math.nan, math.inf, "fast", None, True):
        with pytest.raises(ResultsError, match=r"runs\[1\]\.latency_s"):
            summarize([{"latency_s": 1.0}, {"latency_s": bad}])


def test_one_object_per_test():
    summary = summarize_tests([*runs(1.0, 3.0, test="pp512"), *runs(2.0, test="b8"), *runs(5.0, test="pp512")])
    assert list(summary) == ["pp512", "b8"]
    with pytest.raises(ResultsError, match=r"runs\[0\] has no"):
        summarize_tests([{"latency_s": 1.0}])
    assert summary["pp512"]["mean_latency_s"] == 3.0 and summary["b8"]["mean_latency_s"] == 2.0


def test_a_file_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "bench.json"
    config = {"model": "a", "threads": np.int64(2), "load_s": np.float32(0.5), "nested": {"list": [1, None, True]}}
    write_results(path, config, runs(1.0, 2.0), summarize(runs(1.0, 2.0)))
    read = read_results(path)
    assert list(read) == ["config", "runs", "summary"]
    assert read["config"] == {"model": "a", "threads": 2, "load_s": 0.5, "nested": {"list": [1, None, True]}}
    assert read["runs"] == runs(1.0, 2.0) and read["summary"] == summarize(runs(1.0, 2.0))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"a": {"b": [1, math.nan]}}, r"results\.config\.a\.b\[1\] is nan"),
        ({"a": np.float32(math.inf)}, r"results\.config\.a is inf"),
        ({"a": object()}, "is a object"),
        ({"a": np.zeros(2)}, "is a ndarray"),
        ({1: 2}, "the key 1"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, config, message):
    path = tmp_path / "bench.json"
    write_results(path, {}, [], {})
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=message):
        write_results(path, config, [], {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path / "bench.json", {}, [], {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"config": {}, "runs": []}',
        '{"config": {}, "runs": {}, "summary": {}}',
        "[" * 100_000,
        "[" * 950 + "]" * 950,
        "\xff",
    ]
    + ['{"config": {"a": NaN}, "runs": [], "summary": {}}', '{"config": {"a": 1e999}, "runs": [], "summary": {}}'],
    ids=["empty", "list", "no summary", "runs an object", "deep", "less deep", "not utf-8", "nan", "overflow"],
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ResultsError, match=r"bench\.json"):
        read_results(path)


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    write_results(path, {}, [], {})
    monkeypatch.setattr(results, "MAX_FILE_BYTES", 10)
    with pytest.raises(ResultsError, match="at most 10"):
        read_results(path)


X86 = """processor\t: 0
model name\t: Some CPU @ 3 GHz
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 sse2
"""


def test_machine_facts(tmp_path, monkeypatch):
    facts = machine_facts()
    assert facts["cores"] >= 1 and facts["python"].count(".") == 2 and facts["headrace"]
    write_results(tmp_path / "facts.json", facts, [], {})

    texts = {"/proc/cpuinfo": X86, "/proc/meminfo": "MemTotal:       2048 kB\nMemFree: 1 kB\n"}
    monkeypatch.setattr(results, "_read", texts.__getitem__)
    facts = machine_facts()
    assert facts["cpu"] == "Some CPU @ 3 GHz" and facts["memory_bytes"] == 2048 * 1024
    assert facts["isa"] == ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"]

    monkeypatch.setattr(results, "_read", lambda path: "")
    monkeypatch.setenv("PATH", "")
    facts = machine_facts()
    assert facts["memory_bytes"] is None and facts["isa"] == [] and facts["commit"] is None
