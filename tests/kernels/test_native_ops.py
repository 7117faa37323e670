"""Each op of the native set against its numpy twin, on every instruction set that runs here."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.kernels import native
from headrace.kernels.native import Limits, NativeOps
from headrace.kernels.ops import Batch, KVGroupBatch, RopeTable
from headrace.kernels.reference import ReferenceOps

from .replay import columns, no_samples, once, one_chunk, run, tensor

if native.missing() is not None:
    pytest.skip(f"the native kernels are not built: {native.missing()}", allow_module_level=True)

ISAS = native._native.supported_isas
TWIN = ReferenceOps()


@pytest.fixture(scope="module", params=ISAS)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(threads=2, isa=request.param)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_close(ours: np.ndarray, twin: np.ndarray, bound: float) -> None:
    assert ours.shape == twin.shape
    assert np.abs(ours - twin).max() <= bound * np.abs(twin).max()


@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 576, 1000])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_rms_norm(ops: NativeOps, rows: int, width: int) -> None:
    x, weight = normal(rows, width, seed=width) * 3, normal(width, seed=1)
    ours = once(ops, lambda batch: ops.rms_norm(batch.hidden, weight, 1e-5), x)
    assert_close(ours, TWIN.rms_norm(x, weight, 1e-5), 1e-6)


def test_rms_norm_of_each_head(ops: NativeOps) -> None:
    x, weight = normal(5, 4 * 24), normal(24, seed=1)
    ours = once(ops, lambda batch: ops.rms_norm(batch.hidden, weight, 1e-6), x)
    assert_close(ours, TWIN.rms_norm(x.reshape(5, 4, 24), weight, 1e-6).reshape(5, -1), 1e-6)


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotated"), [(9, 64, 64), (3, 8, 8), (2, 80, 32), (1, 128, 128), (4, 6, 4)]
)
def test_rope(ops: NativeOps, heads: int, head_dim: int, rotated: int) -> None:
    table = RopeTable((1e4 ** (-np.arange(0, rotated, 2) / rotated)).astype(np.float32), 1.25)
    x, start = normal(40, heads * head_dim), 100_000
    batch = one_chunk(40, start)
    ours = once(ops, lambda batch: ops.rope(batch.hidden, batch.positions, table, heads), x, **batch)
    assert_close(ours, TWIN.rope(x, batch["positions"], table, heads), 1e-6)


@pytest.mark.parametrize("width", [7, 16, 100, 300])
def test_silu_mul_and_add(ops: NativeOps, width: int) -> None:
    x = normal(9, 2 * width, seed=width) * 8
    x[0, :4] = 0, 90, -90, -1e4
    gate, up = x[:, :width], x[:, width:]

    def halves(batch: Batch) -> tuple:
        return (
            columns(ops, batch.hidden, 0, width, 2 * width),
            columns(ops, batch.hidden, width, 2 * width, 2 * width),
        )

    # Rotating nothing keeps the two products apart from what reads them, so that the plain op runs, not the fused one.
    still = RopeTable(np.zeros(1, np.float32))

    def plain(batch: Batch, op: str):
        first, second = halves(batch)
        return getattr(ops, op)(ops.rope(first, batch.positions, still, 1), ops.rope(second, batch.positions, still, 1))

    expected = TWIN.silu_mul(gate, up)
    for ours in (once(ops, lambda b: ops.silu_mul(*halves(b)), x), once(ops, lambda b: plain(b, "silu_mul"), x)):
        assert np.abs(ours - expected).max() <= 2e-6 * np.abs(expected).max()
    np.testing.assert_array_equal(once(ops, lambda b: plain(b, "add"), x), gate + up)
    np.testing.assert_array_equal(once(ops, lambda b: ops.add(*halves(b)), x), gate + up)


def test_take_rows(ops: NativeOps) -> None:
    x, rows = normal(50, 33), np.array([0, 7, 8, 49], np.int32)
    ours = once(ops, lambda batch: ops.take_rows(batch.hidden, batch.logit_rows), x, logit_rows=rows)
    np.testing.assert_array_equal(ours, x[rows])


def test_embed(ops: NativeOps) -> None:
    table = normal(97, 40)
    matrix = ops.pack(tensor(table))
    program = ops.capture(lambda batch: ops.embed(matrix, batch.tokens), Limits(64, 8, 8, 8, ()))
    tokens = np.array([96, 0, 5, 5, 17], np.int32)
    ticket = program.submit(**one_chunk(5) | {"tokens": tokens}, groups=[], samples=no_samples(0))
    np.testing.assert_array_equal(ticket.result()[1], table[tokens])


@pytest.mark.parametrize("rows", [1, 2, 3, 40, 300])
def test_linear_norm_bias_and_residual(ops: NativeOps, rows: int) -> None:
    """All that a product absorbs, with float32 weights: norm, gathering, bias, residual."""
    x, gain, bias = normal(rows, 48, seed=rows), normal(48, seed=1), normal(37, seed=2)
    first, second = normal(37, 48, seed=3), normal(48, 37, seed=4)
    a, b = ops.pack(tensor(first)), ops.pack(tensor(second))

    def model(batch: Batch):
        return ops.add(batch.hidden, ops.linear(ops.linear(ops.rms_norm(batch.hidden, gain, 1e-5), a, bias), b))

    expected = x + (TWIN.rms_norm(x, gain, 1e-5) @ first.T + bias) @ second.T
    assert_close(once(ops, model, x), expected, 2e-6)


# Attention


WIDTH = 24


class Sequences:
    """Random rows of some sequences, weights that make q, k and v of them, and their pages in a shuffled pool."""

    def __init__(self, lengths: list[int], heads: int, kv_heads: int, head_dim: int, page_size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.lengths, self.heads, self.kv_heads, self.head_dim = lengths, heads, kv_heads, head_dim
        self.page_size = page_size
        widths = [n * head_dim for n in (heads, kv_heads, kv_heads)]
        self.weights = [rng.standard_normal((width, WIDTH), dtype=np.float32) / WIDTH**0.5 for width in widths]
        self.rows = [rng.standard_normal((n, WIDTH), dtype=np.float32) for n in lengths]
        counts = [-(-n // page_size) for n in lengths]
        self.pages = 1 + sum(counts) + 3
        ids = rng.permutation(np.arange(1, self.pages))
        self.tables = np.zeros((len(lengths), max(counts)), np.int32)
        for table, count, first in zip(self.tables, counts, np.cumsum([0, *counts])):
            table[:count] = ids[first : first + count]

    def step(self, ranges: dict[int, range]) -> tuple[dict[str, np.ndarray], np.ndarray, KVGroupBatch]:
        """Chunks: positions `ranges[s]` of sequence s."""
        order = list(ranges)
        positions = np.concatenate([np.array(ranges[s], np.int32) for s in order])
        of_row = np.concatenate([np.full(len(ranges[s]), s) for s in order])
        batch = one_chunk(len(positions)) | {
            "positions": positions,
            "chunk_rows": np.cumsum([0, *(len(ranges[s]) for s in order)]).astype(np.int32),
        }
        pages = self.tables[of_row, positions // self.page_size].astype(np.int64)
        hidden = np.concatenate([self.rows[s][ranges[s].start : ranges[s].stop] for s in order])
        return batch, hidden, KVGroupBatch(pages * self.page_size + positions % self.page_size, self.tables[order])


ROPE = RopeTable((1e4 ** (-np.arange(0, 8, 2) / 8)).astype(np.float32))


def attend(ops, cache, batch: Batch, s: Sequences, window: int | None, softcap: float | None):
    q, k, v = (ops.linear(batch.hidden, ops.pack(tensor(weight))) for weight in s.weights)
    group = batch.groups[0]
    ops.kv_write(cache, ops.rope(k, batch.positions, ROPE, s.kv_heads), v, group)
    q = ops.rope(q, batch.positions, ROPE, s.heads)
    return ops.attention(q, cache, batch, group, heads=s.heads, scale=s.head_dim**-0.5, window=window, softcap=softcap)


def native_program(ops: NativeOps, s: Sequences, dtype: str, window: int | None, softcap: float | None):
    (cache,) = ops.kv_cache(1, s.pages, s.page_size, s.kv_heads, s.head_dim, dtype)
    limits = Limits(2048, 1, 64, 1, (s.pages,))
    return ops.capture(lambda batch: attend(ops, cache, batch, s, window, softcap), limits, hidden=WIDTH)


def results(
    ops: NativeOps,
    s: Sequences,
    steps: list[dict[int, range]],
    dtype="bfloat16",
    window=None,
    softcap=None,
    poison=False,
):
    """Attention's rows of each sequence, all its positions, computed in the given steps."""
    program = native_program(ops, s, dtype, window, softcap)
    if poison:  # leave NaNs in every page
        pages = np.concatenate([table[table > 0] for table in s.tables])
        slots = (pages[:, None].astype(np.int64) * s.page_size + np.arange(s.page_size)).ravel()
        rows = np.full((len(slots), WIDTH), np.nan, np.float32)
        run(program, one_chunk(len(slots)), rows, [KVGroupBatch(slots, pages[None])])
    out = [np.full((n, s.heads * s.head_dim), np.nan, np.float32) for n in s.lengths]
    for ranges in steps:
        batch, hidden, group = s.step(ranges)
        rows = run(program, batch, hidden, [group])
        for (sequence, positions), first in zip(ranges.items(), batch["chunk_rows"]):
            out[sequence][positions.start : positions.stop] = rows[first : first + len(positions)]
    return out


def expected_rows(s: Sequences, dtype: str, window: int | None, softcap: float | None) -> list[np.ndarray]:
    (cache,) = TWIN.kv_cache(1, s.pages, s.page_size, s.kv_heads, s.head_dim, dtype)
    out = []
    for sequence, n in enumerate(s.lengths):
        batch, hidden, group = s.step({sequence: range(n)})
        whole = Batch(np.zeros(0), batch["positions"], batch["chunk_rows"], np.zeros(0), (group,), hidden)
        out.append(attend(TWIN, cache, whole, s, window, softcap))
    return out


# Rotated keys differ in the last bit of float32, which may fall on either side where a narrower type rounds.
BOUNDS = {"float32": 3e-6, "float16": 5e-4, "bfloat16": 2e-2, "int8": 2e-2}

SHAPES = [  # heads, kv_heads, head_dim, page_size
    (9, 3, 64, 32),
    (4, 4, 8, 16),
    (8, 1, 80, 48),
    (30, 1, 16, 16),
    (3, 1, 22, 64),
    (2, 2, 128, 16),
]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(ops: NativeOps, shape: tuple[int, int, int, int], dtype: str) -> None:
    s = Sequences([1, 20, 280], *shape, seed=sum(shape))
    steps = [{0: range(1), 1: range(17), 2: range(250)}, {2: range(250, 279), 1: range(17, 20)}, {2: range(279, 280)}]
    for window, softcap in ((None, None), (33, 5.0)):
        ours = results(ops, s, steps, dtype, window, softcap, poison=True)
        for mine, twin in zip(ours, expected_rows(s, dtype, window, softcap)):
            assert_close(mine, twin, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("window", [None, 100])
def test_attention_does_not_depend_on_the_batch(ops: NativeOps, dtype: str, window: int | None) -> None:
    """The same bits for any chunks, batch, pages and number of threads."""
    lengths = [600, 33, 290]
    s = Sequences(lengths, 6, 2, 32, 16, seed=5)
    whole = results(ops, s, [{i: range(n)} for i, n in enumerate(lengths)], dtype, window)
    rng = np.random.default_rng(1)
    for page_size, other, most in (
        (16, ops, 1),
        (64, ops, 90),
        (32, NativeOps(3, ops.isa), 200),
        (48, NativeOps(1, ops.isa), 7),
    ):
        moved = Sequences(lengths, 6, 2, 32, page_size, seed=5)
        moved.rows, moved.weights = s.rows, s.weights
        done, steps = [0, 0, 0], []
        while done != lengths:
            ranges = {}
            for i in rng.permutation(3):
                count = min(lengths[i] - done[i], int(rng.integers(1, most + 1)))
                if count:
                    ranges[int(i)] = range(done[i], done[i] + count)
                    done[i] += count
            steps.append(ranges)
        ours = results(other, moved, steps, dtype, window, poison=page_size == 64)
        for mine, theirs in zip(ours, whole):
            assert mine.tobytes() == theirs.tobytes()


def test_attention_sees_what_it_should(ops: NativeOps) -> None:
    """The comparison above can fail: one more key, another scale or window is far outside the bounds."""
    s = Sequences([70], 3, 1, 16, 16, seed=2)
    (right,) = expected_rows(s, "float32", 20, None)
    (ours,) = results(ops, s, [{0: range(70)}], "float32", 21)
    assert np.abs(ours - right).max() > 1e-2 * np.abs(right).max()
    (ours,) = results(ops, s, [{0: range(70)}], "float32", 20, 30.0)
    assert np.abs(ours - right).max() > 1e-3 * np.abs(right).max()
