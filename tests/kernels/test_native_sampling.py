"""The compiled sampler chooses the tokens that sampling.py chooses, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.kernels import native
from headrace.sampling import sample
from headrace.types import SamplingParams

if native.missing() is not None:
    pytest.skip(f"the native kernels are not built: {native.missing()}", allow_module_level=True)

ISAS = native._native.supported_isas


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, SamplingParams, int, int, int]:
    vocab = int(
        rng.choice([1, 2, 17, 255, 256, 257, 1000, 4099, 49152], p=[0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.2, 0.25, 0.05])
    )
    logits = rng.standard_normal(vocab, dtype=np.float32) * np.float32(rng.choice([0, 1, 4, 30]))
    if rng.random() < 0.4:  # many ties
        logits = np.round(logits * 2) / 2
    if rng.random() < 0.1:
        logits[rng.integers(vocab)] = 1e30
    params = SamplingParams(
        temperature=float(rng.choice([1e-3, 0.3, 1.0, 2.5, 100.0])),
        top_k=int(rng.choice([0, 1, 2, 40, 300, vocab, vocab + 1])),
        top_p=float(rng.choice([0.0, 0.1, 0.9, 0.999999, 1.0])),
        min_p=float(rng.choice([0.0, 0.05, 1.0])),
    )
    return logits, params, int(rng.integers(2**64, dtype=np.uint64)), int(rng.integers(2**32)), int(rng.integers(2**31))


def twin(logits: np.ndarray, params: SamplingParams, seed: int, index: int, position: int) -> int:
    nothing = np.empty(0, np.int64)
    return sample(
        logits,
        params,
        seed=seed,
        sample_index=index,
        position=position,
        prompt_ids=nothing,
        output_ids=nothing,
        stop_ids=(),
    )


def ours(isa: str, logits: np.ndarray, params: SamplingParams, seed: int, index: int, position: int) -> int:
    filters = (params.temperature, params.top_k, params.top_p, params.min_p)
    return native._native.sample(isa, logits, *filters, seed, index, position)


@pytest.mark.parametrize("isa", ISAS)
def test_same_tokens(isa: str) -> None:
    rng = np.random.default_rng(7)
    seen = set()
    for _ in range(1500):
        case = random_case(rng)
        token = twin(*case)
        assert ours(isa, *case) == token, case
        seen.add(token)
    assert len(seen) > 300


def test_a_case_can_tell() -> None:
    """Most cases with something to choose from change with the seed or the position."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal(1000, dtype=np.float32)
    params = SamplingParams(top_p=0.9)
    tokens = [ours(ISAS[0], logits, params, seed, 0, 5) for seed in range(50)]
    assert len(set(tokens)) > 30
    assert len({ours(ISAS[0], logits, params, 1, index, position) for index in range(5) for position in range(10)}) > 30


def test_specs() -> None:
    spec = np.array([native.sample_spec(SamplingParams(temperature=0.5, top_k=3), -1, 2, 4)], native.SAMPLE)[0]
    assert (spec["temperature"], spec["top_k"], spec["seed"], spec["slot"]) == (0.5, 3, 2**64 - 1, 4)
    others = ({"logprobs": 0}, {"typical_p": 0.5}, {"presence_penalty": 1}, {"min_tokens": 1}, {"logit_bias": {3: 1.0}})
    for params in others:
        assert native.sample_spec(SamplingParams(**params), 0, 0, 0) is None
