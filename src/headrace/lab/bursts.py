"""Bubbles: bursts of equal micro-batches through a plan's stages, from empty to empty, beside what must be idle."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import ConfigError
from ..llm import LLM
from ..plan.partition import ideal_bubble
from ..plan.plan import Plan
from ..results import machine_facts, write_results
from ..trace import StageSpan
from ..types import SamplingParams
from ..workers.timeline import bubble, burst_bubble, write_timeline
from .spans import spans_since

ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
MOST = 32  # micro-batches of a burst


@dataclass(frozen=True)
class Burst:
    """`micro_batches` prompts of as many tokens as a step has. Idle shares: `bubble` as measured, `ideal` of equal
    stages, (p - 1) / (m + p - 1), and `expected` of stages that take as long as these did. `stage_s`: median seconds
    of a micro-batch in each stage; `idle`: each stage's idle share."""

    micro_batches: int
    rows: int
    latency_s: float  # from empty to empty
    bubble: float
    ideal: float
    expected: float
    stage_s: tuple[float, ...]
    idle: tuple[float, ...]


def measure_bursts(
    model: str,
    plan: str,
    sizes: Sequence[int],
    reps: int,
    advance: Callable[[int, int], None],
    timeline: Path | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], list[Burst]]:
    """Bursts of each of `sizes` micro-batches; of `reps`, the one with the median bubble. `timeline`: a file for a
    trace of all of them. ConfigError for a plan of one stage."""
    if not sizes or not all(1 <= size <= MOST for size in sizes):
        raise ConfigError(f"sizes of bursts must be from 1 to {MOST} micro-batches, got {list(sizes)}")
    asked = Plan.parse(plan)
    if len(asked.stages) < 2:
        raise ConfigError(f"plan {asked} has one stage, which has no bubble; give one with 2 or more")
    notation = f"{asked};micro={max(sizes)}" if asked.micro_batches is None else str(asked)
    rng, bursts = random.Random(0), []
    with LLM(model, plan=notation, prefix_cache=False, **settings) as llm:
        _burst(llm, max(sizes), rng)
        llm.engine.trace.clear()
        for index, size in enumerate(sizes):
            runs = []
            for rep in range(reps):
                runs.append(_burst(llm, size, rng))
                advance(index * reps + rep + 1, len(sizes) * reps)
            bursts.append(sorted(runs, key=lambda burst: burst.bubble)[len(runs) // 2])
        if timeline is not None:
            trace = llm.engine.trace
            write_timeline(timeline, trace, trace.spans, trace.marks, Plan.parse(llm.config.plan or notation))
        config = machine_facts() | {"model": llm.config.model, "plan": llm.config.plan, "reps": reps}
    return config, bursts


def _burst(llm: LLM, size: int, rng: random.Random) -> Burst:
    rows = llm.config.max_batch_tokens
    prompts = [[rng.randrange(llm.spec.vocab_size) for _ in range(rows)] for _ in range(size)]
    began = time.monotonic()
    llm.generate(prompts, ONE_TOKEN)
    spans = [span for span in spans_since(llm, began) if span.rank == 0]
    stages = tuple(median(span.busy for span in spans if span.stage == stage) for stage in sorted(_stages(spans)))
    first, last = min(span.received for span in spans), max(span.ended for span in spans)
    idle = bubble(spans, (first, last))
    return Burst(
        size,
        rows,
        last - first,
        burst_bubble(spans),
        ideal_bubble(size, len(stages)),
        expected_bubble(size, stages),
        stages,
        tuple(idle[stage] for stage in sorted(idle)),
    )


def _stages(spans: Sequence[StageSpan]) -> set[int]:
    return {span.stage for span in spans}


def expected_bubble(micro_batches: int, stages: Sequence[float]) -> float:
    """The idle share of a burst through stages that take so long for each micro-batch, where hops cost nothing."""
    makespan = sum(stages) + (micro_batches - 1) * max(stages)
    return 1 - micro_batches * sum(stages) / (len(stages) * makespan)


def write_bursts(config: dict[str, Any], bursts: Sequence[Burst], path: Path) -> None:
    """Write the results file."""
    runs = [{"test": f"burst{burst.micro_batches}", **asdict(burst)} for burst in bursts]
    summary = {run["test"]: {"mean_latency_s": run["latency_s"], "mean_bubble": run["bubble"]} for run in runs}
    write_results(path, config, runs, summary)


def print_bursts(config: dict[str, Any], bursts: Sequence[Burst]) -> None:
    """The bursts as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("micro-batches", "rows", "ms", "bubble", "ideal", "of these stages", "ms in stages", "idle, by stage"):
        table.add_column(name, justify="right")
    for burst in bursts:
        shares = (f"{share:.1%}" for share in (burst.bubble, burst.ideal, burst.expected))
        times = " ".join(f"{seconds * 1e3:.1f}" for seconds in burst.stage_s)
        idle = " ".join(f"{share:.0%}" for share in burst.idle)
        table.add_row(str(burst.micro_batches), str(burst.rows), f"{burst.latency_s * 1e3:.1f}", *shares, times, idle)
    console = Console(highlight=False)
    console.print(f"{config['model']} on {config['cpu']}, plan {config['plan']}")
    console.print(table)
