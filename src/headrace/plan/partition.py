"""Where to cut a model into stages, and how many micro-batches fill the pipe: by what its parts cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from .plan import MAX_MICRO_BATCHES

if TYPE_CHECKING:
    from ..formats.gguf import GGUFFile
    from ..formats.safetensors import Checkpoint
    from ..model.spec import ModelSpec

OPERATIONS_PER_BYTE = 20.0  # that a core with int8 dot products does while it reads a byte from memory
LAYER_BITS, HEAD_BITS = 4.5, 8.5  # of a weight, where no file says it: Q4_0 layers under a Q8_0 head
CLOSE = 1 + 1e-9  # sums in another order differ in their last bits: what is that close is equal


@dataclass(frozen=True)
class Load:
    """What a step computes: `rows` tokens, each with `context` tokens before it, `logit_rows` of them for the head."""

    rows: int
    logit_rows: int
    context: int


DECODE = Load(rows=32, logit_rows=32, context=512)
PREFILL = Load(rows=512, logit_rows=1, context=256)


@dataclass(frozen=True)
class Costs:
    """What each part of a model costs a step, in one unit of your choice, such as seconds."""

    layers: tuple[float, ...]
    embedding: float = 0.0
    head: float = 0.0

    def __post_init__(self) -> None:
        parts = (*self.layers, self.embedding, self.head)
        if not self.layers or not all(math.isfinite(part) and part >= 0 for part in parts):
            raise ConfigError(f"costs must be finite, not negative, and of at least one layer, got {parts!r:.200}")

    @property
    def total(self) -> float:
        return sum(self.layers) + self.embedding + self.head

    def of(self, layers: range) -> Costs:
        """The costs of a range of layers, with the embedding if it starts the model and the head if it ends it."""
        first, last = layers.start == 0, layers.stop == len(self.layers)
        own = self.layers[layers.start : layers.stop]
        return Costs(own, self.embedding if first else 0.0, self.head if last else 0.0)

    def stages(self, cuts: Sequence[int]) -> tuple[float, ...]:
        """The cost of each stage; `cuts` are the first layers of all but the first."""
        edges = (0, *cuts, len(self.layers))
        return tuple(self.of(range(a, b)).total for a, b in pairwise(edges))


def blend(*several: Costs) -> Costs:
    """Costs of a mixture that spends as much on each of its parts as on the others, of 1 in all: a cut of it is good
    for each."""
    if not all(costs.total for costs in several):
        raise ConfigError("costs of a mixture: one of its parts would cost nothing; leave it out")
    shares = [1.0 / (costs.total * len(several)) for costs in several]
    return Costs(
        tuple(sum(cost * share for cost, share in zip(layer, shares)) for layer in zip(*(c.layers for c in several))),
        sum(costs.embedding * share for costs, share in zip(several, shares)),
        sum(costs.head * share for costs, share in zip(several, shares)),
    )


def model_costs(
    spec: ModelSpec,
    load: Load,
    source: GGUFFile | Checkpoint | None = None,
    operations_per_byte: float = OPERATIONS_PER_BYTE,
) -> Costs:
    """The time of each part in a step, in units of the time to read a byte: of reading its weights, keys and values or
    of computing, whichever takes longer.

    Bytes of weights are the file's where one is given; keys and values count as int8. Looked-up tables cost the rows
    that are read of them.
    """
    read, head_bytes = _weight_bytes(spec, load.rows, source)

    def time(size: float, operations: float) -> float:
        return max(size, operations / operations_per_byte)

    weights = sum(math.prod(s) * (spec.active_share if len(s) == 3 else 1) for s in _matrices(spec))
    layers = []
    for size, window in zip(read, spec.windows, strict=True):
        keys = load.rows * (load.context if window is None else min(load.context, window))
        cached = 2 * keys * spec.kv_heads * spec.head_dim
        products = 2 * load.rows * weights + 4 * keys * spec.heads * spec.head_dim
        layers.append(time(size + cached, products))
    tables = 2 if spec.positions else 1
    return Costs(
        tuple(layers),
        embedding=float(load.rows * tables * spec.dim),
        head=time(head_bytes, 2 * load.logit_rows * spec.vocab_size * spec.dim),
    )


def mixed_costs(spec: ModelSpec, source: GGUFFile | Checkpoint | None = None) -> Costs:
    """The costs that a plan is cut by where nothing was measured: half of the time for prompts, half for generating."""
    return blend(model_costs(spec, DECODE, source), model_costs(spec, PREFILL, source))


def _matrices(spec: ModelSpec) -> list[tuple[int, ...]]:
    return [shape for shape in spec.layer_shapes.values() if len(shape) > 1]


def _weight_bytes(spec: ModelSpec, rows: int, source: GGUFFile | Checkpoint | None) -> tuple[Sequence[float], float]:
    """Bytes of weights that a step of `rows` tokens reads: of each layer, and of the head."""
    if source is not None:
        from ..model.weights import layer_bytes, step_bytes

        layers = layer_bytes(source, spec, rows)
        return layers, step_bytes(source, spec, rows) - sum(layers)
    chosen = 1 - (1 - spec.active_share) ** rows  # of experts, if the tokens choose evenly
    size = sum(math.prod(s) * (chosen if len(s) == 3 else 1) for s in _matrices(spec)) * LAYER_BITS / 8
    return [size] * spec.layers, spec.vocab_size * spec.dim * HEAD_BITS / 8


# -- cuts --------------------------------------------------------------------------------------------------------------


def cut(costs: Costs, speeds: Sequence[float]) -> tuple[int, ...]:
    """The first layers of all stages but the first, one stage a speed, each of at least one layer.

    The slowest stage (cost / speed) is as fast as it can be; of all such cuts, the stages' times have the least sum of
    squares; of those, the first cut lies furthest to the left, then the second, and so on. Exact, by dynamic
    programming over suffixes. ConfigError where there are more stages than layers.
    """
    stages, layers = len(speeds), len(costs.layers)
    if not 1 <= stages <= layers:
        raise ConfigError(f"cannot cut {layers} layers into {stages} stages; take 1 to {layers}")
    if not all(math.isfinite(speed) and speed > 0 for speed in speeds):
        raise ConfigError(f"speeds of stages must be finite and more than 0, got {tuple(speeds)!r:.200}")
    work = _work(costs)
    slowest = _best_suffixes(work, speeds, np.maximum, math.inf)[0][0, 0]
    _, choice = _best_suffixes(work, speeds, lambda own, rest: own * own + rest, slowest * CLOSE)
    cuts, start = [], 0
    for stage in range(stages - 1):
        start = int(choice[stage, start])
        cuts.append(start)
    return tuple(cuts)


def _work(costs: Costs) -> np.ndarray:
    """work[i, j]: the cost of a stage of layers i to j - 1; infinite where it has no layer."""
    sums = np.cumsum([0.0, *costs.layers])
    work = sums[None, :] - sums[:, None]
    work[0, :] += costs.embedding
    work[:, -1] += costs.head
    work[np.tri(len(sums), dtype=bool)] = np.inf
    return work


def _best_suffixes(
    work: np.ndarray, speeds: Sequence[float], join: Callable[[np.ndarray, np.ndarray], np.ndarray], bound: float
) -> tuple[np.ndarray, np.ndarray]:
    """best[s, i]: the least that stages s and later can make of layers i and later, where no stage takes more than
    `bound`; choice[s, i]: the least first layer of stage s + 1 with which they do.

    `join` tells what a stage's own time and the best of the rest make together.
    """
    best = np.full((len(speeds) + 1, len(work)), np.inf)
    choice = np.zeros((len(speeds), len(work)), np.int64)
    best[-1, -1] = 0.0
    for stage in reversed(range(len(speeds))):
        own = work / speeds[stage]
        joined = np.where(own <= bound, join(own, best[stage + 1][None, :]), np.inf)
        best[stage] = joined.min(axis=1)
        choice[stage] = (joined <= best[stage][:, None] * CLOSE).argmax(axis=1)
    return best, choice


def measured_costs(costs: Costs, cuts: Sequence[int], seconds: Sequence[float]) -> Costs:
    """Costs in seconds: those of each stage's parts scaled to what the stage was measured to take."""
    own = costs.stages(cuts)
    if len(seconds) != len(own) or not all(math.isfinite(one) and one > 0 for one in seconds):
        raise ConfigError(f"{len(own)} stages need {len(own)} times of more than 0 s, got {tuple(seconds)!r:.200}")
    scales = [one / cost if cost else 0.0 for one, cost in zip(seconds, own)]
    edges = (0, *cuts, len(costs.layers))
    scaled = [cost * scales[s] for s, (a, b) in enumerate(pairwise(edges)) for cost in costs.layers[a:b]]
    return Costs(tuple(scaled), costs.embedding * scales[0], costs.head * scales[-1])


def refine(
    costs: Costs, cuts: Sequence[int], seconds: Sequence[float], speeds: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Better cuts, from the seconds that each stage took for a micro-batch (divided by its replicas, if it has
    several), at the `speeds` (1 where None) that it will have again."""
    speeds = speeds or (1.0,) * len(seconds)
    work = [one * speed for one, speed in zip(seconds, speeds, strict=True)]
    return cut(measured_costs(costs, cuts, work), speeds)


# -- micro-batches -----------------------------------------------------------------------------------------------------


def ideal_bubble(micro_batches: int, stages: int) -> float:
    """The idle share of a burst of equal micro-batches through equal stages, from empty to empty: (p - 1) / (m + p - 1)
    (Huang et al. 2019, GPipe)."""
    return (stages - 1) / (micro_batches + stages - 1)


def round_seconds(
    stages: Sequence[float], micro_batches: int, hop: float = 0.0, host: float = 0.0, replicas: Sequence[int] = ()
) -> float:
    """Seconds in which each of so many micro-batches of a path goes once through the stages, round after round.

    `stages`: seconds of a micro-batch in each; `hop`: between neighbours; `host`: of the coordinator, from an answer to
    the next step of the same sequences; `replicas` of each stage (1 where none are given), with as many micro-batches
    on each path through them. Either one micro-batch's way around is the limit, or the busiest worker, or the host.
    """
    replicas = replicas or (1,) * len(stages)
    paths = math.prod(replicas)
    around = sum(stages) + (len(stages) - 1) * hop + host
    busiest = max(host * paths, *(seconds * paths / count for seconds, count in zip(stages, replicas, strict=True)))
    return max(around, micro_batches * busiest)


def seconds_of(times: Mapping[int, float], rows: int) -> float:
    """Seconds for so many rows, from measured ones by row count: linear between them, the least one's below, in
    proportion above."""
    known = sorted(times)
    if not known:
        raise ConfigError("a stage needs the measured seconds of at least one row count, got none; measure some")
    if rows <= known[0]:
        return times[known[0]]
    at = bisect_left(known, rows)
    if at == len(known):
        return times[known[-1]] * rows / known[-1]
    low, high = known[at - 1], known[at]
    return times[low] + (times[high] - times[low]) * (rows - low) / (high - low)


def choose_micro_batches(
    rows: int,
    times: Sequence[Mapping[int, float]],
    hop: float = 0.0,
    host: float = 0.0,
    replicas: Sequence[int] = (),
    most: int = MAX_MICRO_BATCHES,
) -> int:
    """In how many micro-batches the `rows` sequences of a path go through fastest: more fill the pipe, fewer cost less.

    `times[s]`: measured seconds of stage s by row count; `hop`, `host` and `replicas` as in `round_seconds`. Of equally
    fast numbers the least.
    """
    if rows < 1 or not times:
        raise ConfigError(f"micro-batches need at least 1 row and 1 stage, got {rows} rows and {len(times)} stages")

    def round_of(count: int) -> float:
        largest = -(-rows // count)
        return round_seconds([seconds_of(stage, largest) for stage in times], count, hop, host, replicas)

    return min(range(1, min(rows, most) + 1), key=round_of)
