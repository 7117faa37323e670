"""Tokens per second through the public door, each run beside the machine's ceilings of that very moment."""

from __future__ import annotations

import random
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..assemble import Model, open_model, resolve_settings, thread_count
from ..completion import Output
from ..config import Resolved, Settings
from ..errors import CapacityError, ConfigError, RequestError
from ..kernels import choose_ops
from ..llm import LLM
from ..model.spec import ModelSpec
from ..model.weights import spared_bytes, step_bytes
from ..results import machine_facts, summarize_tests, write_results
from ..types import SamplingParams
from .against import Peer, PeerRun
from .ceilings import Ceilings, sample_ceilings

if TYPE_CHECKING:
    from rich.table import Table

BATCH_PROMPT = BATCH_NEW = 64
SHORT_PROMPT = 8
MAX_TOKENS = 1 << 17
MAX_BATCH = 4096
ATTEMPTS = 5  # at a difference of two times that a pause in the shorter one may swallow


@dataclass(frozen=True)
class Test:
    """`batch` prompts of `prompt` tokens: `new` tokens each, the prefill left out, or with new = 0 that alone."""

    __test__ = False  # not a test of pytest's
    name: str
    batch: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """Tokens that the rate counts."""
        return self.batch * (self.new or self.prompt)

    @property
    def context(self) -> int:
        """Tokens of each sequence at its end."""
        return self.prompt + self.new + 1


@dataclass(frozen=True)
class Cost:
    """What a test must at least read and compute, at the precision that the model file has."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Run:
    """One measurement, and what the machine could do just after it."""

    test: Test
    seconds: float
    cost: Cost
    ceilings: Ceilings  # reading a working set of the weights' size

    @property
    def rate(self) -> float:
        return self.test.tokens / self.seconds

    @property
    def read_rate(self) -> float:
        """GB/s."""
        return self.cost.bytes / self.seconds / 1e9

    @property
    def compute_rate(self) -> float:
        """GOP/s."""
        return self.cost.flops / self.seconds / 1e9

    def as_dict(self) -> dict[str, float | str]:
        """A row of the results schema."""
        return {
            "test": self.test.name,
            "latency_s": self.seconds,
            "tokens_per_second": self.rate,
            "read_gb_per_s": self.read_rate,
            "read_ceiling_gb_per_s": self.ceilings.read,
            "compute_gop_per_s": self.compute_rate,
            "compute_ceiling_gop_per_s": self.ceilings.compute,
            "compute_ceiling_of": self.ceilings.arithmetic,
        }


def parse_tests(names: str) -> list[Test]:
    """Tests by name, comma-separated: ppN, ppNxB, tgN, tgN@D, bB. ConfigError for anything else."""
    return [_parse(name.strip()) for name in names.split(",")]


def _parse(name: str) -> Test:
    match = re.fullmatch(
        r"pp(?P<pp>\d{1,6})(?:x(?P<prompts>\d{1,6}))?|tg(?P<tg>\d{1,6})(?:@(?P<depth>\d{1,6}))?|b(?P<b>\d{1,6})", name
    )
    if match is None:
        raise ConfigError(f"{name!r:.40} is not a test; tests are ppN, ppNxB, tgN, tgN@D and bB, as in pp512,b8")
    sizes = {key: int(value) for key, value in match.groupdict().items() if value is not None}
    for key, value in sizes.items():
        most = MAX_BATCH if key in ("b", "prompts") else MAX_TOKENS
        if not 1 <= value <= most:
            raise ConfigError(f"{name}: {value} is out of range; it must be from 1 to {most}")
    if "pp" in sizes:
        return Test(name, sizes.get("prompts", 1), sizes["pp"], 0)
    if "tg" in sizes:
        return Test(name, 1, sizes.get("depth", SHORT_PROMPT), sizes["tg"])
    return Test(name, sizes["b"], BATCH_PROMPT, BATCH_NEW)


def cost_of(test: Test, spec: ModelSpec, weight_bytes: int, kv_bytes_per_token: int, rows_per_step: int) -> Cost:
    """Bytes and operations of what `test` times: a step reads all weights once, and each sequence's keys and values."""
    per_layer = kv_bytes_per_token / spec.layers

    def kv_bytes(context: int) -> int:
        return int(per_layer * sum(context if window is None else min(context, window) for window in spec.windows))

    if test.new:
        contexts = range(test.prompt + 1, test.prompt + test.new + 1)
        read = test.new * weight_bytes + test.batch * sum(kv_bytes(c) for c in contexts)
        return Cost(read, test.batch * sum(spec.flops_per_token(c) for c in contexts))
    ends = [*range(rows_per_step, test.prompt, rows_per_step), test.prompt]
    head = 2 * spec.vocab_size * spec.dim  # computed for the last token alone
    flops = sum(spec.flops_per_token(c) for c in range(1, test.prompt + 1)) - (test.prompt - 1) * head
    return Cost(test.batch * (len(ends) * weight_bytes + sum(kv_bytes(end) for end in ends)), test.batch * flops)


@dataclass(frozen=True)
class Report:
    """What was measured, on what."""

    config: dict[str, Any]
    runs: list[Run]
    peer_runs: list[PeerRun] = field(default_factory=list)


def measure(
    model: str,
    tests: Sequence[Test],
    reps: int,
    advance: Callable[[int, int], None],
    peers: Sequence[Peer] = (),
    **settings: Any,
) -> Report:
    """Load `model`; run each test once to warm up, then `reps` times. `advance(done, all)` hears of progress, in runs.

    Each of `peers` runs the same test after each run of ours, so that all meet the machine in the same mood.

    Prompts are random token ids, new ones every time, so that nothing is found in the prefix cache.
    """
    most = max(Settings().max_sequences, *(test.batch for test in tests))
    opened = open_model(model)
    resolved = resolved_settings(opened, Settings(**settings))
    settings |= {"kv_memory": kv_memory(tests, resolved), "max_sequences": most}
    weights = step_bytes(opened.file, opened.spec)
    costs = [_cost(test, opened, resolved) for test in tests]
    del opened  # before its own tokens' memory counts as the engine's
    rng = random.Random(0)
    runs: list[Run] = []
    peer_runs: list[PeerRun] = []
    started = time.perf_counter()
    with LLM(model, **settings) as llm:
        load_s = time.perf_counter() - started
        fill_kv_memory(llm, tests, rng)
        resident, peak = _resident_bytes(), _peak_resident_bytes()  # before the ceilings take memory of their own
        for index, (test, cost) in enumerate(zip(tests, costs, strict=True)):
            for rep in range(-1, reps):
                seconds = time_test(llm, test, rng)
                if rep >= 0:
                    ceilings = sample_ceilings(llm.config.kernels, weights, llm.config.threads)
                    runs.append(Run(test, seconds, cost, ceilings))
                for peer in peers:
                    peer_run = peer.run(test.name)
                    if rep >= 0:
                        peer_runs.append(peer_run)
                advance(index * (reps + 1) + rep + 2, len(tests) * (reps + 1))
        config = machine_facts() | msgspec.to_builtins(llm.config)
    measured = {"load_s": load_s, "resident_bytes": resident, "peak_resident_bytes": peak}
    return Report(config | measured | {"bytes_per_step": weights, "reps": reps}, runs, peer_runs)


def _cost(test: Test, model: Model, config: Resolved) -> Cost:
    rows = test.batch if test.new else min(test.prompt, config.max_batch_tokens)
    screens = config.kernels.startswith("native") and config.activations != "row"
    spared = spared_bytes(model.file, model.spec, test.batch) if screens else 0
    read = step_bytes(model.file, model.spec, rows) - spared  # at least so much
    return cost_of(test, model.spec, read, config.kv_bytes_per_token, config.max_batch_tokens)


def kv_memory(tests: Sequence[Test], config: Resolved) -> int:
    """Bytes for the largest test and half as much again: little enough for `fill_kv_memory`."""
    pages = max(test.batch * -(-test.context // config.page_size) for test in tests)
    return (pages * 3 // 2 + 2) * config.page_size * config.kv_bytes_per_token


def resolved_settings(model: Model, settings: Settings) -> Resolved:
    """What one process would run with."""
    ops = choose_ops(settings.kernels, thread_count(settings.threads), settings.activations)
    return resolve_settings(model, settings, ops)


def fill_kv_memory(llm: LLM, tests: Sequence[Test], rng: random.Random) -> None:
    """Put all pages into use, as in a server that has run for a while: memory touched for the first time costs more
    than what is stored in it, and pages that were never used are taken first."""
    largest = max(tests, key=lambda test: test.batch * test.context)
    tokens = max(llm.config.pages) * llm.config.page_size
    for _ in range(-(-tokens // (largest.batch * largest.context))):
        _generate(llm, largest, largest.new + 1, rng)


def _resident_bytes() -> int:
    """Memory of this process that is in RAM, shared file pages included; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_test(llm: LLM, test: Test, rng: random.Random) -> float:
    """Seconds that count: to the first token, or for `new` tokens after it. A batch's first tokens do not come at once:
    its seconds are those of a run of new + 1 tokens less those of one of 1. RequestError where noise swallows them time
    after time."""
    if not test.new:
        return _generate(llm, test, 1, rng)[0]
    if test.batch == 1:
        return _generate(llm, test, test.new + 1, rng)[1][0].timings.decode
    for _ in range(ATTEMPTS):
        seconds = _generate(llm, test, test.new + 1, rng)[0] - _generate(llm, test, 1, rng)[0]
        if seconds > 0:
            return seconds
    raise RequestError(
        f"{test.name} took less time than its prefill alone, {ATTEMPTS} times: the machine is too noisy to measure now"
    )


def _generate(llm: LLM, test: Test, new: int, rng: random.Random) -> tuple[float, list[Output]]:
    prompts = [[rng.randrange(llm.spec.vocab_size) for _ in range(test.prompt)] for _ in range(test.batch)]
    started = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True))
    seconds = time.perf_counter() - started
    for output in outputs:
        _check(test, output, new)
    return seconds, outputs


def _check(test: Test, output: Output, new: int) -> None:
    """What was timed must be what the test's name says."""
    if output.timings.preemptions:
        raise CapacityError(
            f"{test.name} does not fit in the memory for keys and values: sequences were preempted; bench fewer at once"
        )
    if len(output.token_ids) != new:
        raise RequestError(f"{test.name}: {len(output.token_ids)} tokens came back where {new} were asked for")


def write_report(report: Report, path: Path) -> None:
    """Write the results file. ResultsError or RequestError where that fails."""
    rows = [run.as_dict() for run in report.runs]
    peers = [run.as_dict() for run in report.peer_runs]
    summary = summarize_tests(rows)
    for name in dict.fromkeys(run.engine for run in report.peer_runs):
        of_peer = summarize_tests([row for row in peers if row["engine"] == name])
        summary |= {f"{test} {name}": values for test, values in of_peer.items()}
    try:
        write_results(path, report.config, [{"engine": "headrace", **row} for row in rows] + peers, summary)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def _peer_table(report: Report) -> Table:
    """Median rates of ours and of each peer, and ours over the best of theirs."""
    from statistics import median

    from rich import box
    from rich.table import Table

    engines = list(dict.fromkeys(run.engine for run in report.peer_runs))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("test", "headrace", *engines, "headrace / best peer"):
        table.add_column(name, justify="left" if name == "test" else "right")
    for test in dict.fromkeys(run.test.name for run in report.runs):
        ours = median(run.rate for run in report.runs if run.test.name == test)
        theirs = [median(r.rate for r in report.peer_runs if (r.engine, r.test) == (name, test)) for name in engines]
        table.add_row(test, *(f"{rate:,.1f}" for rate in (ours, *theirs)), f"{ours / max(theirs):.2f}")
    return table


def print_report(report: Report) -> None:
    """Median rate of each test, with the rates of reading and computing beside their ceilings (medians too)."""
    from statistics import median

    from rich import box
    from rich.console import Console
    from rich.table import Table

    arithmetic = report.runs[0].ceilings.arithmetic
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("test")
    for name in ("tok/s", "min", "max", "GB/s", "read\nceiling", "of it", "GOP/s", f"{arithmetic}\nceiling", "of it"):
        table.add_column(name, justify="right")
    for name in dict.fromkeys(run.test.name for run in report.runs):
        own = [run for run in report.runs if run.test.name == name]
        rates = [run.rate for run in own]
        table.add_row(
            name,
            *(f"{value:,.1f}" for value in (median(rates), min(rates), max(rates))),
            f"{median(run.read_rate for run in own):,.1f}",
            f"{median(run.ceilings.read for run in own):,.1f}",
            f"{median(run.read_rate / run.ceilings.read for run in own):.0%}",
            f"{median(run.compute_rate for run in own):,.0f}",
            f"{median(run.ceilings.compute for run in own):,.0f}",
            f"{median(run.compute_rate / run.ceilings.compute for run in own):.0%}",
        )
    console = Console(highlight=False)
    config = report.config
    console.print(f"{config['model']} on {config['cpu']}, op set {config['kernels']}, {config['threads']} threads")
    console.print(table)
    if report.peer_runs:
        console.print(_peer_table(report))
    steady, peak, kv = (config[key] / 1e6 for key in ("resident_bytes", "peak_resident_bytes", "kv_memory"))
    console.print(f"loaded in {config['load_s']:.2f} s")
    console.print(f"{steady:,.0f} MB resident, of which {kv:,.0f} for keys and values; {peak:,.0f} MB at most")
