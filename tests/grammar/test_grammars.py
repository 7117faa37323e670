"""Grammars: what is refused and how soon, and that a sequence's tokens stay the same whatever happens around it."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import LLM, SamplingParams
from headrace.errors import RequestError
from headrace.grammar.check import BYTES, SECONDS
from headrace.grammar.compiled import MAX_CACHED, Compiler, Grammars, Matcher
from headrace.text.tokenizer import Tokenizer
from headrace.types import MAX_GRAMMAR_CHARS, GrammarSpec, Request

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


def chain(length: int, line: str, last: str) -> GrammarSpec:
    lines = [line.format(here=index, there=index + 1) for index in range(length)]
    return GrammarSpec("grammar", "\n".join(["start: a0", *lines, last.format(here=length)]))


@pytest.fixture(scope="module")
def llm(tiny: str) -> Iterator[LLM]:
    with LLM(tiny) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(llm: LLM) -> Tokenizer:
    return llm.tokenizer


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, llm: LLM) -> Iterator[Grammars]:
    grammars = Grammars(lambda: tokenizer, llm.spec.vocab_size)
    yield grammars
    grammars.close()


def matcher(grammars: Grammars, tokenizer: Tokenizer, spec: GrammarSpec, **params: Any) -> Matcher:
    request = Request(
        id="x", prompt_ids=(5,), params=SamplingParams(grammar=spec, **params), seed=0, stop_ids=tokenizer.eos_ids
    )
    found = grammars.matcher(request)
    assert found is not None
    return found


# What is refused


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("regex", r"(a)\1"), "backreferences"),
        (GrammarSpec("regex", r"(?=a)b"), "look-around"),
        (GrammarSpec("json_schema", "{nope"), "line 1"),
        (GrammarSpec("json_schema", "7"), "object schema"),
        (schema({"type": "strin"}), "strin"),
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"$ref": "http://127.0.0.1:9/x.json"}), "does not fetch"),
        (schema({"$ref": "#"}), "no text can match"),
        (GrammarSpec("json_schema", '{"anyOf":[' * 500 + "{}" + "]}" * 500), "recursion limit"),
        (GrammarSpec("regex", "(" * 5000 + "a" + ")*" * 5000), "nest"),
        (GrammarSpec("grammar", "start: " + "(" * 5000 + '"a"' + ")*" * 5000), "nest"),
        (GrammarSpec("grammar", "start: missing"), "missing"),
        (GrammarSpec("grammar", "start: start"), "no text can match"),
        (GrammarSpec("grammar", "certainly no grammar"), "::="),
        (chain(5000, "a{here}: a{there}", 'a{here}: "x"'), "nests too deeply"),
        (chain(40, "a{here}: a{there} a{there}", 'a{here}: "x"'), "cannot be used"),
        (GrammarSpec("grammar", 'start: A\nA: B{1000}\nB: C{1000}\nC: "x"{1000}'), "cannot be used|takes more"),
    ],
    ids=lambda value: None if isinstance(value, str) else value.text[:20],
)
def test_what_is_malformed_or_too_much_is_refused_soon(grammars: Grammars, spec: GrammarSpec, problem: str) -> None:
    began = time.monotonic()
    for _ in range(2):  # and again the same, at no cost
        with pytest.raises(RequestError, match=problem):
            grammars.compile(spec)
    assert time.monotonic() - began < SECONDS + 3
    grammars.compile(GrammarSpec("regex", "after"))  # the next is served


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|b)*a(a|b){20}", "(.*a){50}", "((a{0,100}){0,100}){0,100}"])
def test_patterns_that_explode_elsewhere_cost_little(grammars: Grammars, tokenizer: Tokenizer, pattern: str) -> None:
    """Each token's mask is bounded work; where a grammar needs more, its sequence ends with an error."""
    follow = matcher(grammars, tokenizer, GrammarSpec("regex", pattern))
    rng, output, worst = np.random.default_rng(1), [], 0.0
    try:
        for _ in range(150):
            began = time.thread_time()
            allowed = np.flatnonzero(follow.allowed(output))
            worst = max(worst, time.thread_time() - began)
            if not (follows := [token for token in allowed if token not in tokenizer.eos_ids]):
                break
            output.append(int(rng.choice(follows)))
    except RequestError as error:
        assert "cannot be followed" in str(error)
    assert worst < 0.5


def test_slow_and_large_ones_are_given_up(grammars: Grammars) -> None:
    """It would take twice the time and half again the memory."""
    began = time.monotonic()
    with pytest.raises(RequestError, match=f"{SECONDS:g} s|{BYTES >> 20} MiB"):
        grammars.compile(schema({"type": "integer", "multipleOf": 9999991}))
    assert time.monotonic() - began < SECONDS + 2


def test_sizes_and_kinds_are_bounded() -> None:
    with pytest.raises(RequestError, match=str(MAX_GRAMMAR_CHARS)):
        GrammarSpec("regex", "a" * (MAX_GRAMMAR_CHARS + 1))
    with pytest.raises(RequestError, match="one of json_schema, regex, grammar"):
        GrammarSpec("xml", "a")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="GrammarSpec"):
        SamplingParams(grammar="a+")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="choices"):
        GrammarSpec.choice([])


def test_the_cache_is_bounded(tokenizer: Tokenizer, llm: LLM) -> None:
    grammars = Grammars(lambda: tokenizer, llm.spec.vocab_size)
    specs = [GrammarSpec("regex", f"a{index}") for index in range(MAX_CACHED + 10)]
    for spec in specs:
        grammars.compile(spec)
    assert grammars.known(specs[-1]) and not grammars.known(specs[0])
    assert grammars.open(specs[0]).is_accepting() is False  # it is compiled again
    grammars.close()


def test_a_checker_that_died_is_replaced(tokenizer: Tokenizer, llm: LLM) -> None:
    grammars = Grammars(lambda: tokenizer, llm.spec.vocab_size)
    grammars.compile(GrammarSpec("regex", "a"))
    process = grammars._checker._process
    assert process is not None
    process.kill()
    process.wait()
    grammars.compile(GrammarSpec("regex", "b"))
    grammars.close()
    assert grammars._checker._process is None


def test_compiling_beside_a_loop(grammars: Grammars) -> None:
    rung = threading.Event()
    compiler = Compiler(grammars, rung.set)
    compiler.start("good", GrammarSpec("regex", "x+"))
    compiler.start("bad", GrammarSpec("regex", "(x"))
    done: dict[str, str | None] = {}
    while len(done) < 2:
        assert rung.wait(20)
        rung.clear()
        done |= dict(compiler.take())
    assert done["good"] is None and "unclosed" in (done["bad"] or "")


# What may follow


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_walk_through_a_grammar_gives_a_match(grammars: Grammars, tokenizer: Tokenizer, random: Any) -> None:
    pattern = r"[a-c]{2,5}(-[0-9]+){1,2}é?"
    follow, output = matcher(grammars, tokenizer, GrammarSpec("regex", pattern)), []
    while len(output) < 60:
        allowed = [int(token) for token in np.flatnonzero(follow.allowed(output))]
        token = random.choice(allowed)
        if token in tokenizer.eos_ids:
            break
        output.append(token)
    else:
        return
    assert re.fullmatch(pattern, tokenizer.decode(output))
    fresh = matcher(grammars, tokenizer, GrammarSpec("regex", pattern))
    assert (fresh.allowed(output) == follow.allowed(output)).all(), "a function of the tokens"


def test_ends_are_allowed_where_the_grammar_may_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    spec, ends = GrammarSpec("regex", "ab?"), list(tokenizer.eos_ids)
    a, b = tokenizer.encode("a", add_special=False)[-1], tokenizer.encode("b", add_special=False)[-1]
    follow = matcher(grammars, tokenizer, spec)
    assert not follow.allowed([])[ends].any() and follow.allowed([a])[ends].all() and follow.allowed([a])[b]
    on = matcher(grammars, tokenizer, spec, ignore_eos=True)
    assert not on.allowed([a])[ends].any() and on.allowed([a, b])[ends].all(), "where nothing else can follow, it ends"


# Generation


def test_answers_keep_to_their_grammar(llm: LLM) -> None:
    params = [
        SamplingParams(grammar=GrammarSpec("regex", r"\d{3}-\d{4}"), seed=1),
        SamplingParams(grammar=GrammarSpec.choice(["red", "gr\"e'en\n", "blåbær"]), temperature=0),
        SamplingParams(grammar=GrammarSpec("grammar", 'root ::= "x" [0-9] "y"'), min_tokens=5, ignore_eos=True, seed=2),
        SamplingParams(grammar=schema(PERSON), seed=3, max_tokens=100),
        SamplingParams(grammar=GrammarSpec("regex", "[a-z]{30}"), max_tokens=5),
    ]
    outputs = llm.generate(["abc"] * 5, params)
    assert re.fullmatch(r"\d{3}-\d{4}", outputs[0].text) and outputs[0].finish_reason == "stop"
    assert outputs[1].text in ("red", "gr\"e'en\n", "blåbær")
    assert re.fullmatch(r"x\dy", outputs[2].text) and outputs[2].finish_reason == "stop"
    person = json.loads(outputs[3].text)
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 99 and isinstance(person["name"], str)
    assert outputs[4].finish_reason == "length"
    assert llm.generate("abc", SamplingParams(seed=1, max_tokens=12))[0].text != outputs[0].text, "a control"


def test_a_bad_grammar_fails_its_request_alone(llm: LLM) -> None:
    with pytest.raises(RequestError, match="unclosed"):
        llm.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(grammar=GrammarSpec("regex", "(x"))])
    assert not llm.engine.busy or llm.generate("a", SamplingParams(max_tokens=2))
    explodes = SamplingParams(
        grammar=GrammarSpec("regex", "((a{0,100}){0,100}){0,100}b"), max_tokens=300, ignore_eos=True
    )
    outputs = llm.generate(["a", "b"], [explodes, SamplingParams(max_tokens=2, ignore_eos=True)])
    assert len(outputs[1].token_ids) == 2
    if outputs[0].finish_reason == "error":
        assert "cannot be followed" in (outputs[0].samples[0].error or "")


def test_logprobs_and_penalties_go_with_a_grammar(llm: LLM) -> None:
    params = SamplingParams(
        grammar=GrammarSpec("regex", "[ab]{6}"), logprobs=2, repetition_penalty=1.3, top_k=3, min_p=0.01, seed=5
    )
    output = llm.generate("abc", params)[0]
    assert re.fullmatch("[ab]{6}", output.text) and len(output.logprobs) == len(output.token_ids)


def mixed(index: int) -> SamplingParams:
    """Rows with and without a grammar, greedy and sampled."""
    grammar = [None, schema(PERSON), GrammarSpec("regex", "[a-f]{3,9}(, [0-9]{2})*"), None][index % 4]
    return SamplingParams(max_tokens=24, seed=index, temperature=[0.0, 1.0, 0.8][index % 3], grammar=grammar)


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_the_same_tokens_alone_batched_preempted_and_with_steps_in_flight(tiny: str, kernels: str) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 259, size).tolist() for size in (1, 7, 31, 32, 33, 60, 65, 90) * 2]
    params = [mixed(index) for index in range(len(prompts))]
    with LLM(tiny, kernels=kernels, prefix_cache=False, steps_in_flight=1) as llm:
        alone = [llm.generate([one], params[index])[0].token_ids for index, one in enumerate(prompts)]
        page_bytes = llm.config.kv_bytes_per_token * 16
    for steps in (1, 2, 3):
        with LLM(tiny, kernels=kernels, steps_in_flight=steps) as llm:
            assert [output.token_ids for output in llm.generate(prompts, params)] == alone
        small: dict[str, Any] = {"page_size": 16, "kv_memory": page_bytes * 16, "max_context": 128}
        with LLM(tiny, kernels=kernels, steps_in_flight=steps, **small) as llm:
            outputs = llm.generate(prompts, params)
            assert sum(output.timings.preemptions for output in outputs) > 0
            assert [output.token_ids for output in outputs] == alone


def test_a_request_goes_on_where_another_engine_stopped(llm: LLM) -> None:
    """As the door does after an engine's death: the tokens so far are given along."""
    params = SamplingParams(grammar=schema(PERSON), seed=4, max_tokens=60)
    whole = llm.generate([[5, 6, 7]], params)[0].token_ids
    for cut in (1, 5, len(whole) - 1):
        request = Request(
            id="again", prompt_ids=(5, 6, 7), params=params, seed=4, stop_ids=llm.tokenizer.eos_ids,
            resumed=tuple(whole[:cut]),
        )  # fmt: skip
        llm.engine.add(request)
        tokens = whole[:cut]
        while llm.engine.busy:
            tokens += [token for event in llm.engine.step() for token in event.tokens]
        assert tokens == whole


def test_a_real_model_writes_json(smollm2: Path) -> None:
    with LLM(str(smollm2), threads=2) as llm:
        params = SamplingParams(grammar=schema(PERSON), temperature=0, max_tokens=60)
        text = llm.chat([{"role": "user", "content": "Invent a person. Answer as JSON."}], params).text
        assert set(json.loads(text)) == {"name", "age"}
        spoken = llm.chat(
            [{"role": "user", "content": "Is water wet?"}], SamplingParams(grammar=GrammarSpec.choice(["yes", "no"]))
        )
        assert spoken.text in ("yes", "no")
