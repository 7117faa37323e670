"""Sampling: known answers, every filter against a naive one, statistics with controls, and what a token depends on."""

from __future__ import annotations

import math
from collections import Counter
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import sampling
from headrace.errors import RequestError, SamplingError
from headrace.sampling import logprob_of, philox4x32, philox_uniform, sample
from headrace.types import SamplingParams

VOCAB = 49152


def choose(logits, position=7, **arguments):
    return draws(logits, [position], **arguments)[0]


def draws(logits, positions, *, seed=1, sample_index=0, prompt=(), output=(), stops=(), **params):
    """The tokens chosen from the same logits at several positions."""
    checked, logits = SamplingParams(**params), np.asarray(logits)
    fixed = {"seed": seed, "sample_index": sample_index, "prompt_ids": prompt, "output_ids": output, "stop_ids": stops}
    return [sample(logits, checked, position=position, **fixed) for position in positions]


def support(logits, count=400, **params):
    """Which tokens can be chosen, for small sets of nearly equal tokens."""
    return set(draws(np.asarray(logits, np.float32), range(count), **params))


def random_logits(seed, vocab=VOCAB, scale=4.0):
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


# A naive sampler: Python floats, whole sorts, probabilities renormalised after each filter


def naive_adjusted(logits, params, prompt, output, stops):
    values = [float(x) for x in logits]
    for token, bias in params.logit_bias.items():
        values[token] += bias
    for token in set(prompt) | set(output):
        r = params.repetition_penalty
        values[token] = values[token] / r if values[token] > 0 else values[token] * r
    for token, count in Counter(output).items():
        values[token] -= count * params.frequency_penalty + params.presence_penalty
    banned = set(params.banned_tokens) | (set(stops) if len(output) < params.min_tokens else set())
    return [-math.inf if i in banned else v for i, v in enumerate(values)]


def naive_distribution(values, params):
    """{token: probability} after temperature and filters."""
    top = max(values)
    p = {i: math.exp((v - top) / params.temperature) for i, v in enumerate(values) if v > -math.inf}

    def normal(p):
        total = math.fsum(p.values())
        return {i: w / total for i, w in p.items()}

    def first_holding(p, mass, key):
        kept, held = {}, 0.0
        for i in sorted(p, key=key):
            if kept and held >= mass:
                break
            kept[i], held = p[i], held + p[i]
        return kept

    p = normal(p)
    if params.top_k:
        p = normal({i: p[i] for i in sorted(p, key=lambda i: (-values[i], i))[: params.top_k]})
    if params.typical_p < 1:
        entropy = -math.fsum(w * math.log(w) for w in p.values() if w > 0)
        surprise = {i: abs(-math.log(w) - entropy) if w > 0 else math.inf for i, w in p.items()}
        p = normal(first_holding(p, params.typical_p, lambda i: (surprise[i], i)))
    if params.top_p < 1:
        p = normal(first_holding(p, params.top_p, lambda i: (-values[i], i)))
    if params.min_p > 0:
        best = max(p.values())
        p = normal({i: w for i, w in p.items() if w >= params.min_p * best})
    return p


def naive_token(p, uniform):
    held = 0.0
    for i in sorted(p):
        held += p[i]
        if held > uniform:
            return i
    return max(p)


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert philox4x32(counter, key) == words


def test_uniform_layout():
    assert philox_uniform(0, 0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53
    seed = 0x299F31D0A4093822
    expected = philox4x32((5, 6, 7, 0), (0xA4093822, 0x299F31D0))
    assert philox_uniform(seed, 6, 5, 7) == ((expected[0] << 32 | expected[1]) >> 11) / 2**53
    assert philox_uniform(-1, 0, 0) == philox_uniform(2**64 - 1, 0, 0)


def test_uniform_depends_on_every_argument():
    base = (3, 4, 5, 6)
    values = {philox_uniform(*base)}
    for place in range(4):
        for bit in (0, 17, 31):
            values.add(philox_uniform(*(x ^ (1 << bit) if i == place else x for i, x in enumerate(base))))
    values.add(philox_uniform(3 + 2**40, 4, 5, 6))
    assert len(values) == 14


# Closed forms on tiny vocabularies


def test_greedy_takes_the_best_and_the_lowest_id_of_ties():
    assert choose([0, 3, 1, 3], temperature=0) == 1
    assert choose([0, 3, 1, 3], temperature=0, logit_bias={3: 0.5}) == 3


def test_top_k_keeps_exactly_k_and_the_lower_ids_of_ties():
    assert support([1, 1.2, 1, 1, 0.9], top_k=3) == {0, 1, 2}
    assert support([1, 1.2, 1, 1, 0.9], top_k=1) == {1}
    assert support([1, 1, 1, 1], top_k=2**31 - 1) == {0, 1, 2, 3}


def test_top_p_keeps_the_token_that_crosses():
    logits = np.log([0.1, 0.4, 0.3, 0.2])
    assert support(logits, top_p=0.0) == {1}
    assert support(logits, top_p=0.39) == {1}
    assert support(logits, top_p=0.41) == {1, 2}
    assert support(logits, top_p=0.71) == {1, 2, 3}
    assert support(logits, top_p=0.91) == {0, 1, 2, 3}
    assert support([0.0] * 8, top_p=0.5) == {0, 1, 2, 3}
    zeros = np.where(np.arange(40) % 3, -0.0, 0.0)
    assert support(zeros, top_p=0.1) == support(-zeros, top_p=0.1) == {0, 1, 2, 3}
    assert support([0, -1, -1], temperature=1 / math.log(2), top_p=0.5) == {0}  # weights 1, 1/2, 1/2: reached exactly


def test_min_p_is_relative_to_the_best():
    logits = np.log([0.1, 0.4, 0.3, 0.2])
    assert support(logits, min_p=0.76) == {1}
    assert support(logits, min_p=0.74) == {1, 2}
    assert support(logits, min_p=0.49) == {1, 2, 3}
    assert support([2, 2, 1, 2], min_p=1.0) == {0, 1, 3}


def test_typical_p_can_leave_out_the_best():
    # Entropy 1.089 nats; surprises 0.511, 1.609 and 2.303 (twice): distances 0.578, 0.521 and 1.214.
    logits = np.log([0.6, 0.2, 0.1, 0.1])
    assert support(logits, typical_p=0.0) == {1}
    assert support(logits, typical_p=0.19) == {1}
    assert support(logits, typical_p=0.21) == {0, 1}
    assert support(logits, typical_p=0.85) == {0, 1, 2}
    # Entropy 1.748; surprises 0.916 and 2.303: distances 0.832 and 0.555.
    assert support(np.log([0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]), typical_p=0.55) == {1, 2, 3, 4, 5, 6}


def test_filters_see_what_the_previous_ones_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert support(logits, top_p=0.55) == {0, 1}
    assert support(logits, top_k=2, top_p=0.55) == {0}  # 0.4 / 0.7 = 0.571


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    assert choose([2.0, 1.1, 0.5], temperature=0, repetition_penalty=2, prompt=[0]) == 1
    assert (
        choose([2.0, 0.9, 0.5], temperature=0, repetition_penalty=2, prompt=[0, 0, 0]) == 0
    )  # once, however often seen
    assert choose([-1.0, -1.5, -3], temperature=0, repetition_penalty=2, output=[0]) == 1
    assert choose([-1.0, -2.5, -3], temperature=0, repetition_penalty=2, output=[0]) == 0


def test_presence_and_frequency_count_the_output_alone():
    assert choose([2.0, 1.5], temperature=0, presence_penalty=0.6, output=[0]) == 1
    assert choose([2.0, 1.3], temperature=0, presence_penalty=0.6, output=[0, 0]) == 0
    assert choose([2.0, 1.3], temperature=0, frequency_penalty=0.4, output=[0]) == 0
    assert choose([2.0, 1.3], temperature=0, frequency_penalty=0.4, output=[0, 0]) == 1
    assert choose([2.0, 1.9], temperature=0, presence_penalty=9, frequency_penalty=9, prompt=[0] * 9) == 0


def test_bans_and_minimum_length():
    assert choose([3, 2, 1], temperature=0, banned_tokens=(0,)) == 1
    assert choose([3, 2, 1], temperature=0, min_tokens=2, stops=[0, 99], output=[2]) == 1
    assert choose([3, 2, 1], temperature=0, min_tokens=2, stops=[0, 99], output=[2, 2]) == 0
    assert support([5, 1, 1, 1], banned_tokens=(0,), top_k=2) == {1, 2}
    assert support([5, 1, 1], banned_tokens=(0,), logit_bias={0: 100}, repetition_penalty=0.5, prompt=[0]) == {1, 2}


# Against the naive sampler


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.3, 2.0, 8.0]),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 10_000]),
    typical_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    penalised=st.booleans(),
)
def test_equals_the_naive_sampler(seed, scale, temperature, top_k, typical_p, top_p, min_p, penalised):
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(2, 700))
    logits = (rng.standard_normal(vocab) * scale).astype(np.float32)
    prompt, output = rng.integers(0, vocab, 20).tolist(), rng.integers(0, vocab, 9).tolist()
    extra: dict[str, Any] = {}
    if penalised:
        extra = {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": -0.2,
            "logit_bias": {0: 2.5, vocab - 1: -1.5},
            "banned_tokens": (1,),
            "min_tokens": 10,
        }
    params = SamplingParams(
        temperature=temperature, top_k=top_k, typical_p=typical_p, top_p=top_p, min_p=min_p, max_tokens=99, **extra
    )
    stops = [vocab // 2] if vocab > 3 else []
    expected = naive_distribution(naive_adjusted(logits, params, prompt, output, stops), params)
    for position in range(12):
        got = sample(
            logits,
            params,
            seed=seed,
            sample_index=2,
            position=position,
            prompt_ids=prompt,
            output_ids=np.array(output),
            stop_ids=stops,
        )
        assert got == naive_token(expected, philox_uniform(seed, 2, position))


def test_equals_the_naive_sampler_on_a_real_vocabulary():
    cases: list[tuple[float, dict[str, Any]]] = [
        (1.0, {"top_p": 0.9}),
        (4.0, {"top_p": 0.999}),
        (4.0, {"temperature": 2.0}),
        (2.0, {"typical_p": 0.8}),
    ]
    for scale, params in cases:
        logits = random_logits(3, scale=scale)
        expected = naive_distribution(logits.astype(float).tolist(), SamplingParams(**params))
        for position in range(20):
            assert choose(logits, position=position, **params) == naive_token(expected, philox_uniform(1, 0, position))


# The arithmetic that a compiled twin repeats, in scalars: the same bits


def scalar_weight(logit, best, temperature):
    terms = [1.0]
    for k in range(1, 12):
        terms.append(terms[-1] * 0.6931471805599453 / k)
    x = max((float(logit) - float(best)) / (temperature * 0.6931471805599453), -1000.0)
    whole = round(x)
    power = terms[11]
    for term in reversed(terms[:11]):
        power = power * (x - whole) + term
    return math.ldexp(power, whole) - 2.0**-1000


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 100.0])
def test_weights_and_sums_have_the_bits_of_scalar_arithmetic(temperature):
    logits = random_logits(9, 9000, 5.0)
    logits[:3] = -np.float32(3e38), 0, -0.0
    weights = sampling._weights(logits, temperature)
    expected = [scalar_weight(logit, logits.max(), temperature) for logit in logits]
    assert weights.tolist() == expected
    exact = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    np.testing.assert_allclose(weights, exact, rtol=2e-13, atol=1e-290)
    blocks = [sum_in_order(expected[start : start + 256]) for start in range(0, len(expected), 256)]
    assert sampling._block_ends(sampling._parts(weights)).tolist() == list(accumulate(blocks))


def sum_in_order(values):
    total = 0.0  # not sum(), which compensates for rounding since Python 3.12
    for value in values:
        total += value
    return total


# Statistics


def chi_square_tail(counts, expected):
    """P(a chi-square variable is at least this large), by the Wilson-Hilferty normal approximation."""
    statistic = float((((counts - expected) ** 2) / expected).sum())
    freedom = len(expected) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def expected_counts(logits, total, **params):
    p = naive_distribution(np.asarray(logits, float).tolist(), SamplingParams(**params))
    return np.array([p.get(i, 0.0) for i in range(len(logits))]) * total


LOGITS = np.array([0.3, -1.0, 1.2, 0.0, 0.9, -0.4, 0.5, 1.1, -2.0, 0.2], np.float32)


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.8}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.3}, {"typical_p": 0.7}],
    ids=lambda params: next(iter(params)),
)
def test_draws_follow_the_distribution_and_a_wrong_temperature_is_noticed(params):
    total = 20_000
    counts = np.bincount(draws(LOGITS, range(total), seed=11, **params), minlength=len(LOGITS))
    expected = expected_counts(LOGITS, total, **params)
    kept = expected > 0
    assert not counts[~kept].any()
    assert chi_square_tail(counts[kept], expected[kept]) > 1e-3
    warmer = expected[kept] ** (1 / 1.2)
    assert chi_square_tail(counts[kept], warmer * (total / warmer.sum())) < 1e-6


def test_a_block_boundary_does_not_bend_the_distribution():
    total, vocab = 20_000, 1000  # four blocks of sums, the last one shorter
    expected = np.full(vocab, total / vocab)
    tokens = np.array(draws(np.zeros(vocab), range(total), seed=5))
    assert chi_square_tail(np.bincount(tokens, minlength=vocab), expected) > 1e-3
    bent = np.where((tokens >= 256) & (tokens < 300), tokens - 100, tokens)
    assert chi_square_tail(np.bincount(bent, minlength=vocab), expected) < 1e-6


def test_samples_of_one_request_are_independent():
    total = 20_000
    first, second = (draws(LOGITS, range(total), seed=4, sample_index=index, top_k=4) for index in (0, 1))
    kept = sorted(set(first))
    p = expected_counts(LOGITS, 1, top_k=4)[kept]

    def tail(left, right):
        pairs = Counter(zip(left, right, strict=True))
        counts = np.array([pairs[a, b] for a in kept for b in kept])
        return chi_square_tail(counts, np.outer(p, p).reshape(-1) * total)

    assert tail(first, second) > 1e-3
    assert tail(first[1:] + first[:1], first) > 1e-3  # and so are the positions of one sample
    assert tail(first, [b if i % 10 else a for i, (a, b) in enumerate(zip(first, second, strict=True))]) < 1e-6


# What a token depends on


def test_a_token_depends_on_nothing_else():
    logits = random_logits(1)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2}
    expected = draws(logits, range(8), prompt=[1, 2], output=[3], **options)
    assert (
        draws(logits, reversed(range(8)), prompt=(2, 1, 1), output=np.array([3], np.int32), **options) == expected[::-1]
    )
    assert draws(logits.astype(np.float64), range(8), prompt=[1, 2], output=[3], stops=[0], **options) == expected
    columns = np.zeros((VOCAB, 3), np.float32)
    columns[:, 1] = logits
    assert draws(columns[:, 1], range(8), prompt=[1, 2], output=[3], **options) == expected
    assert draws(logits, range(8), prompt=[1, 2], output=[3], seed=2, **options) != expected
    assert draws(logits, range(8), prompt=[1, 2], output=[3], sample_index=1, **options) != expected
    assert draws(logits, range(8, 16), prompt=[1, 2], output=[3], **options) != expected


def test_logits_are_left_as_they_were():
    logits = random_logits(2)
    before = logits.copy()
    choose(
        logits,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        banned_tokens=(1,),
        logit_bias={2: 1.0},
        output=[4],
        frequency_penalty=1,
    )
    logprob_of(logits, 3, 4)
    assert logits.tobytes() == before.tobytes()


# Bounds and errors


def test_extreme_values_stay_finite():
    huge = np.array([3e38, -3e38, 1e38, 0.0], np.float32)
    filters = {"top_k": 3, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.1}
    with np.errstate(all="raise"):
        for temperature in (5e-324, 1e-5, 1.0, 100.0):
            assert support(huge, 50, temperature=temperature) == {0}
            assert support(huge, 50, temperature=temperature, **filters) == {0}
        assert support(huge, 50, repetition_penalty=0.01, prompt=[0]) == {0}
        assert support(huge, 50, repetition_penalty=0.01, prompt=[0, 2]) == {0, 2}  # both meet the largest float32
        assert choose(random_logits(4), temperature=1e-5) == choose(random_logits(4), temperature=0)
    assert support([1.5], top_k=1, top_p=0.0, min_p=1.0, typical_p=0.0) == {0}


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 8192, 8193, 10_000])
def test_the_ends_of_the_unit_interval(vocab, monkeypatch):
    for uniform, token in ((0.0, 0), (1 - 2**-53, vocab - 1)):
        monkeypatch.setattr("headrace.sampling.philox_uniform", lambda *_, value=uniform: value)
        assert choose(np.zeros(vocab)) == token
        if vocab > 4:  # banned tokens at both ends have no share of the interval, however small
            assert choose(np.zeros(vocab), banned_tokens=(0, 1, vocab - 1)) == (2 if token == 0 else vocab - 2)


def test_a_draw_on_the_edge_of_a_block_skips_banned_tokens(monkeypatch):
    monkeypatch.setattr("headrace.sampling.philox_uniform", lambda *_: 0.5)
    assert choose(np.zeros(768), banned_tokens=tuple(range(256, 512))) == 512


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    logits = random_logits(6, 1000)
    logits[500] = bad
    with pytest.raises(SamplingError, match="1 of 1000 logits"):
        choose(logits, temperature=temperature)
    with pytest.raises(SamplingError, match="1 of 1000 logits"):
        logprob_of(logits, 1, 0)


def test_requests_that_cannot_be_met_are_refused():
    with pytest.raises(SamplingError, match="all 3 tokens are banned"):
        choose([1, 2, 3], banned_tokens=(0, 1), min_tokens=1, stops=[2])
    with pytest.raises(RequestError, match=r"logit_bias has token id 3.*0 to 2"):
        choose([1, 2, 3], logit_bias={3: 1.0})
    with pytest.raises(RequestError, match="banned_tokens has token id 9"):
        choose([1, 2, 3], banned_tokens=(9,))
    with pytest.raises(ValueError, match=r"\[vocab\]"):
        choose([[1, 2, 3]])


# Logprobs


def test_logprobs_match_a_plain_log_softmax():
    logits = random_logits(8, 5000)
    exact = logits.astype(np.float64)
    exact -= math.log(math.fsum(np.exp(exact - exact.max()))) + exact.max()
    order = np.lexsort((np.arange(len(logits)), -logits))
    for token in (int(order[0]), int(order[17]), int(order[-1])):
        got = logprob_of(logits, token, 20)
        assert got.token == token
        assert got.logprob == pytest.approx(exact[token], abs=1e-12)
        assert got.rank == int(np.flatnonzero(order == token)[0]) + 1
        assert [other for other, _ in got.top] == order[:20].tolist()
        assert [logprob for _, logprob in got.top] == pytest.approx(exact[order[:20]].tolist(), abs=1e-12)


def test_ties_in_logprobs_go_to_the_lower_id():
    got = logprob_of(np.array([0, 1, 0, 1, 1], np.float32), 3, 2)
    assert (got.rank, [token for token, _ in got.top]) == (2, [1, 3])
    assert logprob_of(np.zeros(3, np.float32), 2, 0).top == ()
    everything = logprob_of(np.zeros(3, np.float32), 2, 256)
    assert everything.rank == 3 and everything.top == ((0, -math.log(3)), (1, -math.log(3)), (2, -math.log(3)))
