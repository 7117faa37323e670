"""What a step costs the host: the real engine and scheduler, over a device that answers at once."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..config import SchedulerConfig
from ..engine import Engine
from ..schedule.pages import Pages, Path
from ..schedule.routes import Routes
from ..schedule.scheduler import Scheduler
from ..types import Request, SamplingParams
from ..workers.executor import NullExecutor

PAGE_SIZE = 32
WARM_UP = 20  # steps


@dataclass(frozen=True)
class Load:
    """`sequences` of `tokens` tokens each, all decoding; a step should take the host at most `goal_us` microseconds."""

    sequences: int
    tokens: int
    goal_us: float


LOADS = (Load(1, 4096, 150.0), Load(64, 4096, 1000.0))


def measure_overhead(steps: int) -> list[dict[str, float]]:
    """Microseconds a decode step, for each load, over `steps` steps."""
    return [_measure(load, steps) for load in LOADS]


def _measure(load: Load, steps: int) -> dict[str, float]:
    engine = _prefilled(load, steps)
    times = np.empty(steps)
    for index in range(steps):
        started = time.perf_counter()
        events = engine.step()
        times[index] = time.perf_counter() - started
        assert len(events) == load.sequences, "every sequence gets a token in every step, or something else is measured"
    engine.close()
    microseconds = times * 1e6
    return {
        "sequences": load.sequences,
        "tokens": load.tokens,
        "steps": steps,
        "median_us": float(np.median(microseconds)),
        "mean_us": float(microseconds.mean()),
        "p99_us": float(np.percentile(microseconds, 99)),
        "goal_us": load.goal_us,
    }


def _prefilled(load: Load, steps: int) -> Engine:
    """An engine whose sequences have all computed their prompts and have more than `steps` tokens to go."""
    new = steps + WARM_UP + 64
    length = load.tokens + new
    pages = Pages(load.sequences * -(-length // PAGE_SIZE) + 1, PAGE_SIZE)
    config = SchedulerConfig(
        max_batch_tokens=load.sequences * load.tokens, max_sequences=load.sequences, max_context=length + 1
    )
    engine = Engine(Scheduler(config, Routes.alone(Path([pages], depth=2))), NullExecutor())
    params = SamplingParams(max_tokens=new, temperature=0.0)
    rng = np.random.default_rng(0)
    for index in range(load.sequences):
        prompt = tuple(rng.integers(0, 32000, load.tokens).tolist())
        engine.add(Request(id=str(index), prompt_ids=prompt, params=params, seed=0))
    for _ in range(WARM_UP):
        engine.step()
    return engine


def print_overhead(rows: list[dict[str, float]]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Host time of a decode step (engine and scheduler, null device)", title_justify="left")
    for name in ("sequences", "tokens each", "median µs", "mean µs", "p99 µs", "goal µs"):
        table.add_column(name, justify="right")
    for row in rows:
        times = [f"{row[name]:,.0f}" for name in ("median_us", "mean_us", "p99_us", "goal_us")]
        table.add_row(f"{row['sequences']:,}", f"{row['tokens']:,}", *times)
    Console().print(table)
