"""The promise of exactness: a request's tokens and logits are the same bytes whatever the engine does around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.tiny import write_tiny

from headrace import LLM, SamplingParams
from headrace.completion import Output
from headrace.config import Settings
from headrace.kernels import native

RNG = np.random.default_rng(1)
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 31, 32, 33, 34, 63, 64, 65, 90, 128] * 2
PROMPTS = [RNG.integers(3, 259, length).tolist() for length in LENGTHS]
for index in range(16, 32):  # the second half shares prefixes with the first
    PROMPTS[index][: LENGTHS[index] * 3 // 4] = PROMPTS[index - 16][: LENGTHS[index] * 3 // 4]
NEW = 12
Setup = tuple[str, dict[str, Any]]


def params(index: int) -> SamplingParams:
    """Greedy and sampled, plain and penalised."""
    shared: dict[str, Any] = {"max_tokens": NEW, "ignore_eos": True, "return_logits": True}
    return [
        SamplingParams(temperature=0, **shared),
        SamplingParams(temperature=0.9, seed=index, **shared),
        SamplingParams(temperature=1.2, top_p=0.9, top_k=50, seed=index, **shared),
        SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=1.2, presence_penalty=0.3, seed=index, **shared),
    ][index % 4]


def same(ours: list[Output], alone: list[Output]) -> None:
    for index, (one, other) in enumerate(zip(ours, alone, strict=True)):
        assert one.token_ids == other.token_ids, f"prompt {index}"
        assert one.logits is not None and other.logits is not None
        assert one.logits.tobytes() == other.logits.tobytes(), f"logits of prompt {index}"


SETS = [
    ("reference", "F32", None, "float32"),
    ("reference", "Q8_0", 40, "bfloat16"),
    ("native", "F32", None, "float32"),
    ("native", "Q4_1", 40, "bfloat16"),
    ("native", "Q8_0", None, "int8"),
    ("native", "BF16", None, "float16"),
]


@pytest.fixture(scope="module", params=SETS, ids=lambda row: "-".join(map(str, row)))
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A model file, and the settings that choose the arithmetic."""
    kernels, kind, window, kv_dtype = request.param
    if kernels == "native" and native.missing():
        pytest.skip(str(native.missing()))
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", kind, window=window)
    return str(path), {"kernels": kernels, "kv_dtype": kv_dtype}


@pytest.fixture(scope="module")
def alone(setup: Setup) -> Iterator[list[Output]]:
    model, arithmetic = setup
    with LLM(model, prefix_cache=False, steps_in_flight=1, **arithmetic) as llm:
        yield [llm.generate([prompt], params(index))[0] for index, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefix_cache": False},
        {"max_batch_tokens": 1, "max_sequences": 3},
        {"max_batch_tokens": 7},
        {"max_batch_tokens": 64, "steps_in_flight": 1},
        {"steps_in_flight": 3},
        {"page_size": 16, "policy": "longest-prefix"},
        {"policy": "static", "max_sequences": 5},
    ],
    ids=["default", "uncached", "budget1", "budget7", "budget64", "three-in-flight", "longest-prefix", "static"],
)
def test_batched(setup: Setup, alone: list[Output], settings: dict[str, Any]) -> None:
    count = 8 if settings.get("max_batch_tokens") == 1 else len(PROMPTS)
    model, arithmetic = setup
    with LLM(model, **settings, **arithmetic) as llm:
        same(llm.generate(PROMPTS[:count], [params(index) for index in range(count)]), alone[:count])
        if settings == {}:
            again = llm.generate(PROMPTS[16:], [params(index) for index in range(16, 32)])
            assert sum(output.timings.cached_tokens for output in again) > 0, "the prefix cache must have been used"
            same(again, alone[16:])
        llm.engine.scheduler.check()


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_preempted(setup: Setup, alone: list[Output], steps_in_flight: int) -> None:
    """Pages for about three of 32 sequences."""
    model, arithmetic = setup
    with LLM(model, **arithmetic) as llm:
        page_bytes = llm.config.kv_bytes_per_token * 16
    settings: dict[str, Any] = {"page_size": 16, "kv_memory": page_bytes * 31, "max_context": 160}
    with LLM(model, steps_in_flight=steps_in_flight, **settings, **arithmetic) as llm:
        outputs = llm.generate(PROMPTS, [params(index) for index in range(len(PROMPTS))])
        assert sum(output.timings.preemptions for output in outputs) > 0
        same(outputs, alone)
        llm.engine.scheduler.check()


def test_samples_of_one_request(setup: Setup) -> None:
    """n samples are what n requests with the sample's index would be; they differ, and greedy ones do not."""
    model, arithmetic = setup
    with LLM(model, **arithmetic) as llm:
        sampled = llm.generate([PROMPTS[9]], SamplingParams(n=4, max_tokens=NEW, seed=3, ignore_eos=True))[0]
        again = llm.generate([PROMPTS[9]], SamplingParams(n=4, max_tokens=NEW, seed=3, ignore_eos=True))[0]
        assert [sample.token_ids for sample in sampled.samples] == [sample.token_ids for sample in again.samples]
        assert len({tuple(sample.token_ids) for sample in sampled.samples}) == 4
        first = llm.generate([PROMPTS[9]], SamplingParams(max_tokens=NEW, seed=3, ignore_eos=True))[0]
        assert first.token_ids == sampled.token_ids
        greedy = llm.generate([PROMPTS[9]], SamplingParams(n=3, max_tokens=NEW, temperature=0, return_logits=True))[0]
        assert len({sample.logits.tobytes() for sample in greedy.samples if sample.logits is not None}) == 1
        llm.engine.scheduler.check()


def test_logits_are_those_of_the_steps(setup: Setup, alone: list[Output]) -> None:
    """Prompt logits in one pass equal the logits that decoding saw."""
    model, arithmetic = setup
    with LLM(model, **arithmetic) as llm:
        for index in (3, 12):
            output = alone[index]
            assert output.logits is not None
            full = llm.logits([*PROMPTS[index], *output.token_ids])
            assert full[len(PROMPTS[index]) - 1 : -1].tobytes() == output.logits.tobytes()


def test_settings_are_all_exercised() -> None:
    """A new setting must come with an equality test above, or be named here."""
    covered = {
        "max_batch_tokens",
        "max_sequences",
        "prefix_cache",
        "steps_in_flight",
        "page_size",
        "policy",
        "kv_memory",
        "max_context",
    }
    elsewhere = {"kernels", "threads", "kv_dtype", "activations"}  # they choose the arithmetic
    elsewhere |= {"plan", "listen", "secret_file"}  # test_split.py, test_hosts.py
    assert set(Settings.__struct_fields__) == covered | elsewhere
