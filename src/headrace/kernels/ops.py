"""The op table: all that a model is written in.

`model/decoder.py` calls these on an op set and never looks at what the operands are. `reference.py` runs each call
at once, on numpy arrays; a recording set returns slots of a program that is replayed later. So an op has no hidden
state, takes its metadata as operands, and each row of its result depends on that row's operands alone, summed in
one fixed order.

Shapes: `rows` counts the tokens of a batch, over all chunks. Activations are float32 [rows, width]. Weights are
opaque: `pack` makes a Matrix from a file's tensor, and only the same op set reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np

Array = Any  # what an op set computes on: numpy arrays, or slots of a recorded program
Matrix = Any  # a packed weight [out, in]

# gelu: x times the normal distribution's share below x; gelu_tanh: its approximation by tanh (Hendrycks & Gimpel 2016).
# relu2: the square of relu.
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
SCREENED_ROWS = 4  # of so few rows that ask for their best token alone, the native set need not read a whole head


@dataclass(frozen=True)
class RopeTable:
    """Rotary embedding as data: `inv_freq` float32 [rotated / 2] (radians a position), and a factor on cos and sin
    (yarn).

    Pairs are (i, i + rotated/2), the layout of Hugging Face checkpoints; columns past `rotated` pass through.
    """

    inv_freq: np.ndarray
    scale: float = 1.0


@dataclass
class KVGroupBatch:
    """Where a batch's keys and values live, for the layers of one KV group. Page 0 is the trash page: padding
    writes there."""

    slots: Array  # int64 [rows]: page * page_size + offset, where each row's key and value are written
    page_table: Array  # int32 [chunks, pages]: each chunk's pages from position 0 on; 0 where freed or unused


@dataclass
class Batch:
    """A step's chunks as arrays. Row r of chunk c has position `positions[r]` and attends to positions
    0..positions[r] of its sequence."""

    tokens: Array  # int32 [rows]
    positions: Array  # int32 [rows]
    chunk_rows: Array  # int32 [chunks + 1]: first row of each chunk, then rows
    logit_rows: Array  # int32 [n]: the rows that the head computes, ascending
    groups: tuple[KVGroupBatch, ...]  # one per KV group of this range of layers
    hidden: Array | None = None  # float32 [rows, dim]: input of a range that does not start at layer 0
    # Each call of `experts` appends int64 [experts]: how many rows chose each. The native set counts in the program.
    expert_load: list[np.ndarray] = field(default_factory=list)


class Reduction(Protocol):
    """A reduction that has started."""

    def wait(self) -> np.ndarray:
        """The sum over all ranks, the same bytes on each."""
        ...


class Group(Protocol):
    """The ranks that hold a model between them. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def start(self, partial: np.ndarray) -> Reduction:
        """Give this rank's partial sums, float32 [rows, width], to all ranks. They are added in the ranks' order."""
        ...

    def gather(self, own: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
        """All ranks' columns side by side: float32 [rows, cuts[-1]], from this rank's cuts[rank]:cuts[rank + 1]."""
        ...

    def native(self) -> Any:
        """The group as the native program takes part in it."""
        ...


class Ops(Protocol):
    """An op set. `name` is what `headrace info` prints."""

    name: str
    kv_head_multiple: int  # heads of keys and values are stored as wide as the next multiple of this

    def pack(self, tensor: Any, row_order: np.ndarray | None = None, head: bool = False) -> Matrix:
        """Take a file's tensor [out, in] into this op set's own layout: its rows `row_order`, in that order, or all.

        `head`: logits come from it, so that often only the greatest of a row's products counts."""
        ...

    def vector(self, tensor: Any, row_order: np.ndarray | None = None) -> Array:
        """Take a file's 1-d tensor as float32: its elements `row_order`, in that order, or all (biases follow their
        matrix)."""
        ...

    def kv_cache(self, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: str) -> list[Any]:
        """Allocate one KV group's pool: one cache per layer, `pages` pages of `page_size` tokens each (page 0
        included)."""
        ...

    def copy_page(self, caches: list[Any], source: int, target: int) -> None:
        """Copy a page in every layer of a pool."""
        ...

    def embed(self, table: Matrix, indices: Array, offset: int = 0, total: int | None = None) -> Array:
        """Rows `indices` + `offset` of `table` as float32 [rows, dim]; `indices` are the batch's tokens or
        positions.

        With `total`, the table is a rank's part of one of so many rows, which begins with row -`offset` of it: what
        another rank has is zeros here.
        """
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), over the last axis; where x is several times as
        wide as the weight (one vector a head), over each such part."""
        ...

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        """(x - mean(x)) / sqrt(variance(x) + eps) * weight (+ bias), over the last axis (Ba et al. 2016)."""
        ...

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        """x [rows, in] @ weight.T + bias -> [rows, out]."""
        ...

    def rope(self, x: Array, positions: Array, table: RopeTable, heads: int) -> Array:
        """Rotate each head of x [rows, heads * head_dim] by its row's position (Su et al. 2021)."""
        ...

    def kv_write(self, cache: Any, k: Array, v: Array, group: KVGroupBatch) -> None:
        """Store k and v [rows, kv_heads * head_dim] at the group's slots, in the cache's dtype."""
        ...

    def attention(
        self,
        q: Array,
        cache: Any,
        batch: Batch,
        group: KVGroupBatch,
        *,
        heads: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        slopes: np.ndarray | None = None,
    ) -> Array:
        """Causal grouped-query attention of q [rows, heads * head_dim] over its sequences' pages -> the same shape.

        Row at position p sees keys at positions max(0, p - window + 1)..p, as they are stored. Scores are softcap *
        tanh(s / softcap) where a softcap is given; then the score of a key at t gains slopes[head] * (t - p) where
        `slopes`, float32 [heads], are given (ALiBi, Press et al. 2021). Keys are taken in blocks that start at fixed
        absolute positions, so the order of sums does not depend on chunks or pages.
        """
        ...

    def bidirectional_attention(self, q: Array, k: Array, v: Array, batch: Batch, *, heads: int, scale: float) -> Array:
        """Attention of q [rows, heads * head_dim] over all rows of the same chunk -> the same shape.

        k and v are [rows, kv_heads * head_dim], kv_heads dividing heads, and stay float32: no pages. A row's result
        depends on its chunk alone.
        """
        ...

    def activate(self, x: Array, activation: Activation) -> Array:
        """The activation of each element."""
        ...

    def glu(self, gate: Array, up: Array, activation: Activation) -> Array:
        """activation(gate) * up: a gated linear unit (Shazeer 2020)."""
        ...

    def experts(
        self,
        x: Array,
        scores: Array,
        gate: Sequence[Matrix],
        up: Sequence[Matrix],
        down: Sequence[Matrix],
        batch: Batch,
        *,
        chosen: int,
        normalise: bool,
        activation: Activation,
    ) -> Array:
        """Each row's `chosen` experts, weighted and summed in the order of their numbers -> [rows, dim].

        `scores` [rows, experts] are the router's; their softmax gives an expert's weight, and the highest are chosen,
        the lower number where two are equal. With `normalise` the weights of the chosen ones are divided by their
        sum. Expert e is down[e](glu(gate[e](x), up[e](x))); one that no row has chosen is not read.
        """
        ...

    def add(self, x: Array, y: Array) -> Array:
        """x + y."""
        ...

    def scale(self, x: Array, factor: float) -> Array:
        """x * factor."""
        ...

    def softcap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap)."""
        ...

    def all_reduce(self, x: Array) -> Array:
        """The sum of all ranks' x [rows, width], added in the order of the ranks."""
        ...

    def all_gather(self, x: Array, cuts: Sequence[int]) -> Array:
        """All ranks' columns side by side -> [rows, cuts[-1]]; x has this rank's, cuts[rank]:cuts[rank + 1]."""
        ...

    def take_rows(self, x: Array, rows: Array) -> Array:
        """x[rows]."""
        ...
