from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from headrace.assemble import open_model
from headrace.config import Settings
from headrace.errors import CapacityError, ConfigError, RequestError
from headrace.kernels import native
from headrace.lab import bench
from headrace.lab.bench import Test, cost_of, measure, parse_tests, print_report, write_report
from headrace.llm import LLM
from headrace.results import read_results


def test_parse():
    assert parse_tests("pp128, tg16,tg16@512,b8") == [
        Test("pp128", 1, 128, 0),
        Test("tg16", 1, 8, 16),
        Test("tg16@512", 1, 512, 16),
        Test("b8", 8, 64, 64),
    ]
    assert [test.tokens for test in parse_tests("pp128,tg16,tg16@512,b8")] == [128, 16, 16, 512]


@pytest.mark.parametrize(
    "name", ["", "pp", "tg@5", "pp1.5", "b-1", "bb8", "pp128 tg", "pp0", "b0", "b5000", "tg9@200000"]
)
def test_what_is_not_a_test(name):
    with pytest.raises(ConfigError, match=r"test|range"):
        parse_tests(name)


@pytest.fixture(scope="module")
def spec(smollm2):
    return open_model(str(smollm2)).spec


def test_cost_of_decoding(spec):
    # By hand: two steps; three sequences with 5 and then 6 tokens, each read whole.
    cost = cost_of(Test("x", 3, 4, 2), spec, 1000, 30, 512)
    assert cost.bytes == 2 * 1000 + 3 * 30 * (5 + 6)
    assert cost.flops == 3 * (spec.flops_per_token(5) + spec.flops_per_token(6))


def test_cost_of_a_prompt(spec):
    # Seven rows in steps of 3: three passes over the weights, the keys of 3, 6 and 7 tokens; one row of logits.
    cost = cost_of(Test("x", 1, 7, 0), spec, 1000, 30, 3)
    assert cost.bytes == 3 * 1000 + 30 * (3 + 6 + 7)
    head = 2 * spec.vocab_size * spec.dim
    assert cost.flops == sum(spec.flops_per_token(c) - head for c in range(1, 8)) + head


def test_a_window_bounds_what_is_read(spec):
    windowed = replace(spec, windows=(2,) * spec.layers)
    assert cost_of(Test("x", 1, 4, 2), windowed, 0, 30, 512).bytes == 2 * 30 * 2


class Clock:
    """An LLM on a clock of its own: prompt tokens take 1 s each, generated ones after the first 10 s."""

    spec = SimpleNamespace(vocab_size=100)

    def __init__(self, preemptions: int = 0, short: int = 0, pauses: int = 0) -> None:
        self.now, self.prompts = 0.0, []
        self.preemptions, self.short = preemptions, short
        self.pauses = pauses  # of 1000 s, each in one of the next prefills

    def perf_counter(self) -> float:
        return self.now

    def generate(self, prompts, params):
        assert params.ignore_eos and params.temperature == 0
        self.prompts += prompts
        self.now += sum(map(len, prompts)) + 10 * (params.max_tokens - 1)
        if params.max_tokens == 1 and self.pauses:
            self.now, self.pauses = self.now + 1000, self.pauses - 1
        timings = SimpleNamespace(preemptions=self.preemptions, decode=10 * (params.max_tokens - 1))
        return [SimpleNamespace(timings=timings, token_ids=[0] * (params.max_tokens - self.short)) for _ in prompts]


@pytest.mark.parametrize(("name", "seconds"), [("pp128", 128), ("tg16", 160), ("tg16@512", 160), ("b8", 640)])
def test_what_is_timed(name, seconds, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench.time, "perf_counter", clock.perf_counter)
    assert bench.time_test(clock, *parse_tests(name), random.Random(0)) == seconds  # type: ignore[arg-type]
    assert len({tuple(prompt) for prompt in clock.prompts}) == len(clock.prompts), "a prompt was used twice"


def test_a_time_that_noise_swallows_is_taken_again(monkeypatch):
    (test,) = parse_tests("b8")
    for pauses in (bench.ATTEMPTS - 1, bench.ATTEMPTS):
        clock = Clock(pauses=pauses)
        monkeypatch.setattr(bench.time, "perf_counter", clock.perf_counter)
        if pauses < bench.ATTEMPTS:
            assert bench.time_test(clock, test, random.Random(0)) == 640  # type: ignore[arg-type]
        else:
            with pytest.raises(RequestError, match="too noisy"):
                bench.time_test(clock, test, random.Random(0))  # type: ignore[arg-type]


def test_a_run_that_is_not_what_it_says_is_refused():
    (test,) = parse_tests("tg4")
    with pytest.raises(CapacityError, match="preempted"):
        bench.time_test(Clock(preemptions=1), test, random.Random(0))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="4 tokens came back where 5 were"):
        bench.time_test(Clock(short=1), test, random.Random(0))  # type: ignore[arg-type]


def test_measure_end_to_end(smollm2, tmp_path, capsys):
    heard: list[tuple[int, int]] = []
    report = measure(str(smollm2), parse_tests("pp8,tg32"), 2, lambda done, total: heard.append((done, total)))
    assert heard == [(n, 6) for n in range(1, 7)]
    write_report(report, tmp_path / "bench.json")
    results = read_results(tmp_path / "bench.json")
    assert [run["test"] for run in results["runs"]] == ["pp8", "pp8", "tg32", "tg32"]
    assert set(results["summary"]) == {"pp8", "tg32"}
    for name, tokens in (("pp8", 8), ("tg32", 32)):
        own = [run for run in results["runs"] if run["test"] == name]
        summary = results["summary"][name]
        for run in own:
            assert run["tokens_per_second"] == pytest.approx(tokens / run["latency_s"])
            assert run["read_ceiling_gb_per_s"] > 0 and run["compute_ceiling_gop_per_s"] > 0
        rates = sorted(run["tokens_per_second"] for run in own)
        assert summary["min_tokens_per_sec"] == rates[0] and summary["max_tokens_per_sec"] == rates[1]
        assert summary["median_tokens_per_sec"] == pytest.approx(sum(rates) / 2)
    config = results["config"]
    assert config["kernels"] and config["threads"] >= 1 and config["cpu"] and config["model"] == str(smollm2)
    assert 0 < config["load_s"] < 60 and config["resident_bytes"] <= config["peak_resident_bytes"]
    assert json.dumps(config)
    print_report(report)
    out = capsys.readouterr().out
    assert "pp8" in out and "loaded in" in out


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(RequestError, match="cannot write"):
        write_report(bench.Report({}, []), tmp_path / "no" / "such" / "folder.json")


def test_all_memory_for_keys_is_in_use(smollm2):
    tests = parse_tests("b3,pp70")
    room = bench.kv_memory(tests, bench.resolved_settings(open_model(str(smollm2)), Settings()))
    with LLM(str(smollm2), kv_memory=room) as llm:
        (pages,) = llm._decoder()[0].scheduler.routes.pools
        assert len(pages._free) == pages.count - 1 > 3 * 128 // pages.page_size
        bench.fill_kv_memory(llm, tests, random.Random(0))
        assert not pages._free


@pytest.mark.skipif(bool(native.missing()), reason="the plain op set keeps weights as float32")
def test_memory(smollm2, tmp_path):
    """Weights once, in their own bits, keys and values, and not much else (59 MB measured; libraries differ)."""
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "headrace", "bench", "-m", str(smollm2), "--tests", "tg8,pp512", "--reps", "1"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    config = read_results(out)["config"]
    assert config["resident_bytes"] - config["kv_memory"] <= 1.25 * smollm2.stat().st_size + 70e6
