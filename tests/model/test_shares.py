"""Tensor parallelism: what each rank holds, and that ranks together are the model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError, EngineDeadError, UnsupportedModelError
from headrace.formats.gguf import open_gguf
from headrace.formats.tensor import TENSOR_TYPES, Tensor
from headrace.kernels import native
from headrace.kernels.native import NativeOps, sample_spec
from headrace.kernels.ops import Group
from headrace.kernels.reference import ReferenceOps
from headrace.model.families import read_spec
from headrace.model.shares import ATTENTION_COST, KEYS, ROWS, Blocks, Share, split
from headrace.model.spec import ExpertSpec, ModelSpec
from headrace.model.weights import column_blocks, load_weights
from headrace.quant.module import MadeTensor
from headrace.text.tokenizer import Tokenizer
from headrace.types import SamplingParams

from .conftest import TOKENS, Families
from .family_models import FAMILIES
from .harness import Part, make_batch, open_model, relative_error, same_bytes
from .rank_models import Ranks, aborting

NATIVE = native.missing() is None
SETS = ["reference", "native"] if NATIVE else ["reference"]
BOUND = 1e-5  # of float32 sums in another order

# ---- arithmetic


@st.composite
def cuttable(draw: st.DrawFn) -> tuple[ModelSpec, int, Blocks]:
    """A spec, a number of ranks and blocks that go together."""
    block = draw(st.sampled_from([1, 32, 256]))
    head_dim, group = draw(st.sampled_from([20, 64, 96] if block == 1 else [64, 128])), draw(st.integers(1, 9))
    kv_heads = draw(st.integers(1, 12)) * (block // math.gcd(block, head_dim * group))
    heads = kv_heads * group
    ranks = draw(st.integers(1, 5))
    ffn = draw(st.integers(ranks, 40)) * block * draw(st.sampled_from([1, 3, 8]))
    experts = draw(st.sampled_from([None, ExpertSpec(7, 3, ffn, True)]))
    spec = ModelSpec(
        name="drawn", architecture="llama", layers=1, dim=draw(st.sampled_from([32, 576, 2048])), heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, ffn_dim=1 if experts else ffn, vocab_size=draw(st.integers(97, 50000)),
        context_length=64, norm_eps=1e-5, tied=False, windows=(None,), ropes=(None,), attention_scale=1.0,
        gated=draw(st.booleans()), qkv_bias=True, o_bias=True, mlp_bias=experts is None, experts=experts,
    )  # fmt: skip
    return spec, ranks, Blocks(block, block)


def elements(share: Share, field: str, spec: ModelSpec) -> int:
    """How many weights of a field a rank reads; of experts those that a token chooses."""
    shape = list((spec.layer_shapes | spec.table_shapes)[field])
    shape[-2:] = [len(share.rows(field, spec) or range(shape[-2])), len(share.columns(field, spec) or range(shape[-1]))]
    if len(shape) == 3 and spec.experts:
        shape[0] = spec.experts.chosen
    return math.prod(shape)


def work(share: Share, spec: ModelSpec) -> int:
    """Weights that a token reads of a layer, and its attention in the same unit."""
    matrices = [name for name, shape in spec.layer_shapes.items() if len(shape) > 1 and name != "router"]
    attention = 2 * len(share.heads) * spec.head_dim * KEYS * ATTENTION_COST
    return attention + sum(elements(share, name, spec) for name in matrices)


@settings(max_examples=300, deadline=None)
@given(cuttable())
def test_every_row_and_column_is_on_one_rank(drawn: tuple[ModelSpec, int, Blocks]) -> None:
    spec, ranks, blocks = drawn
    try:
        shares = split(spec, ranks, blocks)
    except ConfigError as error:
        most = int(str(error).rsplit("at most ", 1)[1])
        assert most < ranks and len(split(spec, most, blocks)) == most  # what it says works
        return
    group = spec.heads // spec.kv_heads
    for field, shape in (spec.layer_shapes | spec.table_shapes).items():
        for axis, of_share in ((-2, Share.rows), (-1, Share.columns)):
            if len(shape) == 1:
                axis = 0
            parts = [of_share(share, field, spec) for share in shares]
            if parts[0] is None:
                assert parts == [None] * ranks
            elif ROWS.get(field.removesuffix("_bias")) != "kv_heads" or ranks <= spec.kv_heads:
                assert [i for part in parts for i in part] == list(range(shape[axis])), field
    for share in shares:
        assert len(share.heads) and len(share.ffn) and len(share.vocab)
        assert {head // group for head in share.heads} == set(share.kv_heads)
        assert len(share.heads) % len(share.kv_heads) == 0
        assert share.heads.start * spec.head_dim % blocks.o == 0 and share.ffn.start % blocks.down == 0
        assert share.holds("o_bias") == share.holds("down_bias") == (share.rank == 0) and share.holds("q_bias")
        assert share.local(spec).layer_shapes["q"][0] == len(share.heads) * spec.head_dim
        assert share.local(spec).table_shapes["head"][0] == len(share.vocab)


@settings(max_examples=200, deadline=None)
@given(cuttable())
def test_work_is_even(drawn: tuple[ModelSpec, int, Blocks]) -> None:
    """Within one unit of the MLP, unless a rank with the least of it has more than the others' all."""
    spec, ranks, blocks = drawn
    try:
        shares = split(spec, ranks, blocks)
    except ConfigError:
        return
    inner = spec.experts.ffn_dim if spec.experts else spec.ffn_dim
    unit = math.lcm(blocks.down, 16) if inner >= ranks * math.lcm(blocks.down, 16) else blocks.down
    of_unit = unit * spec.dim * (3 if spec.gated or spec.experts else 2) * (spec.experts.chosen if spec.experts else 1)
    loads = [work(share, spec) for share in shares]
    movable = [load for load, share in zip(loads, shares, strict=True) if len(share.ffn) > unit]
    assert not movable or max(movable) - min(loads) <= (ranks + 1) * of_unit


def test_smollm2_is_cut_evenly(smollm2: Path) -> None:
    source = open_gguf(smollm2)
    spec = read_spec(source)
    blocks = column_blocks(source, spec)
    assert blocks == Blocks(32, 32)
    first, second = split(spec, 2, blocks)
    assert (len(first.kv_heads), len(second.kv_heads)) == (2, 1)
    assert (len(first.ffn), len(second.ffn)) == (576, 960)
    assert abs(work(first, spec) / work(second, spec) - 1) < 0.021
    assert [len(share.ffn) for share in split(spec, 3, blocks)] == [512] * 3


SPEC = dict(
    name="m", architecture="llama", layers=1, dim=64, heads=9, kv_heads=3, head_dim=64, ffn_dim=512, vocab_size=97,
    context_length=64, norm_eps=1e-5, tied=True, windows=(None,), ropes=(None,), attention_scale=1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, ranks, blocks, error, says",
    [
        ({}, 0, Blocks(), ConfigError, "0 ranks"),
        ({}, 10, Blocks(), ConfigError, "10 ranks for 9 query heads; use at most 9"),
        ({"qk_norm": "row"}, 2, Blocks(), UnsupportedModelError, "whole width.*use 1 rank"),
        ({"heads": 12, "kv_heads": 12}, 4, Blocks(256, 1), ConfigError, "256 columns of o, 4 heads.*use at most 3"),
        ({"ffn_dim": 512}, 3, Blocks(1, 256), ConfigError, "MLP of 512 columns in blocks of 256; use at most 2"),
        ({"heads": 4, "kv_heads": 1}, 2, Blocks(256, 1), ConfigError, "use at most 1"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes: dict, ranks: int, blocks: Blocks, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        split(ModelSpec(**(SPEC | changes)), ranks, blocks)  # pyright: ignore


# ---- weights


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "falcon-new", "bloom", "phi3", "qwen3moe", "starcoder2"])
def test_ranks_weights_are_the_whole_cut(family: Families, name: str) -> None:
    source = open_model(family(name).folder)
    spec, ops = read_spec(source), ReferenceOps()
    shares = split(spec, 2)
    whole, *parts = (load_weights(source, spec, ops, range(5), share) for share in (None, *shares))
    for layer in range(5):
        for field in spec.layer_shapes:
            ours = [getattr(part.layers[layer], field) for part in parts]
            check_cut(field, spec, shares, getattr(whole.layers[layer], field), ours)
    check_cut("embedding", spec, shares, whole.embedding, [part.embedding for part in parts])


def check_cut(field: str, spec: ModelSpec, shares: tuple[Share, ...], whole, parts: list) -> None:
    if isinstance(whole, tuple):
        for expert, matrix in enumerate(whole):
            check_cut(field, spec, shares, matrix, [part[expert] for part in parts])
        return
    for share, part in zip(shares, parts, strict=True):
        if not share.holds(field):
            assert part is None
            continue
        expected, part = (np.asarray(getattr(value, "rows", value)) for value in (whole, part))
        if (rows := share.rows(field, spec)) is not None:
            expected = expected[rows.start : rows.stop]
        if (columns := share.columns(field, spec)) is not None:
            expected = expected[:, columns.start : columns.stop]
        assert same_bytes(np.ascontiguousarray(expected), np.ascontiguousarray(part)), field


def test_a_part_of_weights_that_are_made() -> None:
    """Checkpoints of quantisers make their rows when asked: a part of them is the whole's."""
    rows = np.random.default_rng(0).integers(0, 255, (9, 3 * 18), np.uint8)
    made = MadeTensor("w", (9, 96), TENSOR_TYPES["Q4_0"], Path("f"), lambda first, last: rows[first:last])
    stored = Tensor("w", (9, 96), TENSOR_TYPES["Q4_0"], rows.reshape(-1), Path("f"))
    for tensor in (made, stored):
        part = tensor.part(range(2, 7), range(32, 96))
        assert part.shape == (5, 64) and same_bytes(part.data, rows[2:7, 18:].reshape(-1))
        assert same_bytes(tensor.part(range(3, 5), range(96)).data, rows[3:5].reshape(-1))


def test_quantised_weights_are_cut_at_blocks(smollm2: Path) -> None:
    source = open_gguf(smollm2)
    spec, ops = read_spec(source), ReferenceOps()
    shares = split(spec, 2, column_blocks(source, spec))
    whole, *parts = (load_weights(source, spec, ops, range(1, 2), share) for share in (None, *shares))
    for field in spec.layer_shapes:
        ours = [getattr(part.layers[0], field) for part in parts]
        check_cut(field, spec, shares, getattr(whole.layers[0], field), ours)


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_a_ranks_packed_weights_are_its_share(smollm2: Path) -> None:
    source = open_gguf(smollm2)
    spec, ops = read_spec(source), NativeOps(2)
    shares = split(spec, 2, column_blocks(source, spec))

    def nbytes(share: Share | None) -> int:
        weights = load_weights(source, spec, ops, range(spec.layers), share)
        ops.finish_packing()
        fields = spec.layer_shapes
        matrices = [weights.embedding, *(getattr(layer, name) for layer in weights.layers for name in fields)]
        return sum(matrix.nbytes for matrix in matrices if matrix is not None and not isinstance(matrix, np.ndarray))

    whole, parts = nbytes(None), [nbytes(share) for share in shares]
    assert max(parts) < 0.54 * whole and whole <= sum(parts) < 1.02 * whole


# ---- models


def make_ops(kind: str, threads: int = 1):
    def make(group: Group | None) -> NativeOps | ReferenceOps:
        if kind == "reference":
            return ReferenceOps(group=group)
        ops = NativeOps(threads, group=group)
        ops._pool.distance = 1  # with 5 rows a thread, each takes its own
        return ops

    return make


CASES = [
    ("qwen2", 2),  # 3 KV heads, biases, tied
    ("qwen3", 3),  # norms of heads, untied
    ("gemma3-one", 2),  # 1 KV head on both ranks, windows, norms after
    ("gemma3-one", 3),
    ("gemma2", 2),  # softcaps
    ("qwen3moe", 2),
    ("mixtral", 3),
    ("falcon", 3),  # attention and MLP side by side, 1 KV head
    ("falcon-new", 2),  # the same with biases and two norms
    ("bloom", 2),  # ALiBi, layer norms
    ("gpt2", 3),  # [in, out] weights, positions in a table
    ("granite", 2),
]


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name, ranks", CASES)
def test_ranks_are_the_model(family: Families, name: str, ranks: int, kind: str) -> None:
    """Close to one rank, and the same bytes whatever the chunks and the batch."""
    source, context = open_model(family(name).folder), FAMILIES[name].context
    model = Ranks(source, ranks, make_ops(kind), context=context)
    with aborting(model.groups):
        whole = model.logits(TOKENS)
        assert relative_error(whole, Ranks(source, 1, make_ops(kind), context=context).logits(TOKENS)) < BOUND
        assert relative_error(whole, family(name).logits) < 1e-4
        assert same_bytes(model.logits(TOKENS, 7), whole)
        steps = [model.run(Part(TOKENS[:20])), *(model.run(Part(TOKENS[at : at + 1], at)) for at in range(20, 30))]
        assert same_bytes(np.concatenate(steps), whole[:30])
        first, second = range(1, 9), range(9, 17)
        model.run(Part(TOKENS[5:40], 0, second), Part(TOKENS[:33], 0, first))
        both = model.run(Part(TOKENS[40:41], 35, second), Part(TOKENS[33:50], 33, first), Part(TOKENS[:2], 0, (20,)))
        assert same_bytes(both[1:18], whole[33:50]) and same_bytes(both[18:], whole[:2])


def test_a_wrong_share_would_be_seen(family: Families) -> None:
    """Ranks that both hold the first half: the comparison above must fail."""
    source = open_model(family("qwen2").folder)
    right = Ranks(source, 2, make_ops("reference"))
    with aborting(right.groups):
        logits = right.logits(TOKENS)
        right.decoders[1].weights = right.decoders[0].weights
        right.decoders[1].share = dataclasses.replace(right.shares[1], heads=right.shares[0].heads)
        right.all_caches[1] = right.all_caches[0]
        right.decoders[1]._heads, right.decoders[1]._kv_heads = len(right.shares[0].heads), 2
        assert relative_error(right.logits(TOKENS), logits) > 100 * BOUND


needs_native = pytest.mark.skipif(not NATIVE, reason="no native kernels")


@needs_native
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["qwen2", "gemma3-one"])
def test_tokens_are_those_of_one_rank(family: Families, name: str, ranks: int) -> None:
    """Greedy and seeded, each token bound late to what every rank noted of the step before."""
    source = open_model(family(name).folder)
    model, one = Ranks(source, ranks, make_ops("native")), Ranks(source, 1, make_ops("native"))
    seen: set[int] = set()
    with aborting(model.groups):
        for params in (SamplingParams(temperature=0), SamplingParams(temperature=0.9, top_k=30, top_p=0.95)):
            sample = sample_spec(params, 1234, 0, 3)
            assert sample is not None
            tokens = model.generate(TOKENS[:9], 24, sample)
            assert tokens == one.generate(TOKENS[:9], 24, sample) == model.generate(TOKENS[:9], 24, sample)
            seen.update(tokens)
        assert len(seen) > 3


@needs_native
def test_reductions_are_counted(family: Families) -> None:
    """Two a layer and one for the embedding; bytes are those of the partial sums, and of each row's best logit."""
    source = open_model(family("qwen3").folder)
    model = Ranks(source, 2, make_ops("native"))
    with aborting(model.groups):
        kinds = [item.kind for item in model.programs[0].instructions]
        assert kinds.count("reduce_start") == kinds.count("reduce_wait") == 2 * 5 + 1
        greedy = sample_spec(SamplingParams(temperature=0), 0, 0, 3)
        model.generate(TOKENS[:9], 2, greedy or ())
        batch = make_batch([Part(TOKENS[:9])])
        batch.logit_rows = batch.logit_rows[-1:]
        tickets = model.submit(batch, np.array([greedy], native.SAMPLE))
        for ticket in tickets:
            ticket.result()
            count, nbytes, seconds = ticket.reduces
            assert (count, nbytes) == (11, 11 * 9 * 120 * 4 + 12) and 0 <= seconds < ticket.times[1] - ticket.times[0]
        (alone,) = Ranks(source, 1, make_ops("native")).submit(batch, np.array([greedy], native.SAMPLE))
        alone.result()
        assert alone.reduces == (0, 0, 0.0)


@needs_native
def test_other_work_hides_a_reduction(family: Families) -> None:
    """Attention's sum is waited for after the MLP's products where both read the same norm; never two too many."""
    model = Ranks(open_model(family("falcon").folder), 2, make_ops("native"))
    kinds = [item.kind for item in model.programs[0].instructions]
    first = kinds.index("attention")
    hidden = ["attention", "product", "reduce_start", "product", "reduce_start", "reduce_wait", "reduce_wait"]
    assert kinds[first : first + 7] == hidden
    for before in range(len(kinds)):
        assert kinds[:before].count("reduce_start") - kinds[:before].count("reduce_wait") <= 2


@needs_native
@pytest.mark.parametrize("name, ahead", [("qwen2", 0), ("qwen2", 1), ("falcon", 0), ("falcon", 1)])
def test_a_rank_may_be_ahead(family: Families, name: str, ahead: int) -> None:
    """Steps without logits are queued on one rank before the other has any: it goes on as far as sums let it."""
    model = Ranks(open_model(family(name).folder), 2, make_ops("native"))
    with aborting(model.groups):
        whole = model.logits(TOKENS)
        batches = [make_batch([Part(TOKENS[at : at + 3], at)]) for at in range(0, 57, 3)]
        for batch in batches:
            batch.logit_rows = batch.logit_rows[:0]
        none = np.zeros(0, native.SAMPLE)
        for rank in (ahead, 1 - ahead):
            for batch in batches:
                arrays = (batch.tokens, batch.positions, batch.chunk_rows, batch.logit_rows, batch.groups, none)
                model.programs[rank].submit(*arrays)
        assert same_bytes(model.run(Part(TOKENS[57:], 57)), whole[57:])


@needs_native
def test_threads_of_a_rank_change_nothing(family: Families) -> None:
    """Also with rows enough for each thread to take its own, which ranks never do."""
    source = open_model(family("qwen2").folder)
    one, three = Ranks(source, 2, make_ops("native", 1)), Ranks(source, 2, make_ops("native", 3))
    with aborting([*one.groups, *three.groups]):
        assert same_bytes(three.logits(TOKENS), one.logits(TOKENS))
        assert same_bytes(three.logits(TOKENS, 5), one.logits(TOKENS))
        greedy = sample_spec(SamplingParams(temperature=0), 0, 0, 3) or ()
        assert three.generate(TOKENS[:40], 20, greedy) == one.generate(TOKENS[:40], 20, greedy)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["qwen2", "falcon", "gemma2"])
def test_halves_of_many_rows(family: Families, name: str, threads: int) -> None:
    """From 64 rows on each half of them goes from sum to sum in turn: the bytes are those of fewer rows, for a chunk
    that is cut, for chunks beside it, and for stages."""
    source, tokens = open_model(family(name).folder), (TOKENS + TOKENS[::-1] + TOKENS[7:])[:128]
    model = Ranks(source, 2, make_ops("native", threads))
    with aborting(model.groups):
        whole = model.logits(tokens, 50)
        assert same_bytes(model.run(Part(tokens)), whole)
        for rows in (127, 70, 64):
            assert same_bytes(model.run(Part(tokens[:rows])), whole[:rows])
        first, second = range(1, 9), range(9, 17)
        model.run(Part(tokens[:20], 0, first))
        both = model.run(Part(tokens[20:120], 20, first), Part(tokens[:27], 0, second), Part(tokens[:1], 0, (20,)))
        assert same_bytes(both[:100], whole[20:120]) and same_bytes(both[100:127], whole[:27])
        one = Ranks(source, 1, make_ops("native", threads))
        assert relative_error(whole, one.logits(tokens)) < BOUND
    stages = [Ranks(source, 2, make_ops("native", threads), layers=layers) for layers in (range(3), range(3, 5))]
    with aborting([group for stage in stages for group in stage.groups]):
        hidden = stages[0].run(Part(tokens))
        assert same_bytes(stages[1].run(Part(tokens), hidden=hidden), whole)


@pytest.mark.parametrize("kind", SETS)
def test_stages_of_ranks(family: Families, kind: str) -> None:
    source = open_model(family("gemma2").folder)
    whole = Ranks(source, 2, make_ops(kind))
    stages = [Ranks(source, 2, make_ops(kind), layers=layers) for layers in (range(3), range(3, 5))]
    with aborting([group for model in (whole, *stages) for group in model.groups]):
        hidden = stages[0].run(Part(TOKENS))
        assert hidden.shape == (60, 120)
        assert same_bytes(stages[1].run(Part(TOKENS), hidden=hidden), whole.logits(TOKENS))


@pytest.mark.parametrize("kind", SETS)
def test_an_abort_ends_a_wait(family: Families, kind: str) -> None:
    """One rank alone waits until the group is aborted; then its step has failed, and so has every later one."""
    model = Ranks(open_model(family("qwen2").folder), 2, make_ops(kind))
    batch = make_batch([Part(TOKENS)], len(model.all_caches[0]))
    if kind == "native":
        samples = np.array([native.logits_spec()] * 60, native.SAMPLE)
        arrays = (batch.tokens, batch.positions, batch.chunk_rows, batch.logit_rows, batch.groups, samples)
        run = lambda: model.programs[0].submit(*arrays).result()  # noqa: E731
    else:
        run = lambda: model.decoders[0].forward(model.all_ops[0], batch, model.all_caches[0])  # noqa: E731
    waiting = model._threads.submit(run)
    with pytest.raises(TimeoutError):
        waiting.result(0.1)
    model.groups[1].abort()
    for step in (waiting, model._threads.submit(run)):
        with pytest.raises(EngineDeadError, match="aborted"):
            step.result(20)


# ---- the real model


PROSE = """A headrace is the channel that brings water to the wheel of a mill. Where the river falls, the miller dams it
and leads some of the water along the side of the valley, almost level, until it stands well above the stream from which
it came. There it drops onto the wheel, turns it, and runs back into the river through the tailrace. The power of the
mill depends on two things alone: how much water comes down the channel every second, and how far it falls."""


@needs_native
def test_smollm2_by_two_ranks(smollm2: Path) -> None:
    """Activations in 8 bits make logits of any two sums differ, here by 0.03 of the greatest; what it says stays:
    greedy tokens, where the best two logits are further apart than ranks and rank differ, and perplexity."""
    source = open_gguf(smollm2)
    tokens = Tokenizer.from_gguf(source.metadata, path=smollm2).encode(PROSE)
    two, one = (Ranks(source, ranks, make_ops("native")) for ranks in (2, 1))
    with aborting(two.groups):
        ours, expected = two.logits(tokens, 64), one.logits(tokens)
        assert same_bytes(two.logits(tokens), ours)
    assert relative_error(ours, expected) < 0.08
    gap = np.subtract(*np.sort(expected, axis=1)[:, [-1, -2]].T)
    clear = gap > np.abs(ours - expected).max(axis=1)
    assert clear.sum() > 40 and (ours.argmax(axis=1) == expected.argmax(axis=1))[clear].all()
    assert abs(perplexity(ours, tokens) / perplexity(expected, tokens) - 1) < 0.02


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    of_next = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(np.exp(-of_next[np.arange(len(tokens) - 1), tokens[1:]].mean()))


def test_smollm2_in_float32(smollm2: Path) -> None:
    """The numpy set, two layers: the ranks' sums differ from one rank's by rounding alone."""
    source, layers = open_gguf(smollm2), range(28, 30)
    hidden = np.random.default_rng(0).standard_normal((20, 576), dtype=np.float32)
    two, one = (Ranks(source, ranks, make_ops("reference"), layers=layers) for ranks in (2, 1))
    with aborting(two.groups):
        ours, expected = (model.run(Part(range(20)), hidden=hidden) for model in (two, one))
    assert relative_error(ours, expected) < BOUND and not same_bytes(ours, expected)
