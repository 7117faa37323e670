"""Split models give the single process's answers: bitwise over stages and replicas, within a bound over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.model.family_models import save_family
from tests.tiny import write_tiny

from headrace import LLM, SamplingParams
from headrace.assemble import build_engine, open_model
from headrace.completion import Output
from headrace.config import Settings
from headrace.errors import CapacityError, ModelNotFoundError
from headrace.kernels import native
from headrace.plan.plan import PlanError
from headrace.types import GrammarSpec, Request

RNG = np.random.default_rng(3)
LENGTHS = [1, 2, 3, 5, 8, 13, 31, 32, 33, 63, 64, 65, 90, 128, 7, 40] * 4
PROMPTS = [RNG.integers(3, 259, length).tolist() for length in LENGTHS]
for index in range(16, 64):  # prefixes in common
    PROMPTS[index][: LENGTHS[index] * 3 // 4] = PROMPTS[index % 16][: LENGTHS[index] * 3 // 4]
NEW = 12
Alone = Callable[..., list[Output]]  # by op set, and format of keys and values

EXACT = ["0-4", "0-2 | 3-4", "0-0 | 1-3 | 4-4", "0-1 | 2-4 x2", "0-1 x2 | 2-4; routing=round-robin"]
RANKS = ["0-4 /2", "0-1 /2 | 2-4 /2", "0-4 /3"]
BOUND = 2e-5  # of the largest logit: float32 sums over 160 columns in another order, five layers deep
ROUNDED = 2e-2  # the same, where keys and values that differ in the last bits are rounded to bfloat16


def params(index: int) -> SamplingParams:
    """All that sampling can be asked for."""
    shared: dict[str, Any] = {"max_tokens": NEW, "ignore_eos": True, "return_logits": True}
    drawn: dict[str, Any] = shared | {"temperature": 0.9, "seed": index}
    return [
        SamplingParams(temperature=0, **shared),
        SamplingParams(**drawn),
        SamplingParams(top_p=0.9, top_k=50, **drawn),
        SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, **drawn),
        SamplingParams(logprobs=3, **drawn),
        SamplingParams(prompt_logprobs=2, **drawn),
        SamplingParams(n=3, max_tokens=NEW, seed=index, ignore_eos=True),
        SamplingParams(stop=("a", "\n", "7"), max_tokens=40, seed=index, ignore_eos=True),
        SamplingParams(grammar=GrammarSpec("regex", "[a-f]{3,9}"), max_tokens=20, seed=index),
        SamplingParams(temperature=0, logit_bias={70: 3.0}, min_tokens=3, **shared),
    ][index % 10]


def ask(llm: LLM) -> list[Output]:
    outputs = llm.generate(PROMPTS, [params(index) for index in range(len(PROMPTS))])
    while llm.engine.busy:  # what a stop string made superfluous
        llm.engine.step()
    llm.engine.scheduler.check()
    assert all(pool.available == pool.count - 1 for pool in llm.engine.scheduler.routes.pools), "every page came back"
    return outputs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", layers=5))


@pytest.fixture(scope="module")
def alone(tiny: str) -> Alone:
    @cache
    def get(kernels: str, kv_dtype: str = "auto") -> list[Output]:
        if kernels == "native" and native.missing():
            pytest.skip(str(native.missing()))
        with LLM(tiny, kernels=kernels, kv_dtype=kv_dtype, threads=1) as llm:
            return ask(llm)

    return get


def same(ours: list[Output], theirs: list[Output]) -> None:
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for sample, expected in zip(one.samples, other.samples, strict=True):
            assert sample.token_ids == expected.token_ids, f"prompt {index}"
            assert (sample.text, sample.finish_reason) == (expected.text, expected.finish_reason)
            assert sample.logprobs == expected.logprobs
        assert one.prompt_logprobs == other.prompt_logprobs
        assert (one.logits is None) == (other.logits is None)
        if one.logits is not None and other.logits is not None:
            assert one.logits.tobytes() == other.logits.tobytes(), f"logits of prompt {index}"


def close(ours: list[Output], theirs: list[Output], bound: float, rows: int = 400) -> float:
    """Compare up to where a near tie was decided otherwise; the largest difference, relative to the largest logit."""
    worst, compared = 0.0, 0
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert all(sample.finish_reason in ("length", "stop") for sample in one.samples)
        if one.logits is None or other.logits is None:
            continue
        greedy = index % 10 == 0
        for row, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
            error = float(np.abs(one.logits[row] - other.logits[row]).max() / np.abs(other.logits[row]).max())
            worst, compared = max(worst, error), compared + 1
            if a != b:
                first, second = np.sort(other.logits[row])[:-3:-1]
                assert not greedy or first - second < 2 * bound * np.abs(other.logits[row]).max(), f"prompt {index}"
                break
    assert compared > rows, "hardly anything was compared"
    assert worst < bound, worst
    return worst


@pytest.mark.parametrize("plan", EXACT)
def test_stages_and_replicas(tiny: str, alone: Alone, plan: str) -> None:
    with LLM(tiny, plan=plan) as llm:
        same(ask(llm), alone("native"))
        again = ask(llm)
        same(again, alone("native"))
        assert sum(output.timings.cached_tokens for output in again) > 300, "the prefix cache must have been used"
        whole = llm.logits(PROMPTS[13])
    with LLM(tiny) as llm:
        assert llm.logits(PROMPTS[13]).tobytes() == whole.tobytes()


@pytest.mark.parametrize("plan", ["0-0 | 1-3 | 4-4", "0-1 x2 | 2-4"])
def test_stages_and_replicas_of_the_reference_set(tiny: str, alone: Alone, plan: str) -> None:
    with LLM(tiny, plan=plan, kernels="reference") as llm:
        same(ask(llm), alone("reference"))


@pytest.mark.parametrize(("kv_dtype", "bound"), [("float32", BOUND), ("auto", ROUNDED)])
@pytest.mark.parametrize("plan", RANKS)
def test_ranks(tiny: str, alone: Alone, plan: str, kv_dtype: str, bound: float) -> None:
    with LLM(tiny, plan=plan, kv_dtype=kv_dtype) as llm:
        outputs = ask(llm)
        close(outputs, alone("native", kv_dtype), bound)
        same(ask(llm), outputs)  # whatever else is in the batch, and from the prefix cache
    with pytest.raises(AssertionError):
        same(outputs, alone("native", kv_dtype))  # so small a difference would be seen


def test_ranks_of_the_reference_set(tiny: str, alone: Alone) -> None:
    with LLM(tiny, plan="0-2 | 3-4 /2", kernels="reference") as llm:
        close(ask(llm), alone("reference"), BOUND)


def test_threads_that_take_rows_of_their_own(tiny: str, alone: Alone) -> None:
    """One thread may be in the head, for the rows of a scored prompt, while another is in the layers."""
    with LLM(tiny, threads=2, prefix_cache=False) as llm:
        for _ in range(4):
            same(ask(llm), alone("native"))


# The real model, at the precision of its file


SMOLLM2_EXACT = ["0-29", "0-14 | 15-29", "0-3 | 4-20 | 21-29", "0-14 | 15-29 x2", "0-14 x2 | 15-29"]
SMOLLM2_RANKS = ["0-29 /2", "0-14 /2 | 15-29 /2", "0-29 /3"]
QUANTISED = 0.08  # of the largest logit: sums in another order round to another int8 now and then, thirty layers deep


@pytest.fixture(scope="module")
def smollm2_alone(smollm2: Path) -> list[Output]:
    with LLM(str(smollm2), threads=1) as llm:
        return ask(llm)


@pytest.mark.slow
@pytest.mark.parametrize("plan", SMOLLM2_EXACT)
def test_smollm2_over_stages_and_replicas(smollm2: Path, smollm2_alone: list[Output], plan: str) -> None:
    with LLM(str(smollm2), plan=plan) as llm:
        same(ask(llm), smollm2_alone)


@pytest.mark.slow
@pytest.mark.parametrize("plan", SMOLLM2_RANKS)
def test_smollm2_over_ranks(smollm2: Path, smollm2_alone: list[Output], plan: str) -> None:
    with LLM(str(smollm2), plan=plan) as llm:
        outputs = ask(llm)
        close(outputs, smollm2_alone, QUANTISED, 150)
        same(ask(llm), outputs)


# Families: layers with and without a window, and layers of experts


def answers(path: Path, **settings: Any) -> dict[str, tuple[list[int], bytes]]:
    engine, _ = build_engine(open_model(str(path)), Settings(**settings))
    try:
        for index in range(24):
            ids = tuple(token % 97 for token in PROMPTS[index])
            drawn = SamplingParams(temperature=index % 2, max_tokens=NEW, ignore_eos=True, return_logits=True)
            engine.add(Request(id=str(index), prompt_ids=ids, params=drawn, seed=index))
        found: dict[str, tuple[list[int], list[bytes]]] = {str(index): ([], []) for index in range(24)}
        while engine.busy:
            for event in engine.step():
                assert event.error is None
                found[event.request_id][0].extend(event.tokens)
                if event.logits is not None:
                    found[event.request_id][1].append(event.logits.tobytes())
        engine.scheduler.check()
        return {name: (tokens, b"".join(logits)) for name, (tokens, logits) in found.items()}
    finally:
        engine.close()


@pytest.fixture(scope="module", params=["gemma3", "qwen3moe"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    save_family(request.param, folder, [1, 2, 3])
    yield folder


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_families(family: Path, kernels: str) -> None:
    if kernels == "native" and native.missing():
        pytest.skip(str(native.missing()))
    alone = answers(family, kernels=kernels)
    assert answers(family, kernels=kernels, plan="3; routing=least-kv") == alone
    if kernels == "native":
        assert answers(family, kernels=kernels, plan="* x2 | *") == alone
        ranks = answers(family, kernels=kernels, plan="* /2 | *")
        assert sum(ranks[name][0] == alone[name][0] for name in alone) >= len(alone) - 2  # but near ties


# What cannot be


def test_refusals(tiny: str, tmp_path: Path) -> None:
    for plan, said in (("0-3", "5"), ("0-1 | 3-4", "2"), ("0-4 /7", "6 heads"), ("0-4 x0", "x")):
        with pytest.raises(PlanError, match=said):
            LLM(tiny, plan=plan)
    with pytest.raises(CapacityError, match="raise kv_memory"):
        LLM(tiny, plan="0-2 | 3-4", kv_memory=1000)
    with pytest.raises(ModelNotFoundError):
        LLM(str(tmp_path / "none.gguf"), plan="2")
