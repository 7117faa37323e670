"""A plan's cuts, chosen anew from what its stages were seen to take."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ..assemble import open_model
from ..assemble_split import resolve_plan
from ..errors import ConfigError
from ..llm import LLM
from ..plan.partition import DECODE, PREFILL, Costs, blend, cut, measured_costs, model_costs
from ..plan.plan import Plan
from ..plan.resolve import stage_speeds
from ..trace import StageSpan
from ..types import SamplingParams
from .spans import spans_since

PROMPTS, PROMPT_TOKENS = 8, 512
SEQUENCES, NEW_TOKENS = 32, 64


@dataclass(frozen=True)
class Tuned:
    """A plan as it was, and as it should be; `seconds` of each stage for a micro-batch of each load, by its name."""

    before: Plan
    after: Plan
    seconds: dict[str, tuple[float, ...]]
    costs: Costs


def tune_plan(model: str, text: str, rounds: int, advance: Callable[[int, int], None]) -> Tuned:
    """Run prompts and generation through a plan, measure its stages, and cut it anew so that the slowest stage is as
    fast as can be, for both loads alike; `rounds` times over. ConfigError for a plan of one stage."""
    opened = open_model(model)
    before = plan = resolve_plan(Plan.parse(text, opened.spec), opened)
    if len(plan.stages) < 2:
        raise ConfigError(f"plan {plan} has one stage, and no cut to move; give one with 2 or more")
    computed = {"decode": DECODE, "prefill": PREFILL}
    costs = {name: model_costs(opened.spec, load, opened.file) for name, load in computed.items()}
    seconds: dict[str, tuple[float, ...]] = {}
    for round_ in range(rounds):
        seconds = measure_stages(model, plan)
        speeds = stage_speeds(plan.stages)
        work = {
            name: [took * speed for took, speed in zip(each, speeds, strict=True)] for name, each in seconds.items()
        }
        costs = {name: measured_costs(costs[name], plan.cuts, work[name]) for name in costs}
        plan = _with_cuts(plan, cut(blend(*costs.values()), speeds))
        advance(round_ + 1, rounds)
    return Tuned(before, plan, seconds, blend(*costs.values()))


def _with_cuts(plan: Plan, cuts: Sequence[int]) -> Plan:
    edges = (0, *cuts, plan.stages[-1].layers.stop)
    stages = (
        msgspec.structs.replace(stage, first=first, last=past - 1)
        for stage, first, past in zip(plan.stages, edges, edges[1:], strict=False)
    )
    return msgspec.structs.replace(plan, stages=tuple(stages))


def measure_stages(model: str, plan: Plan) -> dict[str, tuple[float, ...]]:
    """Mean seconds of each stage for a micro-batch, divided by its replicas: generating, and with prompts."""
    rng = random.Random(0)
    with LLM(model, plan=str(plan), prefix_cache=False) as llm:

        def spans_of(prompts: int, tokens: int, new: int) -> list[StageSpan]:
            ids = [[rng.randrange(llm.spec.vocab_size) for _ in range(tokens)] for _ in range(prompts)]
            began = time.monotonic()
            llm.generate(ids, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True))
            return [span for span in spans_since(llm, began) if span.rank == 0]

        spans_of(SEQUENCES, 8, 8)  # warm
        prefill = spans_of(PROMPTS, min(PROMPT_TOKENS, llm.config.max_context - 1), 1)
        decode = [span for span in spans_of(SEQUENCES, 8, NEW_TOKENS) if span.rows <= SEQUENCES]
    return {"decode": _mean(decode, plan), "prefill": _mean(prefill, plan)}


def _mean(spans: Sequence[StageSpan], plan: Plan) -> tuple[float, ...]:
    times: dict[int, list[float]] = defaultdict(list)
    for span in spans:
        times[span.stage].append(span.busy)
    return tuple(sum(times[stage]) / len(times[stage]) / len(own.replicas) for stage, own in enumerate(plan.stages))


def print_tuned(tuned: Tuned) -> None:
    """The plan as a table, what its stages took, and its notation."""
    from rich.console import Console

    console = Console(highlight=False)
    for name, each in tuned.seconds.items():
        console.print(f"{name}: " + ", ".join(f"{took * 1e3:.2f} ms" for took in each) + " a micro-batch, by stage")
    console.print(tuned.after.describe(tuned.costs))
    was = "as before" if tuned.after.cuts == tuned.before.cuts else f"it was {tuned.before}"
    console.print(f"{tuned.after}  ({was})", soft_wrap=True)
