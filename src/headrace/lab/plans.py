"""What a split costs and gains: the same tests by one process and by plans, in turn, each beside the other."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from ..assemble import open_model
from ..config import Settings
from ..errors import RequestError
from ..llm import LLM
from ..plan.plan import Plan
from ..results import machine_facts, summarize_tests, write_results
from ..trace import StageSpan
from ..workers.timeline import bubble
from .bench import Test, fill_kv_memory, kv_memory, resolved_settings, time_test
from .spans import spans_since

ALONE = "one process"


@dataclass(frozen=True)
class PlanRun:
    """One measurement. `idle`: each stage's idle share while the test ran; `hop_us`: median microseconds from one
    stage's end to when the next had the hidden states; `waited`: share of the ranks' time that went on their sums."""

    engine: str
    test: Test
    seconds: float
    idle: tuple[float, ...] = ()
    hop_us: float | None = None
    waited: float | None = None

    @property
    def rate(self) -> float:
        return self.test.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """A row of the results schema."""
        row = {"engine": self.engine, "test": self.test.name, "latency_s": self.seconds, "tokens_per_second": self.rate}
        more = {"idle": list(self.idle), "hop_us": self.hop_us, "reduce_share": self.waited}
        return row | {key: value for key, value in more.items() if value not in (None, [])}


@dataclass(frozen=True)
class PlanReport:
    config: dict[str, Any]
    engines: list[str]  # one process first
    runs: list[PlanRun] = field(default_factory=list)

    def of(self, engine: str, test: str) -> list[PlanRun]:
        return [run for run in self.runs if (run.engine, run.test.name) == (engine, test)]


def measure_plans(
    model: str,
    plans: Sequence[str],
    tests: Sequence[Test],
    reps: int,
    advance: Callable[[int, int], None],
    **settings: Any,
) -> PlanReport:
    """Run each test by one process, then by each plan, `reps` times over, after one round to warm up. `listen` and
    `secret_file` are for the plan that names hosts: at most one, which needs the address to itself."""
    joining = {name: settings.pop(name, None) for name in ("listen", "secret_file")}
    opened = open_model(model)
    most = max(Settings().max_sequences, *(test.batch for test in tests))
    resolved = resolved_settings(opened, Settings(**settings))
    settings |= {"kv_memory": 2 * kv_memory(tests, resolved), "max_sequences": most}
    rng = random.Random(0)
    with ExitStack() as stack:
        doors = {ALONE: stack.enter_context(LLM(model, **settings))}
        for text in plans:
            plan = Plan.parse(text, opened.spec)
            own = settings | (joining if plan.hosts else {})
            doors[str(plan)] = stack.enter_context(LLM(model, plan=text, **own))
        report = PlanReport(machine_facts() | _facts(doors) | {"reps": reps}, list(doors))
        for llm in doors.values():
            fill_kv_memory(llm, tests, rng)
        count = len(tests) * (reps + 1) * len(doors)
        for index, test in enumerate(tests):
            for rep in range(-1, reps):
                for place, (name, llm) in enumerate(doors.items()):
                    began = time.monotonic()
                    seconds = time_test(llm, test, rng)
                    if rep >= 0:
                        report.runs.append(PlanRun(name, test, seconds, *_of_spans(llm, began)))
                    advance((index * (reps + 1) + rep + 1) * len(doors) + place + 1, count)
    return report


def _facts(doors: dict[str, LLM]) -> dict[str, Any]:
    alone = msgspec.to_builtins(doors[ALONE].config)
    return alone | {"plans": {name: llm.config.plan for name, llm in doors.items() if llm.config.plan}}


def _of_spans(llm: LLM, began: float) -> tuple[tuple[float, ...], float | None, float | None]:
    """What the spans of a run that began then say."""
    if llm.config.plan is None:
        return (), None, None
    spans = spans_since(llm, began)
    idle = bubble(spans)
    return tuple(idle[stage] for stage in sorted(idle)), hop_us(spans), _waited(spans)


def hop_us(spans: Sequence[StageSpan]) -> float | None:
    """Median microseconds from a stage's end to when the next stage had the hidden states, of those that it waited for:
    one that computes takes them when it has time."""
    ended = {(span.step, span.stage): span.ended for span in spans if span.sent}
    free: dict[tuple[int, int], float] = {}
    hops = []
    for span in sorted((span for span in spans if span.rank == 0), key=lambda span: span.started):
        before = ended.get((span.step, span.stage - 1))
        if before is not None and free.get((span.stage, span.replica), 0.0) <= before:
            hops.append(span.hidden - before)
        free[span.stage, span.replica] = span.ended
    return median(hops) * 1e6 if hops else None


def _waited(spans: Sequence[StageSpan]) -> float | None:
    busy = sum(span.busy for span in spans if span.reduces)
    return sum(span.reduce_seconds for span in spans if span.reduces) / busy if busy else None


def write_plans(report: PlanReport, path: Path) -> None:
    """Write the results file. ResultsError or RequestError where that fails."""
    summary: dict[str, Any] = {}
    for engine in report.engines:
        rows = [run.as_dict() for run in report.runs if run.engine == engine]
        summary |= {f"{test} {engine}": values for test, values in summarize_tests(rows).items()}
    try:
        write_results(path, report.config, [run.as_dict() for run in report.runs], summary)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def print_plans(report: PlanReport) -> None:
    """Median rates; of each plan its ratio to one process (median over the rounds), and where its time went."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("test", "by", "tok/s", "of one process", "idle, by stage", "hop µs", "sums"):
        table.add_column(name, justify="left" if name in ("test", "by") else "right")
    for test in dict.fromkeys(run.test.name for run in report.runs):
        alone = report.of(ALONE, test)
        for engine in report.engines:
            runs = report.of(engine, test)
            ratio = median(run.rate / one.rate for run, one in zip(runs, alone, strict=True))
            stages = zip(*(run.idle for run in runs), strict=True)
            hops = [run.hop_us for run in runs if run.hop_us is not None]
            waits = [run.waited for run in runs if run.waited is not None]
            table.add_row(
                test if engine == ALONE else "",
                engine,
                f"{median(run.rate for run in runs):,.1f}",
                "" if engine == ALONE else f"{ratio:.0%}",
                " ".join(f"{median(idle):.0%}" for idle in stages),
                f"{median(hops):,.0f}" if hops else "",
                f"{median(waits):.0%}" if waits else "",
            )
    console, config = Console(highlight=False), report.config
    console.print(f"{config['model']} on {config['cpu']}, op set {config['kernels']}")
    for name, resolved in config["plans"].items():
        console.print(f"{name}: {resolved}")
    console.print(table)
