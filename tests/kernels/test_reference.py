"""The numpy op set: each op against its formula in float64, and each row the same bytes in any company."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.formats.tensor import F32, Tensor
from headrace.kernels import reference
from headrace.kernels.ops import ACTIVATIONS, Activation, Batch, KVGroupBatch, RopeTable
from headrace.kernels.reference import LANES, ReferenceOps
from headrace.memory.kv import KV_FORMATS, kv_format

PAGE_SIZE = 16
PAGES = 40


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def as_tensor(values: np.ndarray) -> Tensor:
    return Tensor("w", values.shape, F32, values.reshape(-1).view(np.uint8), Path("w"))


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def ops() -> ReferenceOps:
    return ReferenceOps()


SHAPES = [(97, 120), (60, 20), (576, 576), (1536, 576), (53, 53), (1, 7), (770, 1536)]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_linear_and_its_rows_in_any_company(ops: ReferenceOps, outputs: int, inputs: int) -> None:
    weight, x, bias = random(outputs, inputs), random(70, inputs, seed=1), random(outputs, seed=2)
    packed = ops.pack(as_tensor(weight))
    whole = ops.linear(x, packed, bias)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    assert np.abs(whole - exact).max() <= 1e-6 * inputs**0.5 * np.abs(exact).max()
    for start in (0, 1, 5, 16, 33):
        for rows in (*range(1, 2 * LANES + 2), 37):
            assert same_bytes(ops.linear(x[start : start + rows], packed, bias), whole[start : start + rows])
    noisy = np.full_like(x, np.nan)
    noisy[11] = x[11]
    assert same_bytes(ops.linear(noisy, packed, bias)[11], whole[11])


def test_threads_change_nothing() -> None:
    weight, x = random(1536, 576), random(130, 576, seed=1)
    one, two = ReferenceOps(threads=1), ReferenceOps(threads=2)
    assert weight.size * len(x) > reference.WAKE
    assert same_bytes(one.linear(x, one.pack(as_tensor(weight))), two.linear(x, two.pack(as_tensor(weight))))


def test_a_shape_that_treats_columns_unlike_takes_them_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_columns_agree", lambda weight: False)
    ops = ReferenceOps()
    weight, x = random(60, 20), random(40, 20, seed=1)
    packed = ops.pack(as_tensor(weight))
    assert packed.lanes == 1
    whole = ops.linear(x, packed)
    assert np.allclose(whole, x @ weight.T, atol=1e-5)
    assert same_bytes(ops.linear(x[7:20], packed), whole[7:20])
    case = AttentionCase(ops, length=150)
    assert case.cache.lanes == 1
    assert np.allclose(case.run(), case.exact(), atol=1e-5)
    assert same_bytes(case.run(splits=(1, 2, 60, 64, 149)), case.run())


class Uneven(np.ndarray):
    """A weight whose products are summed from the other end in one column: what the check must find."""

    def __matmul__(self, columns: np.ndarray) -> Any:
        weight = self.view(np.ndarray)
        product = weight @ columns
        product[:, 3] = (weight[:, ::-1] @ columns[::-1])[:, 3]
        return product


class Leaky(np.ndarray):
    """A weight whose products let a neighbour in, by a trace."""

    def __matmul__(self, columns: np.ndarray) -> Any:
        product = self.view(np.ndarray) @ columns
        product[:, 0] += np.float32(1e-6) * product[:, 1]
        return product


def test_the_check_finds_columns_that_differ() -> None:
    weight = random(60, 120)
    assert reference._columns_agree(weight)
    assert not reference._columns_agree(weight.view(Uneven))
    assert not reference._columns_agree(weight.view(Leaky))


def test_row_order_of_matrices_and_vectors(ops: ReferenceOps) -> None:
    weight, order = random(6, 4), np.array([5, 3, 1, 0, 2, 4])
    assert same_bytes(ops.pack(as_tensor(weight), order).rows, weight[order])
    assert same_bytes(ops.vector(as_tensor(weight[:, 0].copy()), order), weight[order, 0])


def test_embed_and_take_rows(ops: ReferenceOps) -> None:
    table = random(9, 4)
    tokens = np.array([3, 3, 0, 8], np.int32)
    assert same_bytes(ops.embed(ops.pack(as_tensor(table)), tokens), table[tokens])
    assert same_bytes(ops.take_rows(table, np.array([1, 5], np.int32)), table[[1, 5]])
    assert ops.take_rows(table, np.zeros(0, np.int32)).shape == (0, 4)


def test_no_rows_give_no_logits(ops: ReferenceOps) -> None:
    weight = ops.pack(as_tensor(random(9, 4)))
    assert ops.linear(ops.rms_norm(np.zeros((0, 4), np.float32), np.ones(4, np.float32), 1e-5), weight).shape == (0, 9)


@pytest.mark.parametrize("width", [5, 120, 576, 9000])
def test_rms_norm(ops: ReferenceOps, width: int) -> None:
    x, weight = random(21, width) * 3, random(width, seed=1)
    got = ops.rms_norm(x, weight, 1e-3)
    wide = x.astype(np.float64)
    assert np.allclose(got, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * weight, rtol=2e-6, atol=1e-6)
    for row in range(21):
        assert same_bytes(ops.rms_norm(x[row : row + 1], weight, 1e-3), got[row : row + 1])


@pytest.mark.parametrize(("head_dim", "rotated"), [(20, 20), (64, 64), (20, 12)])
def test_rope(ops: ReferenceOps, head_dim: int, rotated: int) -> None:
    inv_freq = (1e4 ** (-np.arange(0, rotated, 2) / rotated)).astype(np.float32)
    x = random(9, 3 * head_dim)
    positions = np.array([0, 1, 2, 77, 1000, 8191, 65535, 131071, 5], np.int32)
    got = ops.rope(x, positions, RopeTable(inv_freq, 1.25), heads=3)
    heads = x.reshape(9, 3, head_dim).astype(np.float64)
    half = rotated // 2
    # The angle is a float32 product, as it is in the checkpoints' own code; what follows is exact.
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)[:, None]
    turned = (heads[..., :half] + 1j * heads[..., half:rotated]) * np.exp(1j * angles) * 1.25
    expected = np.concatenate([turned.real, turned.imag, heads[..., rotated:]], axis=-1).reshape(9, -1)
    assert np.allclose(got, expected, atol=2e-6)
    for row in range(9):
        alone = ops.rope(x[row : row + 1], positions[row : row + 1], RopeTable(inv_freq, 1.25), heads=3)
        assert same_bytes(alone, got[row : row + 1])


EXACT = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_glu_and_add(ops: ReferenceOps, activation: Activation) -> None:
    gate, up = random(33, 53) * 5, random(33, 53, seed=1)
    gate[0, :4] = (200, -200, 0, -0.0)
    exact = EXACT[activation](gate.astype(np.float64))
    assert np.allclose(ops.activate(gate, activation), exact, rtol=1e-6, atol=1e-6)
    got = ops.glu(gate, up, activation)
    assert same_bytes(got, ops.activate(gate, activation) * up)
    for row in range(33):
        assert same_bytes(ops.glu(gate[row : row + 1], up[row : row + 1], activation), got[row : row + 1])
    assert same_bytes(ops.add(gate, up), gate + up)


@pytest.mark.parametrize("width", [5, 120, 9000])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(ops: ReferenceOps, width: int, biased: bool) -> None:
    x, weight = random(21, width) * 3 + 5, random(width, seed=1)
    bias = random(width, seed=2) if biased else None
    got = ops.layer_norm(x, weight, bias, 1e-3)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * weight + (0 if bias is None else bias)
    assert np.allclose(got, exact, rtol=2e-6, atol=2e-5)
    for row in range(21):
        assert same_bytes(ops.layer_norm(x[row : row + 1], weight, bias, 1e-3), got[row : row + 1])


def test_rms_norm_of_parts(ops: ReferenceOps) -> None:
    x, weight = random(7, 60), random(20, seed=1)
    parts = [ops.rms_norm(x[:, i : i + 20], weight, 1e-5) for i in (0, 20, 40)]
    assert np.allclose(ops.rms_norm(x, weight, 1e-5), np.concatenate(parts, axis=1), rtol=1e-6)


def test_experts(ops: ReferenceOps) -> None:
    """Against each row's own experts in float64; what nobody chose is not read."""
    x, scores = random(13, 20), random(13, 6, seed=1) * 2
    scores[:, 4] = -50  # nobody's choice
    scores[2, :2] = 9  # equal: the first of two comes first
    shapes = ((11, 20), (11, 20), (20, 11))
    weights = [[random(*shape, seed=10 * e + i) for e in range(6)] for i, shape in enumerate(shapes)]
    matrices = [[ops.pack(as_tensor(matrix)) for matrix in kind] for kind in weights]
    for kind in matrices:
        kind[4] = None
    nothing = np.zeros(0, np.int32)
    for normalise in (False, True):
        batch = Batch(nothing, nothing, nothing, nothing, ())
        options = {"chosen": 2, "normalise": normalise, "activation": "silu"}
        got = ops.experts(x, scores, *matrices, batch, **options)
        shares = np.exp(scores.astype(np.float64))
        shares /= shares.sum(-1, keepdims=True)
        for row in range(13):
            best = sorted(range(6), key=lambda e: (-scores[row, e], e))[:2]
            own = shares[row, best] / (shares[row, best].sum() if normalise else 1)
            exact = np.zeros(20)
            for share, e in zip(own, best):
                gate, up = (weights[i][e].astype(np.float64) @ x[row] for i in (0, 1))
                exact += share * (weights[2][e].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up))
            assert np.allclose(got[row], exact, atol=1e-4)
            alone = ops.experts(x[row : row + 1], scores[row : row + 1], *matrices, batch, **options)
            assert same_bytes(alone, got[row : row + 1])
        assert batch.expert_load[0].sum() == 26 and batch.expert_load[0][4] == 0


class AttentionCase:
    """One sequence's queries, keys and values, and ways to run them in steps."""

    def __init__(
        self,
        ops: ReferenceOps,
        length: int,
        heads: int = 6,
        kv_heads: int = 3,
        head_dim: int = 20,
        window: int | None = None,
        softcap: float | None = None,
        dtype: str = "float32",
        slopes: np.ndarray | None = None,
    ) -> None:
        self.ops, self.length, self.heads, self.kv_heads, self.head_dim = ops, length, heads, kv_heads, head_dim
        self.q = random(length, heads * head_dim, seed=1)
        self.k = random(length, kv_heads * head_dim, seed=2)
        self.v = random(length, kv_heads * head_dim, seed=3)
        self.settings: dict[str, Any] = {"heads": heads, "scale": 0.3, "window": window, "softcap": softcap}
        self.settings["slopes"] = slopes
        self.cache = ops.kv_cache(1, PAGES, PAGE_SIZE, kv_heads, head_dim, dtype)[0]
        for plane in (self.cache.keys, self.cache.values):  # what is never written must never be read
            plane.codes[:] = np.nan if plane.codes.dtype.kind == "f" else 127
        self.pages = list(range(1, PAGES))

    def run(self, splits: tuple[int, ...] = ()) -> np.ndarray:
        cuts = [0, *splits, self.length]
        return np.concatenate([self.step([(a, b)]) for a, b in pairwise(cuts)])

    def step(self, spans: list[tuple[int, int]]) -> np.ndarray:
        rows = np.concatenate([np.arange(a, b) for a, b in spans])
        table = np.array([self.pages] * len(spans), np.int32)
        slots = table[0][rows // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + rows % PAGE_SIZE
        group = KVGroupBatch(slots, table)
        chunk_rows = np.cumsum([0, *(b - a for a, b in spans)]).astype(np.int32)
        batch = Batch(rows, rows.astype(np.int32), chunk_rows, rows, (group,))
        self.ops.kv_write(self.cache, self.k[rows], self.v[rows], group)
        return self.ops.attention(self.q[rows], self.cache, batch, group, **self.settings)

    def exact(self) -> np.ndarray:
        """Dense attention in float64, one head and row at a time."""
        q, k, v = (
            x.astype(np.float64).reshape(self.length, -1, self.head_dim).swapaxes(0, 1)
            for x in (self.q, self.k, self.v)
        )
        out = np.empty((self.length, self.heads, self.head_dim))
        for head in range(self.heads):
            own = head // (self.heads // self.kv_heads)
            for row in range(self.length):
                low = 0 if self.settings["window"] is None else max(0, row - self.settings["window"] + 1)
                scores = k[own, low : row + 1] @ q[head, row] * self.settings["scale"]
                if self.settings["softcap"] is not None:
                    scores = np.tanh(scores / self.settings["softcap"]) * self.settings["softcap"]
                if self.settings["slopes"] is not None:
                    scores = scores + self.settings["slopes"][head] * np.arange(low - row, 1)
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ v[own, low : row + 1] / weights.sum()
        return out.reshape(self.length, -1)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shape", [(6, 3, 20), (9, 3, 64), (4, 4, 8), (5, 1, 10)])
def test_attention(ops: ReferenceOps, window: int | None, softcap: float | None, shape: tuple[int, int, int]) -> None:
    case = AttentionCase(ops, 150, *shape, window=window, softcap=softcap)
    whole = case.run()
    assert np.allclose(whole, case.exact(), atol=2e-6)
    for splits in ((1,), (63, 64, 65), (149,), tuple(range(7, 150, 7))):
        assert same_bytes(case.run(splits), whole)
    case.pages = np.random.default_rng(5).permutation(np.arange(1, PAGES)).tolist()
    assert same_bytes(case.run((40,)), whole)


@pytest.mark.parametrize("shape", [(6, 3, 20), (5, 1, 10)])
def test_slopes(ops: ReferenceOps, shape: tuple[int, int, int]) -> None:
    case = AttentionCase(ops, 150, *shape, slopes=np.float32(2.0) ** -np.arange(1, shape[0] + 1))
    whole = case.run()
    assert np.allclose(whole, case.exact(), atol=2e-6)
    assert same_bytes(case.run((1, 63, 64, 65)), whole)


@settings(max_examples=25, deadline=None)
@given(splits=st.sets(st.integers(1, 299)), window=st.none() | st.integers(1, 310), seed=st.integers(0, 99))
def test_attention_in_any_chunks_on_any_pages(splits: set[int], window: int | None, seed: int) -> None:
    case = AttentionCase(ReferenceOps(), 300, 4, 2, 8, window=window)
    whole = case.run()
    case.pages = np.random.default_rng(seed).permutation(np.arange(1, PAGES)).tolist()
    assert same_bytes(case.run(tuple(sorted(splits))), whole)


def test_chunks_of_one_batch_do_not_meet(ops: ReferenceOps) -> None:
    """Spans of one sequence as chunks of one step: each sees the keys before it, as if it had run alone."""
    case = AttentionCase(ops, 150)
    whole = case.run()
    spans = [(100, 150), (0, 1), (3, 90)]
    rows = np.concatenate([np.arange(a, b) for a, b in spans])
    assert same_bytes(case.step(spans), whole[rows])


@pytest.mark.parametrize("dtype", KV_FORMATS)
def test_kv_formats(ops: ReferenceOps, dtype: str) -> None:
    bound = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127}[dtype]
    case = AttentionCase(ops, 150, dtype=dtype)
    whole = case.run((30,))
    assert same_bytes(case.run((1, 64, 100)), whole)
    assert np.abs(whole - case.exact()).max() <= 10 * bound + 2e-6
    stored = reference._gather(case.cache, np.arange(150), np.array(case.pages), None)[1].reshape(3, -1, 20)[:, :150]
    keys = case.k.reshape(150, 3, 20).swapaxes(0, 1)
    scale = np.abs(keys).max(-1, keepdims=True) if dtype == "int8" else np.abs(keys)
    assert (np.abs(stored - keys) <= bound * scale * (1 + 1e-6)).all()
    planes = (case.cache.keys, case.cache.values)
    nbytes = sum(plane.codes.nbytes + (0 if plane.scales is None else plane.scales.nbytes) for plane in planes)
    assert nbytes == PAGES * PAGE_SIZE * kv_format(dtype).token_bytes(1, 3, 20)


def test_int8_of_zeros_is_zero(ops: ReferenceOps) -> None:
    case = AttentionCase(ops, 5, dtype="int8")
    case.k[:], case.v[:] = 0, 0
    assert not case.run().any()


def test_an_unknown_kv_format_is_refused(ops: ReferenceOps) -> None:
    with pytest.raises(ConfigError, match=r"int4.*bfloat16"):
        ops.kv_cache(1, 2, 16, 1, 8, "int4")
    with pytest.raises(ConfigError, match=r"int4.*bfloat16"):
        kv_format("int4")


@pytest.mark.parametrize("dtype", KV_FORMATS)
def test_copy_page(ops: ReferenceOps, dtype: str) -> None:
    case = AttentionCase(ops, 40, dtype=dtype)
    whole = case.run()
    ops.copy_page([case.cache], source=2, target=30)
    case.pages[1] = 30
    assert same_bytes(case.step([(39, 40)]), whole[39:])
