"""Each op of the native set against its numpy twin, on every instruction set that runs here."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from headrace.kernels import native
from headrace.kernels.native import Limits, NativeOps
from headrace.kernels.ops import ACTIVATIONS, Activation, Batch, KVGroupBatch, RopeTable
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


@pytest.mark.parametrize("width", [1, 15, 16, 65, 576])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(ops: NativeOps, width: int, biased: bool) -> None:
    x, weight = normal(7, width, seed=width) * 3 + 5, normal(width, seed=1)
    bias = normal(width, seed=2) if biased else None
    ours = once(ops, lambda batch: ops.layer_norm(batch.hidden, weight, bias, 1e-5), x)
    assert_close(ours, TWIN.layer_norm(x, weight, bias, 1e-5), 3e-6)


def test_rms_norm_of_each_head(ops: NativeOps) -> None:
    x, weight = normal(5, 4 * 24), normal(24, seed=1)
    ours = once(ops, lambda batch: ops.rms_norm(batch.hidden, weight, 1e-6), x)
    assert_close(ours, TWIN.rms_norm(x, weight, 1e-6), 1e-6)


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotated"), [(9, 64, 64), (3, 8, 8), (2, 80, 32), (1, 128, 128), (4, 6, 4)]
)
def test_rope(ops: NativeOps, heads: int, head_dim: int, rotated: int) -> None:
    table = RopeTable((1e4 ** (-np.arange(0, rotated, 2) / rotated)).astype(np.float32), 1.25)
    x, start = normal(40, heads * head_dim), 100_000
    batch = one_chunk(40, start)
    ours = once(ops, lambda batch: ops.rope(batch.hidden, batch.positions, table, heads), x, **batch)
    assert_close(ours, TWIN.rope(x, batch["positions"], table, heads), 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [7, 100])
def test_activate(ops: NativeOps, width: int, activation: Activation) -> None:
    """By itself, and as part of the product that it feeds."""
    x, weight = normal(9, width, seed=width) * 4, normal(5, width, seed=3)
    x[0, :4] = 0, 90, -90, np.nan
    matrix = ops.pack(tensor(weight))
    ours = once(ops, lambda batch: ops.activate(batch.hidden, activation), x)
    twin = TWIN.activate(x, activation)
    assert np.array_equal(np.isnan(ours), np.isnan(twin))
    assert np.abs(ours - twin)[1:].max() <= 1e-6 * np.abs(twin[1:]).max()
    product = once(ops, lambda batch: ops.linear(ops.activate(batch.hidden, activation), matrix), x)
    assert_close(product[1:], (twin @ weight.T)[1:], 2e-6)


def test_scale_and_softcap(ops: NativeOps) -> None:
    x = normal(9, 50) * 20
    for name, number in (("scale", 0.3), ("softcap", 7.0)):
        ours = once(ops, lambda batch, name=name, number=number: getattr(ops, name)(batch.hidden, number), x)
        assert_close(ours, getattr(TWIN, name)(x, number), 1e-6)
    ours = once(ops, lambda batch: ops.add(batch.hidden, ops.scale(batch.hidden, 0.3)), x)
    assert_close(ours, x + x * np.float32(0.3), 1e-7)


def test_norm_after_a_product_with_its_residual(ops: NativeOps) -> None:
    x, weight, gain = normal(9, 50), normal(50, 50, seed=1), normal(50, seed=2)
    matrix = ops.pack(tensor(weight))

    def model(batch: Batch):
        return ops.add(batch.hidden, ops.rms_norm(ops.linear(batch.hidden, matrix), gain, 1e-5))

    assert_close(once(ops, model, x), x + TWIN.rms_norm(x @ weight.T, gain, 1e-5), 2e-6)
    program = ops.capture(model, Limits(16, 1, 4, 1, ()), hidden=50)
    assert [instruction.kind for instruction in program.instructions] == ["product", "apply"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [7, 16, 100, 300])
def test_glu_and_add(ops: NativeOps, width: int, activation: Activation) -> None:
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

    def apart(batch: Batch) -> tuple:
        return tuple(ops.rope(half, batch.positions, still, 1) for half in halves(batch))

    expected = TWIN.glu(gate, up, activation)
    for operands in (halves, apart):
        ours = once(ops, lambda b, operands=operands: ops.glu(*operands(b), activation), x)
        assert np.abs(ours - expected).max() <= 2e-6 * np.abs(expected).max()
    np.testing.assert_array_equal(once(ops, lambda b: ops.add(*apart(b)), x), gate + up)
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


def test_embed_by_position(ops: NativeOps) -> None:
    table, words = normal(20, 40), normal(9, 40, seed=1)
    matrix, tokens_matrix = ops.pack(tensor(table)), ops.pack(tensor(words))

    def model(batch: Batch):
        return ops.add(ops.embed(tokens_matrix, batch.tokens), ops.embed(matrix, batch.positions, 2))

    program = ops.capture(model, Limits(64, 8, 8, 8, ()))
    tokens = np.array([8, 0, 5], np.int32)
    ticket = program.submit(**one_chunk(3, 15) | {"tokens": tokens}, groups=[], samples=no_samples(0))
    np.testing.assert_array_equal(ticket.result()[1], words[tokens] + table[[17, 18, 19]])
    with pytest.raises(ValueError, match="position"):
        program.submit(**one_chunk(3, 16) | {"tokens": tokens}, groups=[], samples=no_samples(0))


def test_some_rows_of_a_tensor(ops: NativeOps) -> None:
    x, weight, rows = normal(3, 24), normal(40, 24, seed=1), np.array([39, 0, 7, 7, 20])
    matrix = ops.pack(tensor(weight), rows)
    assert (matrix.rows, matrix.cols) == (5, 24)
    assert_close(once(ops, lambda batch: ops.linear(batch.hidden, matrix), x), x @ weight[rows].T, 2e-6)


# Experts


@pytest.mark.parametrize("rows", [1, 2, 3, 90])
@pytest.mark.parametrize(("experts", "chosen"), [(5, 2), (16, 3), (3, 3)])
@pytest.mark.parametrize("normalise", [False, True])
def test_experts(ops: NativeOps, rows: int, experts: int, chosen: int, normalise: bool) -> None:
    x, router = normal(rows, 32, seed=rows), normal(experts, 32, seed=1)
    shapes = ((21, 32), (21, 32), (32, 21))
    weights = [[normal(*shape, seed=10 * e + i) for e in range(experts)] for i, shape in enumerate(shapes)]
    options = {"chosen": chosen, "normalise": normalise, "activation": "silu"}

    def model(ops, batch: Batch):
        gate, up, down = ([ops.pack(tensor(matrix)) for matrix in kind] for kind in weights)
        scores = ops.linear(batch.hidden, ops.pack(tensor(router)))
        return ops.experts(batch.hidden, scores, gate, up, down, batch, **options)

    nothing = np.zeros(0, np.int32)
    batch = Batch(nothing, nothing, nothing, nothing, (), x)
    expected = model(TWIN, batch)
    assert_close(once(ops, lambda batch: model(ops, batch), x), expected, 3e-6)

    program = ops.capture(lambda batch: model(ops, batch), Limits(512, 1, 4, 1, ()), hidden=32)
    ticket = program.submit(**one_chunk(rows), groups=[], samples=no_samples(0), hidden=x)
    whole = ticket.result()[1]
    assert ticket.expert_load == batch.expert_load[0].tolist()
    for row in {0, rows // 2, rows - 1}:  # alone, a row has the same bits
        alone = run(program, one_chunk(1), x[row : row + 1])
        assert alone.tobytes() == whole[row : row + 1].tobytes()


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
        self.normed, self.rotated, self.slopes = False, True, None
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
    if s.normed:
        q, k = (ops.rms_norm(x, 1 + normal(s.head_dim, seed=i) / 4, 1e-5) for i, x in enumerate((q, k)))
    if s.rotated:
        q, k = (ops.rope(x, batch.positions, ROPE, n) for x, n in ((q, s.heads), (k, s.kv_heads)))
    ops.kv_write(cache, k, v, group)
    options = {"scale": s.head_dim**-0.5, "window": window, "softcap": softcap, "slopes": s.slopes}
    return ops.attention(q, cache, batch, group, heads=s.heads, **options)


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


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("size", [1e-30, 1e-33])
def test_attention_to_tiny_values_does_not_depend_on_the_batch(ops: NativeOps, dtype: str, size: float) -> None:
    """Values that leave no room for a scale, and later ones of normal size that the first rows do not see."""
    s = Sequences([40], 3, 1, 16, 16, seed=3)
    s.rows[0][:16] *= np.float32(size)
    (whole,) = results(ops, s, [{0: range(40)}], dtype, poison=True)
    (alone,) = results(ops, s, [{0: range(i, i + 1)} for i in range(40)], dtype, poison=True)
    assert whole.tobytes() == alone.tobytes()
    assert np.abs(whole[:16]).max() <= 10 * size
    assert np.abs(whole[20:]).min(axis=1).max() > 0.01


def test_attention_sees_what_it_should(ops: NativeOps) -> None:
    """The comparison above can fail: one more key, another scale or window is far outside the bounds."""
    s = Sequences([70], 3, 1, 16, 16, seed=2)
    (right,) = expected_rows(s, "float32", 20, None)
    (ours,) = results(ops, s, [{0: range(70)}], "float32", 21)
    assert np.abs(ours - right).max() > 1e-2 * np.abs(right).max()
    (ours,) = results(ops, s, [{0: range(70)}], "float32", 20, 30.0)
    assert np.abs(ours - right).max() > 1e-3 * np.abs(right).max()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_slopes(ops: NativeOps, dtype: str) -> None:
    """ALiBi, which takes the place of a rotation."""
    s = Sequences([1, 20, 280], 6, 3, 16, 16, seed=4)
    s.rotated, s.slopes = False, np.float32(2.0) ** -np.arange(1, 7)
    steps = [{0: range(1), 1: range(17), 2: range(250)}, {2: range(250, 279), 1: range(17, 20)}, {2: range(279, 280)}]
    ours = results(ops, s, steps, dtype, poison=True)
    for mine, twin in zip(ours, expected_rows(s, dtype, None, None)):
        assert_close(mine, twin, BOUNDS[dtype])
    alone = results(ops, s, [{2: range(280)}], dtype)[2]
    assert alone.tobytes() == ours[2].tobytes()
    s.slopes = s.slopes * np.float32(1.1)
    assert np.abs(expected_rows(s, "float32", None, None)[2] - ours[2]).max() > 1e-2


@pytest.mark.parametrize("rotated", [True, False])
def test_norms_of_heads_before_attention(ops: NativeOps, rotated: bool) -> None:
    s = Sequences([1, 40, 280], 6, 3, 16, 16, seed=4)
    s.normed, s.rotated = True, rotated
    steps = [{0: range(1), 1: range(17), 2: range(250)}, {2: range(250, 279), 1: range(17, 40)}, {2: range(279, 280)}]
    ours = results(ops, s, steps, "float32", poison=True)
    for mine, twin in zip(ours, expected_rows(s, "float32", None, None)):
        assert_close(mine, twin, BOUNDS["float32"])
    alone = results(ops, s, [{2: range(280)}], "float32")[2]
    assert alone.tobytes() == ours[2].tobytes()
    kinds = [instruction.kind for instruction in native_program(ops, s, "float32", None, None).instructions]
    assert kinds == ["product", "attention"]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 12, 32), (6, 3, 20), (4, 1, 64)])
def test_bidirectional_attention(ops: NativeOps, heads: int, kv_heads: int, head_dim: int) -> None:
    lengths = [5, 1, 16, 300, 33, 64]
    cuts = np.cumsum([0, *lengths]).astype(np.int32)
    widths = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    weights = [normal(width, WIDTH, seed=i) / 3 for i, width in enumerate(widths)]
    x = normal(cuts[-1], WIDTH, seed=9)

    def model(ops, batch: Batch):
        q, k, v = (ops.linear(batch.hidden, ops.pack(tensor(weight))) for weight in weights)
        return ops.bidirectional_attention(q, k, v, batch, heads=heads, scale=0.3)

    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    places = {"positions": positions, "chunk_rows": cuts}
    nothing = np.zeros(0, np.int32)
    expected = model(TWIN, Batch(nothing, positions, cuts, nothing, (), x))
    ours = once(ops, lambda batch: model(ops, batch), x, **places)
    assert_close(ours, expected, 3e-6)
    for first, past in pairwise(cuts):  # a chunk alone has the same bits
        alone = once(ops, lambda batch: model(ops, batch), x[first:past])
        assert alone.tobytes() == ours[first:past].tobytes()
        chunk = Batch(nothing, positions[first:past], np.array([0, past - first]), nothing, (), x[first:past])
        assert model(TWIN, chunk).tobytes() == expected[first:past].tobytes()
    q, k, v = (x[: lengths[0]] @ weight.T for weight in weights)
    q, k, v = (a.reshape(lengths[0], -1, head_dim).swapaxes(0, 1) for a in (q, k, v))
    k, v = (a.repeat(heads // kv_heads, axis=0) for a in (k, v))
    shares = np.exp(0.3 * q @ k.swapaxes(1, 2))
    exact = (shares / shares.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(lengths[0], -1)
    assert_close(ours[: lengths[0]], exact, 1e-5)
