"""The op set in plain numpy, float32: the twin that every other set is tested against, and the fallback where nothing
is compiled.

A row's result is the same to the bit whatever else is in the batch. BLAS does not promise that: the sums it forms for a
row change with the number of rows and with a row's place among them. So a product here is weight [out, in] times LANES
columns of activations, always exactly that many, padded with zeros. BLAS kernels hold such columns in the lanes of
vector registers, each of which does what its neighbours do; every weight shape is checked for it once, and a shape that
fails takes one column at a time instead. Threads share out whole blocks of outputs, so their number changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ..errors import ConfigError
from .activations import activate, glu
from .ops import Activation, Batch, Group, KVGroupBatch, RopeTable

LANES = 16  # columns in every product: one AVX-512 register of float32, two of AVX2
OUTPUTS = 384  # outputs in a product, at most: its block of weights should stay in the second-level cache
BLOCK = 64  # keys that attention takes at once, from positions that are multiples of it
SCORES = 1 << 18  # float32 scores that attention holds at once: they should stay in the second-level cache
WAKE = 8_000_000  # multiply-adds that take longer than to wake another thread


@dataclass(frozen=True)
class DenseMatrix:
    """float32 [out, in]; products take its rows between successive `cuts`, and `lanes` columns, at once."""

    rows: np.ndarray
    cuts: tuple[int, ...]
    lanes: int


@dataclass(frozen=True)
class KVPlane:
    """Keys or values of one layer: codes [kv_heads, slots, head_dim], and float32 scales [kv_heads, slots] for int8."""

    codes: np.ndarray
    scales: np.ndarray | None


@dataclass(frozen=True)
class KVCache:
    """One layer's pages. Slot = page * page_size + offset; `dtype` names the storage; products take `lanes` columns."""

    keys: KVPlane
    values: KVPlane
    page_size: int
    dtype: str
    lanes: int


class ReferenceOps:
    """The reference op set: `Ops` on numpy arrays, over `threads` threads of its own.

    BLAS is told to use one thread in this process: its own threads spin, which costs milliseconds a product wherever
    other work wants a core.
    """

    name = "reference"
    default_kv_dtype = "float32"
    kv_head_multiple = 1

    def __init__(self, threads: int = 1, group: Group | None = None) -> None:
        ThreadpoolController().limit(limits=1, user_api="blas")
        self.threads, self.group = threads, group
        self._pool = ThreadPoolExecutor(max(1, threads - 1), "reference")
        self._lanes: dict[tuple[int, int], int] = {}  # by weight shape: the verdict of `_columns_agree`

    def pack(self, tensor: Any, row_order: np.ndarray | None = None, head: bool = False) -> DenseMatrix:
        rows = np.ascontiguousarray(tensor.decode(), dtype=np.float32)
        if row_order is not None:
            rows = np.ascontiguousarray(rows[row_order])
        outputs, inputs = rows.shape
        blocks = -(-outputs // OUTPUTS)
        cuts = tuple(outputs * block // blocks for block in range(blocks + 1))
        lanes = min(self._lanes_for(size, inputs) for size in {end - start for start, end in pairwise(cuts)})
        return DenseMatrix(rows, cuts, lanes)

    def vector(self, tensor: Any, row_order: np.ndarray | None = None) -> np.ndarray:
        values = np.ascontiguousarray(tensor.decode(), dtype=np.float32)
        return values if row_order is None else values[row_order]

    def _lanes_for(self, outputs: int, inputs: int) -> int:
        """LANES if products with weights of this shape are seen to treat all columns alike, else 1."""
        shape = (outputs, inputs)
        if shape not in self._lanes:
            noise = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)
            self._lanes[shape] = LANES if _columns_agree(np.resize(noise, shape)) else 1
        return self._lanes[shape]

    def kv_cache(
        self, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: str
    ) -> list[KVCache]:
        if dtype not in _STORED:
            raise ConfigError(f"unknown kv_dtype {dtype!r}; the reference set stores {', '.join(_STORED)}")

        lanes = min(self._lanes_for(BLOCK, head_dim), self._lanes_for(head_dim, BLOCK))

        def plane() -> KVPlane:
            codes = np.zeros((kv_heads, pages * page_size, head_dim), _STORED[dtype])
            return KVPlane(codes, np.zeros(codes.shape[:2], np.float32) if dtype == "int8" else None)

        return [KVCache(plane(), plane(), page_size, dtype, lanes) for _ in range(layers)]

    def copy_page(self, caches: list[KVCache], source: int, target: int) -> None:
        for cache in caches:
            old = slice(source * cache.page_size, (source + 1) * cache.page_size)
            new = slice(target * cache.page_size, (target + 1) * cache.page_size)
            for plane in (cache.keys, cache.values):
                plane.codes[:, new] = plane.codes[:, old]
                if plane.scales is not None:
                    plane.scales[:, new] = plane.scales[:, old]

    def embed(self, table: DenseMatrix, indices: np.ndarray, offset: int = 0, total: int | None = None) -> np.ndarray:
        rows = indices + offset
        if total is None:
            return table.rows[rows]
        own = (rows >= 0) & (rows < len(table.rows))
        return np.where(own[:, None], table.rows[np.where(own, rows, 0)], np.float32(0))

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        parts = x.reshape(len(x), x.shape[1] // len(weight), len(weight))
        mean = np.mean(np.square(parts), axis=-1, keepdims=True)
        return (parts / np.sqrt(mean + np.float32(eps)) * weight).reshape(x.shape)

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(np.square(centred), axis=-1, keepdims=True)
        y = centred / np.sqrt(variance + np.float32(eps)) * weight
        return y if bias is None else y + bias

    def linear(self, x: np.ndarray, weight: DenseMatrix, bias: np.ndarray | None = None) -> np.ndarray:
        y = np.empty((len(x), len(weight.rows)), np.float32)
        tiles = _pad(x, weight.lanes).reshape(-1, weight.lanes, x.shape[1])

        def product(block: int) -> None:
            outputs = slice(weight.cuts[block], weight.cuts[block + 1])
            for tile, columns in enumerate(tiles):
                part = y[tile * weight.lanes : (tile + 1) * weight.lanes, outputs]
                part[:] = (weight.rows[outputs] @ columns.T).T[: len(part)]

        self._run(product, len(weight.cuts) - 1, weight.rows.size * tiles.shape[0] * weight.lanes)
        return y if bias is None else y + bias

    def _run(self, job: Callable[[int], None], count: int, cost: int) -> None:
        """job(0) to job(count - 1), over the threads if `cost` multiply-adds repay waking them."""
        threads = min(self.threads, count) if cost >= WAKE else 1

        def share(first: int) -> None:
            for index in range(first, count, threads):
                job(index)

        others = [self._pool.submit(share, first) for first in range(1, threads)]
        share(0)
        for other in others:
            other.result()

    def rope(self, x: np.ndarray, positions: np.ndarray, table: RopeTable, heads: int) -> np.ndarray:
        angles = positions[:, None, None].astype(np.float32) * table.inv_freq
        cos, sin = np.cos(angles) * np.float32(table.scale), np.sin(angles) * np.float32(table.scale)
        half = len(table.inv_freq)
        x = x.reshape(len(x), heads, -1)
        turned = x.copy()
        first, second = x[..., :half], x[..., half : 2 * half]
        turned[..., :half] = first * cos - second * sin
        turned[..., half : 2 * half] = second * cos + first * sin
        return turned.reshape(len(x), -1)

    def kv_write(self, cache: KVCache, k: np.ndarray, v: np.ndarray, group: KVGroupBatch) -> None:
        for plane, x in ((cache.keys, k), (cache.values, v)):
            _store(plane, group.slots, x.reshape(len(x), plane.codes.shape[0], -1).swapaxes(0, 1), cache.dtype)

    def attention(
        self,
        q: np.ndarray,
        cache: KVCache,
        batch: Batch,
        group: KVGroupBatch,
        *,
        heads: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        slopes: np.ndarray | None = None,
    ) -> np.ndarray:
        out = np.zeros_like(q)
        q = q * np.float32(scale)
        for chunk, pages in enumerate(group.page_table):
            rows = slice(batch.chunk_rows[chunk], batch.chunk_rows[chunk + 1])
            seen = _gather(cache, batch.positions[rows], pages, window)
            out[rows] = self._attend(q[rows], seen, batch.positions[rows], cache.lanes, window, softcap, slopes)
        return out

    def bidirectional_attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, batch: Batch, *, heads: int, scale: float
    ) -> np.ndarray:
        head_dim = q.shape[1] // heads
        lanes = min(self._lanes_for(BLOCK, head_dim), self._lanes_for(head_dim, BLOCK))
        out = np.empty_like(q)
        q = q * np.float32(scale)
        for first, past in pairwise(batch.chunk_rows):
            rows = slice(first, past)
            keys, values = (_blocks(x[rows].reshape(past - first, -1, head_dim).swapaxes(0, 1), 0) for x in (k, v))
            last = np.full(past - first, past - first - 1, np.int32)  # every row sees as far as the last one
            out[rows] = self._attend(q[rows], (0, keys, values), last, lanes, None, None, None)
        return out

    def _attend(
        self,
        q: np.ndarray,
        seen: tuple[int, np.ndarray, np.ndarray],
        positions: np.ndarray,
        lanes: int,
        window: int | None,
        softcap: float | None,
        slopes: np.ndarray | None,
    ) -> np.ndarray:
        """Attention of a chunk's rows over what `_gather` gave. A (row, query head of a KV head) is a lane; tiles of
        lanes run in bunches."""
        first_block, keys, values = seen
        kv_heads, head_dim = keys.shape[0], keys.shape[-1]
        grouped = q.shape[1] // (kv_heads * head_dim)
        # [rows, kv_heads, grouped, head_dim] -> [lanes, kv_heads, head_dim] -> [kv_heads, tiles, 1, head_dim, lanes]
        by_lane = q.reshape(len(q), kv_heads, grouped, head_dim).swapaxes(1, 2).reshape(-1, kv_heads, head_dim)
        by_lane = _pad(by_lane, lanes)
        columns = by_lane.reshape(-1, 1, lanes, kv_heads, head_dim).transpose(3, 0, 1, 4, 2)
        # Padding lanes take the last position, so that they too see a key.
        lane_positions = np.full(len(by_lane), positions[-1], positions.dtype)
        lane_positions[: len(q) * grouped] = np.repeat(positions, grouped)
        lane_positions = lane_positions.reshape(-1, 1, 1, lanes)
        tiles = len(lane_positions)
        lane_slopes = None if slopes is None else _lane_slopes(slopes, kv_heads, len(q), lanes)
        out = np.empty((kv_heads, tiles, head_dim, lanes), np.float32)
        bunch = max(1, SCORES // (kv_heads * keys.shape[1] * BLOCK * lanes))

        def mix(index: int) -> None:
            part = slice(index * bunch, (index + 1) * bunch)
            blocks = _blocks_seen(lane_positions[part], window, first_block)
            out[:, part] = _softmax_attention(
                columns[:, part],
                keys[:, None, blocks],
                values[:, None, blocks],
                lane_positions[part],
                (first_block + blocks.start) * BLOCK,
                window,
                softcap,
                None if lane_slopes is None else lane_slopes[:, part],
            )

        self._run(mix, -(-tiles // bunch), 2 * keys.size * tiles * lanes)
        rows = out.transpose(1, 3, 0, 2).reshape(-1, kv_heads, head_dim)[: len(q) * grouped]
        return rows.reshape(len(q), grouped, kv_heads, head_dim).swapaxes(1, 2).reshape(len(q), -1)

    def activate(self, x: np.ndarray, activation: Activation) -> np.ndarray:
        return activate(x, activation)

    def glu(self, gate: np.ndarray, up: np.ndarray, activation: Activation) -> np.ndarray:
        return glu(gate, up, activation)

    def experts(
        self,
        x: np.ndarray,
        scores: np.ndarray,
        gate: Sequence[DenseMatrix],
        up: Sequence[DenseMatrix],
        down: Sequence[DenseMatrix],
        batch: Batch,
        *,
        chosen: int,
        normalise: bool,
        activation: Activation,
    ) -> np.ndarray:
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        picked = np.zeros(scores.shape, bool)
        np.put_along_axis(picked, np.argsort(-scores, axis=-1, kind="stable")[:, :chosen], True, axis=-1)
        weights = np.where(picked, weights, np.float32(0))
        if normalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        out = np.zeros((len(x), len(down[0].rows)), np.float32)
        for expert in np.flatnonzero(picked.any(axis=0)).tolist():
            rows = np.flatnonzero(picked[:, expert])
            hidden = glu(self.linear(x[rows], gate[expert]), self.linear(x[rows], up[expert]), activation)
            out[rows] += self.linear(hidden, down[expert]) * weights[rows, expert, None]
        batch.expert_load.append(picked.sum(axis=0))
        return out

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y

    def scale(self, x: np.ndarray, factor: float) -> np.ndarray:
        return x * np.float32(factor)

    def softcap(self, x: np.ndarray, cap: float) -> np.ndarray:
        return np.tanh(x / np.float32(cap)) * np.float32(cap)

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        return x if self.group is None else self.group.start(x).wait()

    def all_gather(self, x: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
        return x if self.group is None else self.group.gather(x, cuts)

    def take_rows(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return x[rows]


def _columns_agree(weight: np.ndarray) -> bool:
    """Whether a column of weight [out, in] @ [in, LANES] is the same to the bit at any place and beside any others."""
    random = np.random.default_rng(0).standard_normal((LANES, weight.shape[1]), dtype=np.float32)
    full = weight @ random.T
    moved = weight @ np.roll(random, 5, axis=0).T
    alone = np.zeros_like(random)
    alone[0] = random[0]
    same = weight @ np.repeat(random[:1], LANES, axis=0).T
    return bool(
        np.array_equal(np.roll(full, 5, axis=1), moved)
        and np.array_equal((weight @ alone.T)[:, 0], full[:, 0])
        and (same == full[:, :1]).all()
    )


def _pad(x: np.ndarray, lanes: int) -> np.ndarray:
    """x with rows of zeros after it, to a multiple of `lanes` rows."""
    padded = np.zeros((-(-len(x) // lanes) * lanes, *x.shape[1:]), np.float32)
    padded[: len(x)] = x
    return padded


def _blocks_seen(positions: np.ndarray, window: int | None, first_block: int) -> slice:
    """The blocks that any of `positions` sees, counted from `first_block`."""
    low = 0 if window is None else max(0, int(positions.min()) - window + 1)
    return slice(low // BLOCK - first_block, int(positions.max()) // BLOCK + 1 - first_block)


def _gather(
    cache: KVCache, positions: np.ndarray, pages: np.ndarray, window: int | None
) -> tuple[int, np.ndarray, np.ndarray]:
    """The first block that a chunk sees; keys and values from there on, float32 [kv_heads, blocks, BLOCK, head_dim].

    Only positions that the chunk sees are read; the rest of the first and last block is zeros, so that what other
    sequences left in a page (or a NaN in it) never meets a product.
    """
    low = 0 if window is None else max(0, int(positions[0]) - window + 1)
    end = int(positions[-1]) + 1
    first = low // BLOCK
    seen = np.arange(low, end)
    slots = pages[seen // cache.page_size].astype(np.int64) * cache.page_size + seen % cache.page_size

    before = low - first * BLOCK
    keys, values = (_blocks(_load(plane, slots, cache.dtype), before) for plane in (cache.keys, cache.values))
    return first, keys, values


def _blocks(x: np.ndarray, before: int) -> np.ndarray:
    """x [kv_heads, n, head_dim] with `before` zeros ahead of it, and behind it to whole blocks -> [kv_heads, blocks,
    BLOCK, head_dim]."""
    kv_heads, count, head_dim = x.shape
    out = np.zeros((kv_heads, -(-(before + count) // BLOCK) * BLOCK, head_dim), np.float32)
    out[:, before : before + count] = x
    return out.reshape(kv_heads, -1, BLOCK, head_dim)


def _lane_slopes(slopes: np.ndarray, kv_heads: int, rows: int, lanes: int) -> np.ndarray:
    """Slopes by query head as [kv_heads, tiles, 1, 1, lanes]."""
    grouped = slopes.reshape(kv_heads, -1)
    by_lane = _pad(np.tile(grouped.T, (rows, 1)), lanes)
    return by_lane.reshape(-1, lanes, kv_heads).transpose(2, 0, 1)[:, :, None, None]


def _softmax_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    positions: np.ndarray,
    start: int,
    window: int | None,
    softcap: float | None,
    slopes: np.ndarray | None,
) -> np.ndarray:
    """q [kv_heads, tiles, 1, head_dim, lanes] over keys and values [kv_heads, 1, blocks, BLOCK, head_dim], the first
    at position `start` -> [kv_heads, tiles, head_dim, lanes].

    Two passes: the maximum over all keys, then sums in ascending order of position, within blocks and over them. A
    block that a lane does not see adds exact zeros, so it makes no difference which lanes share a tile.
    """
    scores = keys @ q
    if softcap is not None:
        scores = np.tanh(scores / np.float32(softcap)) * np.float32(softcap)
    key_positions = (start + np.arange(keys.shape[2] * BLOCK, dtype=positions.dtype)).reshape(-1, BLOCK, 1)
    if slopes is not None:
        scores = scores + slopes * (key_positions - positions).astype(np.float32)
    hidden = key_positions > positions
    if window is not None:
        hidden |= key_positions <= positions - window
    scores = np.where(hidden, np.float32(-np.inf), scores)
    scores -= scores.max(axis=(2, 3), keepdims=True)
    weights = np.exp(scores, out=scores)
    # Sums start from +0.0: else the sign of a sum of zeros would depend on which blocks are there.
    zero = np.float32(0)
    total = weights.sum(axis=3, initial=zero).sum(axis=2, initial=zero)[:, :, None]
    mixed = (values.swapaxes(-1, -2) @ weights).sum(axis=2, initial=zero)
    return mixed / total


_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


def _store(plane: KVPlane, slots: np.ndarray, x: np.ndarray, dtype: str) -> None:
    """Round x [kv_heads, rows, head_dim] to nearest even as stored; int8 holds x / scale, scale = max |x| / 127."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x).view(np.uint32)
        plane.codes[:, slots] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    elif plane.scales is not None:
        scales = np.abs(x).max(axis=-1) / np.float32(127)
        plane.scales[:, slots] = scales
        plane.codes[:, slots] = np.rint(x / np.where(scales > 0, scales, np.float32(1))[..., None])
    else:
        plane.codes[:, slots] = x


def _load(plane: KVPlane, slots: np.ndarray, dtype: str) -> np.ndarray:
    """What is stored at `slots`, as float32 [kv_heads, len(slots), head_dim]."""
    codes = plane.codes[:, slots]
    if dtype == "bfloat16":
        return (codes.astype(np.uint32) << 16).view(np.float32)
    if plane.scales is not None:
        return codes * plane.scales[:, slots, None]
    return codes.astype(np.float32)
