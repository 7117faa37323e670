"""Recording, fusion and replay: a small random model against the numpy set, queued steps, late tokens, sampling."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from headrace.errors import ConfigError
from headrace.formats.tensor import TENSOR_TYPES, Tensor
from headrace.kernels import native
from headrace.kernels.native import BROKEN_LOGITS, Limits, NativeOps, logits_spec, sample_spec
from headrace.kernels.ops import SCREENED_ROWS, Batch, KVGroupBatch, RopeTable
from headrace.kernels.reference import ReferenceOps
from headrace.processes import threads
from headrace.sampling import sample
from headrace.types import SamplingParams

from .replay import no_samples, tensor

if native.missing() is not None:
    pytest.skip(f"the native kernels are not built: {native.missing()}", allow_module_level=True)

ISAS = native._native.supported_isas
VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, PAGE = 97, 24, 3, 1, 8, 40, 2, 16
ROPE = RopeTable((1e3 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32))
LIMITS = Limits(rows=128, logits=128, chunks=8, sequences=8, pages=(6,))


def q8_0(source: np.ndarray, rows: int, cols: int) -> Tensor:
    return Tensor("w", (rows, cols), TENSOR_TYPES["Q8_0"], source, Path("test"))


def weights(ops) -> dict:
    rng = np.random.default_rng(11)

    def matrix(rows: int, cols: int):
        return ops.pack(tensor(rng.standard_normal((rows, cols), dtype=np.float32) / np.sqrt(cols)))

    def layer() -> dict:
        shapes = {
            "q": (HEADS * HEAD_DIM, DIM),
            "k": (KV_HEADS * HEAD_DIM, DIM),
            "v": (KV_HEADS * HEAD_DIM, DIM),
            "o": (DIM, HEADS * HEAD_DIM),
            "gate": (FFN, DIM),
            "up": (FFN, DIM),
            "down": (DIM, FFN),
        }
        norms = {name: 1 + rng.standard_normal(DIM, dtype=np.float32) / 8 for name in ("norm", "mlp_norm")}
        return {name: matrix(*shape) for name, shape in shapes.items()} | norms

    table = matrix(VOCAB, DIM)
    return {"table": table, "norm": np.ones(DIM, np.float32), "layers": [layer() for _ in range(LAYERS)]}


def forward(ops, w: dict, batch: Batch, caches: list):
    x = ops.embed(w["table"], batch.tokens)
    for layer, cache in zip(w["layers"], caches):
        normed = ops.rms_norm(x, layer["norm"], 1e-5)
        q = ops.rope(ops.linear(normed, layer["q"]), batch.positions, ROPE, HEADS)
        k = ops.rope(ops.linear(normed, layer["k"]), batch.positions, ROPE, KV_HEADS)
        ops.kv_write(cache, k, ops.linear(normed, layer["v"]), batch.groups[0])
        options = {"heads": HEADS, "scale": 0.3, "window": None, "softcap": None}
        mixed = ops.attention(q, cache, batch, batch.groups[0], **options)
        x = ops.add(x, ops.linear(mixed, layer["o"]))
        normed = ops.rms_norm(x, layer["mlp_norm"], 1e-5)
        hidden = ops.glu(ops.linear(normed, layer["gate"]), ops.linear(normed, layer["up"]), "silu")
        x = ops.add(x, ops.linear(hidden, layer["down"]))
    x = ops.rms_norm(ops.take_rows(x, batch.logit_rows), w["norm"], 1e-5)
    return ops.linear(x, w["table"])


@dataclass
class Model:
    ops: NativeOps
    program: native.NativeProgram
    pages: int = 6  # of a sequence

    def step(self, chunks: list[tuple[int, int, list[int]]], samples: list | None = None):
        """Queue chunks (sequence, start, tokens). Sequence s has pages 1 + pages * s and on. No samples: all logits."""
        tokens = np.array([t for _, _, own in chunks for t in own], np.int32)
        counts = [len(own) for _, _, own in chunks]
        ends = np.cumsum(counts)
        positions = np.concatenate([np.arange(start, start + n) for (_, start, _), n in zip(chunks, counts)]).astype(
            np.int32
        )
        table = np.array([1 + self.pages * s + np.arange(self.pages) for s, _, _ in chunks], np.int32)
        of_row = np.repeat(np.arange(len(chunks)), counts)
        slots = table[of_row, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
        rows = np.arange(len(tokens), dtype=np.int32) if samples is None else (ends - 1).astype(np.int32)
        specs = np.array([logits_spec()] * len(rows) if samples is None else samples, native.SAMPLE)
        chunk_rows = np.array([0, *ends], np.int32)
        return self.program.submit(tokens, positions, chunk_rows, rows, [KVGroupBatch(slots, table)], specs)

    def logits(self, chunks: list[tuple[int, int, list[int]]]) -> np.ndarray:
        return self.step(chunks).result()[1].copy()


def build(isa: str, threads: int = 2, dtype: str = "float32") -> Model:
    ops = NativeOps(threads, isa)
    w = weights(ops)
    caches = ops.kv_cache(LAYERS, 49, PAGE, KV_HEADS, HEAD_DIM, dtype)
    return Model(ops, ops.capture(lambda batch: forward(ops, w, batch, caches), LIMITS))


@pytest.fixture(params=ISAS)
def model(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


def twin_logits(tokens: list[int]) -> np.ndarray:
    ops = ReferenceOps()
    caches = ops.kv_cache(LAYERS, 7, PAGE, KV_HEADS, HEAD_DIM, "float32")
    positions = np.arange(len(tokens), dtype=np.int32)
    table = np.arange(1, 7, dtype=np.int32)[None]
    slots = table[0, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
    batch = Batch(np.array(tokens), positions, np.array([0, len(tokens)]), positions, (KVGroupBatch(slots, table),))
    return forward(ops, weights(ops), batch, caches)


TOKENS = np.random.default_rng(5).integers(0, VOCAB, 60).tolist()


def test_model_against_the_numpy_set(model: Model) -> None:
    ours, twin = model.logits([(0, 0, TOKENS)]), twin_logits(TOKENS)
    assert np.abs(ours - twin).max() < 2e-5 * np.abs(twin).max()


def test_fusion_joins_what_it_should() -> None:
    layer = ("product", "attention", "product", "gated", "product")
    assert tuple(i.kind for i in build(ISAS[0]).program.instructions) == ("embed", *layer * LAYERS, "head")


def test_a_value_read_twice_is_kept(model: Model) -> None:
    """Nothing is absorbed that something else reads, and no slot is used again too early."""
    ops, rng = NativeOps(2, model.ops.isa), np.random.default_rng(1)
    gain, a, b = rng.standard_normal((3, 16), dtype=np.float32)[0], *rng.standard_normal((2, 16, 16), dtype=np.float32)

    def net(ops, x):
        wa, wb = ops.pack(tensor(a)), ops.pack(tensor(b))
        normed = ops.rms_norm(x, gain, 1e-5)
        product = ops.linear(normed, wa)
        gated = ops.glu(product, ops.linear(normed, wb), "silu")
        total = ops.add(ops.add(x, product), ops.linear(gated, wb))
        return ops.add(ops.add(total, normed), ops.add(gated, x))

    x = rng.standard_normal((20, 16), dtype=np.float32)
    program = ops.capture(lambda batch: net(ops, batch.hidden), Limits(64, 1, 4, 1, ()), hidden=16)
    empty = np.zeros(0, np.int32)
    batch = (empty, np.arange(20, dtype=np.int32), np.array([0, 20], np.int32), empty)
    ours = program.submit(*batch, [], no_samples(0), hidden=x).result()[1]
    expected = net(ReferenceOps(), x)
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_logits_do_not_depend_on_the_batch(model: Model, threads: int, dtype: str) -> None:
    whole = build(model.ops.isa, 1, dtype).logits([(0, 0, TOKENS)])
    other = build(model.ops.isa, threads, dtype)
    other.ops._pool.distance = 1  # with 5 rows a thread, each takes its own
    other.logits([(3, 0, TOKENS[7:40])])
    parts = [
        other.logits([(1, 0, TOKENS[:33]), (2, 0, TOKENS[5:9])])[:33],
        other.logits([(2, 4, [1]), (1, 33, TOKENS[33:34]), (3, 33, [2])])[1:2],
        other.logits([(2, 5, [1, 2, 3]), (1, 34, TOKENS[34:])])[3:],
    ]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert other.logits([(4, 0, TOKENS)]).tobytes() == whole.tobytes()
    mixed = other.logits([(5, 0, TOKENS[:1]), (6, 0, TOKENS[:25]), (7, 0, TOKENS[:30])])
    assert mixed[26:].tobytes() == whole[:30].tobytes() and mixed[1:26].tobytes() == whole[:25].tobytes()


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(("distance", "least"), [(0.0, 24), (1.0, 5)])
def test_threads_that_are_far_from_each_other_work_apart_sooner(threads: int, distance: float, least: int) -> None:
    whole, model = build(ISAS[0], 1).logits([(0, 0, TOKENS)]), build(ISAS[0], threads)
    model.ops._pool.distance = distance
    for rows in (least * threads - 1, least * threads):
        first, second = rows // 2, rows - rows // 2
        ticket = model.step([(1, 0, TOKENS[:first]), (2, 0, TOKENS[:second])])
        assert ticket.result()[1].tobytes() == whole[:first].tobytes() + whole[:second].tobytes()
        assert ticket.apart == (rows == least * threads)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_step_that_begins_without_the_first_thread(threads: int, rows: int) -> None:
    """A step behind another, with no core left for the host: its logits have the same bytes, and are all there."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    try:
        model = build(ISAS[0], threads)
    finally:
        os.sched_setaffinity(0, cores)
    model.ops._pool.distance = 1
    chunk, before = [(0, 60 - rows, TOKENS[60 - rows :])], [(0, 0, TOKENS), (1, 0, TOKENS)]
    model.logits(before)
    alone = model.logits(chunk)
    led = 0
    for turn in range(200):
        first = model.step(before)
        behind = model.step(chunk)
        if turn % 2:  # the host is busy with the first step's result; else it may rest before anything was led
            first.result()
            time.sleep(0.001)
        assert behind.result()[1].tobytes() == alone.tobytes()
        led += behind.led > 0
    assert led > 0


def test_a_thread_with_few_rows_of_a_step_that_begins_without_the_first() -> None:
    """A row with many keys is all that one thread has. Before the first thread was there, many rows were worked on
    together; what is done once for few rows was not done for it."""
    dim, layers, pages, long = 32, 24, 20, 290
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:1])
    try:
        ops = NativeOps(2)
    finally:
        os.sched_setaffinity(0, cores)
    ops._pool.distance = 1
    rng = np.random.default_rng(3)

    def matrix(rows: int):
        values = rng.standard_normal((rows, dim), dtype=np.float32) / 5
        source = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return ops.pack(q8_0(source.reshape(-1), rows, dim))

    table, weights = matrix(VOCAB), [[matrix(dim) for _ in "qkvo"] for _ in range(layers)]
    caches = ops.kv_cache(layers, 1 + 2 * pages, PAGE, 1, dim, "float32")

    def forward(batch: Batch):
        x = ops.embed(table, batch.tokens)
        for (q, k, v, o), cache in zip(weights, caches):
            ops.kv_write(cache, ops.linear(x, k), ops.linear(x, v), batch.groups[0])
            options = {"heads": 1, "scale": 0.3, "window": None, "softcap": None}
            x = ops.add(x, ops.linear(ops.attention(ops.linear(x, q), cache, batch, batch.groups[0], **options), o))
        return ops.linear(ops.take_rows(x, batch.logit_rows), table)

    limits = Limits(rows=64, logits=64, chunks=2, sequences=2, pages=(pages,))
    model = Model(ops, ops.capture(forward, limits), pages)
    before, chunks = [(0, 0, TOKENS)], [(0, long, TOKENS[:1]), (1, 0, TOKENS[:9])]
    model.logits(before)  # keys that the long row sees
    alone = model.step(chunks)
    whole = alone.result()[1].copy()
    assert alone.apart
    led = 0
    for turn in range(300):
        first, behind = model.step(before), model.step(chunks)
        if turn % 2:
            first.result()
            time.sleep(0.0005)
        same = behind.result()[1].tobytes() == whole.tobytes()
        assert same, f"turn {turn}, {behind.led} led"
        led += behind.led > 0
    assert led > 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell cores")
def test_threads_that_slept_may_use_all_cores_again() -> None:
    cores, before = os.sched_getaffinity(0), threads()
    model = build(ISAS[0], len(cores))
    own = threads() - before
    for _ in range(20):
        time.sleep(0.002)  # they sleep between jobs, and go to cores of their own when they wake
        model.logits([(0, 0, TOKENS)])
    deadline = time.monotonic() + 10
    while not (free := all(os.sched_getaffinity(thread) == cores for thread in own)) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(own) == len(cores) and free


def test_queued_steps_with_late_tokens(model: Model) -> None:
    """Greedy tokens of two sequences, every step queued before any has answered."""
    greedy = [sample_spec(SamplingParams(temperature=0), 0, 0, slot) for slot in (4, 6)]
    tickets = [model.step([(0, 0, TOKENS[:9]), (1, 0, TOKENS[9:12])], greedy)]
    for i in range(20):
        tickets.append(model.step([(1, 3 + i, [-1 - 6]), (0, 9 + i, [-1 - 4])], greedy[::-1]))
    chosen = [ticket.result()[0] for ticket in tickets]
    first = [int(chosen[0][0]), *(int(tokens[1]) for tokens in chosen[1:])]
    again = build(model.ops.isa)
    logits = again.logits([(0, 0, TOKENS[:9] + first[:-1])])
    assert logits[8:].argmax(axis=1).tolist() == first


def test_sampling_in_the_step(model: Model) -> None:
    params = [SamplingParams(temperature=0.7, top_k=20), SamplingParams(top_p=0.8), SamplingParams(temperature=0)]
    chunks = [(i, 0, TOKENS[i : i + 5 + i]) for i in range(3)]
    specs = [sample_spec(p, 1234 + i, i, i) for i, p in enumerate(params)]
    tokens, logits = model.step(chunks, specs).result()
    assert len(logits) == 0
    for i, (_, _, own) in enumerate(chunks):
        row = model.logits([(i, 0, own)])[-1]
        keys = {"seed": 1234 + i, "sample_index": i, "position": len(own)}
        assert tokens[i] == sample(row, params[i], **keys, prompt_ids=own, output_ids=[], stop_ids=())


def test_logits_of_some_rows(model: Model) -> None:
    chunks = [(i, 0, TOKENS[i : i + 4]) for i in range(3)]
    greedy = sample_spec(SamplingParams(temperature=0), 0, 0, -1)
    tokens, logits = model.step(chunks, [logits_spec(), greedy, logits_spec()]).result()
    assert tokens[0] == tokens[2] == -1 and tokens[1] >= 0 and len(logits) == 2
    alone = [model.logits([chunk])[-1] for chunk in chunks]
    assert logits[0].tobytes() == alone[0].tobytes() and logits[1].tobytes() == alone[2].tobytes()


def test_broken_logits_are_reported() -> None:
    ops = NativeOps(2)
    table = np.ones((40, 16), np.float32)
    table[17, 3] = np.inf
    matrix = ops.pack(tensor(table))
    program = ops.capture(
        lambda b: ops.linear(ops.take_rows(b.hidden, b.logit_rows), matrix), Limits(8, 8, 8, 1, ()), 16
    )
    hidden = np.ones((2, 16), np.float32)
    hidden[0, 3] = 0
    greedy = np.array([sample_spec(SamplingParams(temperature=0), 0, 0, -1)] * 2, native.SAMPLE)
    rows = np.arange(2, dtype=np.int32)
    ticket = program.submit(np.zeros(0, np.int32), rows, np.array([0, 2], np.int32), rows, [], greedy, hidden)
    assert ticket.result()[0] == [BROKEN_LOGITS, BROKEN_LOGITS]
    table[17, 3] = 1
    assert [i.kind for i in program.instructions] == ["head"]


@pytest.mark.parametrize("isa", ISAS)
def test_the_best_is_found_wherever_it_is(isa: str) -> None:
    """Also where it is not the only one: then the first is chosen. And one that is not finite is seen."""
    vocab, rng = 290, np.random.default_rng(9)  # the last piece ends within a vector
    table = rng.standard_normal((vocab, vocab), dtype=np.float32)  # a column is a row's logits
    for place in range(vocab):
        table[[place, *rng.integers(place, vocab, 2)], place] = 10
    ops = NativeOps(2, isa)
    matrix = ops.pack(tensor(table))
    program = ops.capture(
        lambda b: ops.linear(ops.take_rows(b.hidden, b.logit_rows), matrix), Limits(16, 16, 16, 1, ()), vocab
    )
    ops.finish_packing()
    for first in range(0, vocab, 16):
        places = list(range(first, min(vocab, first + 16)))
        one = np.eye(vocab, dtype=np.float32)[places]
        assert best_and_logits(program, one)[0] == places
        for overflowing in (4e37, -4e37):  # 10 times that, and nothing else
            assert best_and_logits(program, one * np.float32(overflowing))[0] == [BROKEN_LOGITS] * len(places)


def head_alone(isa: str, source: np.ndarray, vocab: int, dim: int, threads: int = 2) -> native.NativeProgram:
    """Logits of hidden states, from a head of Q8_0."""
    ops = NativeOps(threads, isa)
    matrix = ops.pack(q8_0(source, vocab, dim), head=True)
    program = ops.capture(
        lambda b: ops.linear(ops.take_rows(b.hidden, b.logit_rows), matrix), Limits(16, 16, 16, 1, ()), dim
    )
    ops.finish_packing()
    return program


def best_and_logits(program: native.NativeProgram, hidden: np.ndarray) -> tuple[list[int], int, np.ndarray]:
    """What a step of greedy rows chooses, how many bytes it spared, and the rows' logits."""
    rows = np.arange(len(hidden), dtype=np.int32)
    chunks = np.array([0, len(hidden)], np.int32)
    greedy = np.array([sample_spec(SamplingParams(temperature=0), 0, 0, -1)] * len(rows), native.SAMPLE)
    ticket = program.submit(np.zeros(0, np.int32), rows, chunks, rows, [], greedy, hidden)
    chosen = ticket.result()[0]
    every = np.array([logits_spec()] * len(rows), native.SAMPLE)
    logits = program.submit(np.zeros(0, np.int32), rows, chunks, rows, [], every, hidden).result()[1].copy()
    return chosen, ticket.spared_bytes, logits


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_a_screened_head_chooses_the_best(isa: str, threads: int) -> None:
    vocab, dim = 5000, 160  # the last tile and the last superblock are not full
    rng = np.random.default_rng(7)
    weights = rng.standard_normal((vocab, dim), dtype=np.float32)
    weights[3000], weights[4321], weights[4322] = weights[1000], weights[1234], weights[1234]  # ties
    source = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    program = head_alone(isa, source, vocab, dim, threads)
    spared = []
    for rows in (1, 2, native._native.screened_rows, native._native.screened_rows + 1, 1):
        of = rng.choice([1000, 1234, *range(40)], rows)
        hidden = 3 * weights[of] + 0.3 * rng.standard_normal((rows, dim), dtype=np.float32)
        chosen, bytes_, logits = best_and_logits(program, hidden)
        assert chosen == logits.argmax(axis=1).tolist()  # of equal ones the first
        spared.append(bytes_ / (vocab * dim * 3 / 8))
    assert min(*spared[:3], spared[4]) > 0.7 and spared[3] == 0


@pytest.mark.parametrize("isa", ISAS)
def test_a_head_where_nothing_can_be_spared(isa: str) -> None:
    vocab, dim = 512, 64
    source = np.zeros(vocab * dim // 32 * 34, np.uint8)  # all logits are 0
    program, other = head_alone(isa, source, vocab, dim), head_alone(isa, source, vocab, dim)
    assert [best_and_logits(program, np.ones((1, dim), np.float32))[:2] for _ in range(4)] == [([0], 0)] * 4
    assert best_and_logits(other, np.full((1, dim), np.nan, np.float32))[0] == [BROKEN_LOGITS]


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("row", [160, 165, 175, 199])  # of a whole tile and of the last, which is not
@pytest.mark.parametrize("isa", ISAS)
def test_screening_does_not_hide_what_is_not_finite(isa: str, row: int, scale: float) -> None:
    vocab, dim = 200, 64
    weights = np.random.default_rng(6).standard_normal((vocab, dim), dtype=np.float32)
    source = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0).reshape(vocab, -1, 34).copy()
    source[row, 0, :2] = np.array([scale], np.float16).view(np.uint8)
    program = head_alone(isa, source.reshape(-1), vocab, dim)
    assert best_and_logits(program, 3 * weights[3:4])[0] == [BROKEN_LOGITS]


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-33])
def test_tiny_hidden_states_are_not_screened_by_what_rounds_away(size: float) -> None:
    vocab, dim = 4000, 64
    rng = np.random.default_rng(8)
    source = gguf.quants.quantize(rng.standard_normal((vocab, dim), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    program = head_alone(ISAS[0], source.reshape(-1), vocab, dim)
    for _ in range(8):
        hidden = (size * rng.standard_normal((1, dim))).astype(np.float32)
        chosen, _, logits = best_and_logits(program, hidden)
        assert chosen == logits.argmax(axis=1).tolist()


def test_the_number_of_screened_rows() -> None:
    assert native._native.screened_rows == SCREENED_ROWS


def test_pages_are_copied_in_order(model: Model) -> None:
    """A copy queued between two steps: sequence 2 goes on from sequence 0's first page."""
    ops, program = model.ops, model
    w = weights(ops)
    caches = ops.kv_cache(LAYERS, 49, PAGE, KV_HEADS, HEAD_DIM, "bfloat16")
    copy = Model(ops, ops.capture(lambda batch: forward(ops, w, batch, caches), LIMITS))
    copy.step([(0, 0, TOKENS[:20])])
    ops.copy_page(caches, 1, 1 + 6 * 2)
    ours = copy.logits([(2, 16, TOKENS[16:20])])
    expected = copy.logits([(0, 16, TOKENS[16:20])])
    assert ours.tobytes() == expected.tobytes()
    assert program.logits([(0, 16, TOKENS[16:20])]).tobytes() != expected.tobytes()


def test_pages_keep_to_themselves(model: Model) -> None:
    """Eight sequences fill all pages, of which the last is alone in its group, and none writes over another's."""
    texts = np.random.default_rng(6).integers(0, VOCAB, (8, 96)).tolist()
    expected = [model.logits([(s, 0, text)])[-1] for s, text in enumerate(texts)]
    for s, text in enumerate(texts):
        assert model.logits([(s, 95, text[95:])]).tobytes() == expected[s].tobytes()


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 0, [VOCAB])],
        [(0, 0, [-1 - 8])],
        [(0, 96, [1])],
        [(0, 0, [1] * 129)],
        [(i % 8, 0, [1]) for i in range(9)],
    ],
)
def test_steps_out_of_bounds_are_refused(chunks: list) -> None:
    model = build(ISAS[0])
    with pytest.raises((ValueError, IndexError)):
        model.step(chunks)
    assert len(model.logits([(0, 0, [1])])) == 1


def test_settings_out_of_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not run here"):
        NativeOps(1, "sse9")
    ops = NativeOps(1)
    with pytest.raises(ConfigError, match="multiple of 16"):
        ops.kv_cache(1, 4, 24, 1, 8, "float32")
    with pytest.raises(ConfigError, match="kv_dtype"):
        ops.kv_cache(1, 4, 16, 1, 8, "float8")
    with pytest.raises(ValueError, match="bytes"):
        native._native.pack(native._native.Pool(1), native._native.Arena(), "Q8_0", 16, 64, np.zeros(7, np.uint8), None)
    with pytest.raises(RuntimeError, match="capture"):
        ops.embed(ops.pack(tensor(np.zeros((1, 1), np.float32))), None)
