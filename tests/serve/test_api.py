"""The routes, with the real model: what they answer is what the offline API says."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import numpy as np
import pytest
from tests.serve.harness import ServerProcess

from headrace import LLM, SamplingParams

GREEDY = {"temperature": 0, "return_token_ids": True}
CHAT = [{"role": "user", "content": "Name three rivers."}]


def ok(answer: tuple[int, Any]) -> Any:
    status, body = answer
    assert status == 200, body
    return body


def test_a_completion_is_the_offline_one(server: ServerProcess, offline: LLM) -> None:
    body = ok(server.post("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 12, **GREEDY}))
    expected = offline.generate("Once upon a time", SamplingParams(max_tokens=12, temperature=0))[0]
    (choice,) = body["choices"]
    assert choice["text"] == expected.text and choice["token_ids"] == expected.token_ids
    assert choice["finish_reason"] == expected.finish_reason == "length"
    assert body["object"] == "text_completion" and body["model"] == "smol" and body["id"].startswith("cmpl-")
    prompt = len(expected.prompt_token_ids)
    assert body["usage"]["prompt_tokens"] == prompt and body["usage"]["total_tokens"] == prompt + 12
    timings = body["timings"]
    assert timings["decode_ms"] > 0 and timings["total_ms"] >= timings["first_token_ms"] > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_streamed_chat_is_the_whole_one_and_the_offline_one(server: ServerProcess, offline: LLM, seed: int) -> None:
    body = {"messages": CHAT, "max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": seed}
    whole = ok(server.post("/v1/chat/completions", body))
    expected = offline.chat(CHAT, SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=seed))
    assert whole["choices"][0]["message"]["content"] == expected.text
    events = list(server.stream("/v1/chat/completions", {**body, "return_token_ids": True}))
    assert events.pop() == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant" and deltas[0]["content"] != "", "no chunk before the first token"
    assert not any("role" in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == expected.text
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == expected.token_ids
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"][0]["finish_reason"] == expected.finish_reason
    assert len({event["id"] for event in events}) == 1 and "usage" not in events[-1]


def test_usage_in_streams(server: ServerProcess) -> None:
    body = {"prompt": "One, two,", "max_tokens": 5, "temperature": 0}
    events = list(server.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}}))
    assert events[-1] == "[DONE]" and events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 5 and "usage" not in events[-3]
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = list(server.stream("/v1/completions", {**body, "stream_options": options}))
    assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [1, 2, 3, 4, 5, 5]


def test_cached_tokens_are_told(server: ServerProcess) -> None:
    body = {"prompt": list(range(1000, 1100)), "max_tokens": 1}
    assert ok(server.post("/v1/completions", body))["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert ok(server.post("/v1/completions", body))["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    salted = ok(server.post("/v1/completions", {**body, "cache_salt": "mine"}))
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_lists_of_texts_and_of_token_ids(server: ServerProcess, offline: LLM) -> None:
    texts = ["The sun", "The moon is"]
    body = ok(server.post("/v1/completions", {"prompt": texts, "max_tokens": 4, "n": 2, **GREEDY}))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    expected = offline.generate(texts, SamplingParams(max_tokens=4, temperature=0))
    assert [choice["text"] for choice in body["choices"]] == [expected[i // 2].text for i in range(4)]
    ids = [output.prompt_token_ids for output in expected]
    again = ok(server.post("/v1/completions", {"prompt": ids, "max_tokens": 4, **GREEDY}))
    assert [choice["token_ids"] for choice in again["choices"]] == [output.token_ids for output in expected]
    one = ok(server.post("/v1/completions", {"prompt": ids[0], "max_tokens": 4, **GREEDY}))
    assert one["choices"][0]["token_ids"] == expected[0].token_ids
    streamed: dict[int, str] = {}
    for event in list(server.stream("/v1/completions", {"prompt": texts, "max_tokens": 4, "temperature": 0}))[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert streamed == {0: expected[0].text, 1: expected[1].text}


def test_samples_differ_and_a_seed_repeats_them(server: ServerProcess) -> None:
    body = {"prompt": "A word:", "max_tokens": 6, "n": 4, "seed": 7}
    first = [choice["text"] for choice in ok(server.post("/v1/completions", body))["choices"]]
    assert len(set(first)) > 1
    assert first == [choice["text"] for choice in ok(server.post("/v1/completions", body))["choices"]]


def test_best_of_shows_the_likeliest(server: ServerProcess) -> None:
    body = {"prompt": "My favourite", "max_tokens": 5, "seed": 3, "logprobs": 0, "ignore_eos": True}
    every = ok(server.post("/v1/completions", {**body, "n": 5}))["choices"]
    mean = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in every]
    best = ok(server.post("/v1/completions", {**body, "n": 1, "best_of": 5}))
    assert best["choices"][0]["text"] == every[int(np.argmax(mean))]["text"]
    assert best["usage"]["completion_tokens"] == 25


def test_logprobs_are_those_of_the_model(server: ServerProcess, offline: LLM) -> None:
    body = {"prompt": "Water is", "max_tokens": 3, "temperature": 0, "logprobs": 2, "echo": True}
    choice = ok(server.post("/v1/completions", {**body, "return_token_ids": True}))["choices"][0]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    logits = offline.logits(ids[:-1]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None and len(logprobs["tokens"]) == len(ids)
    assert logprobs["token_logprobs"][1:] == pytest.approx(
        [expected[i, ids[i + 1]] for i in range(len(ids) - 1)], abs=1e-4
    )
    assert choice["text"].startswith("Water is") and "".join(logprobs["tokens"]) == choice["text"]
    offsets = logprobs["text_offset"]
    assert all(choice["text"][a:].startswith(token) for a, token in zip(offsets, logprobs["tokens"], strict=True))
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    chat = {"messages": CHAT, "max_tokens": 2, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    entries = ok(server.post("/v1/chat/completions", chat))["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [3, 3]
    assert entries[0]["top_logprobs"][0]["token"] == entries[0]["token"] == bytes(entries[0]["bytes"]).decode()


def test_streamed_logprobs_come_with_their_tokens(server: ServerProcess) -> None:
    chat = {"messages": CHAT, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    whole = ok(server.post("/v1/chat/completions", chat))["choices"][0]["logprobs"]["content"]
    events = list(server.stream("/v1/chat/completions", chat))[:-1]
    assert [entry for event in events for entry in event["choices"][0]["logprobs"]["content"]] == whole


def test_a_prompt_is_scored_and_echoed_without_generating(server: ServerProcess, offline: LLM) -> None:
    score = ok(server.post("/v1/score", {"prompt": ["Paris is in France", "x"], "top_logprobs": 1}))
    ids = score["data"][0]["token_ids"]
    logits = offline.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = [logprobs[i, ids[i + 1]] for i in range(len(ids) - 1)]
    assert [entry["logprob"] for entry in score["data"][0]["logprobs"]] == pytest.approx(expected, abs=1e-4)
    assert score["data"][0]["total_logprob"] == pytest.approx(math.fsum(expected), abs=1e-3)
    assert score["data"][1]["logprobs"] == [] and score["data"][1]["mean_logprob"] is None
    body = {"prompt": "Paris is in France", "max_tokens": 0, "echo": True, "logprobs": 1}
    echoed = ok(server.post("/v1/completions", body))
    assert echoed["choices"][0]["text"] == "Paris is in France" and echoed["usage"]["completion_tokens"] == 0
    assert echoed["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)


def test_an_echo_can_be_streamed(server: ServerProcess) -> None:
    body = {"prompt": ["Water is", "Fire"], "max_tokens": 3, "temperature": 0, "logprobs": 1, "echo": True}
    whole = ok(server.post("/v1/completions", body))["choices"]
    text, logprobs = ["", ""], [[], []]
    for event in list(server.stream("/v1/completions", body))[:-1]:
        for choice in event["choices"]:
            text[choice["index"]] += choice["text"]
            logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert text == [choice["text"] for choice in whole] and text[1].startswith("Fire")
    assert logprobs == [choice["logprobs"]["token_logprobs"] for choice in whole]


def test_stop_strings_and_tokens(server: ServerProcess) -> None:
    body = {"prompt": "One two three four", "max_tokens": 40, **GREEDY}
    whole = ok(server.post("/v1/completions", body))["choices"][0]
    stop = whole["text"][10:14]
    choice = ok(server.post("/v1/completions", {**body, "stop": [stop]}))["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == whole["text"].partition(stop)[0]
    kept = ok(server.post("/v1/completions", {**body, "stop": stop, "include_stop_str_in_output": True}))["choices"][0]
    assert kept["text"] == choice["text"] + stop
    token = whole["token_ids"][5]
    cut = ok(server.post("/v1/completions", {**body, "stop_token_ids": [token]}))["choices"][0]
    assert cut["token_ids"] == whole["token_ids"][: whole["token_ids"].index(token) + 1]


def test_parameters_reach_the_engine(server: ServerProcess) -> None:
    base = {"prompt": "The", "max_tokens": 8, **GREEDY}
    plain = ok(server.post("/v1/completions", base))["choices"][0]["token_ids"]
    first = plain[0]
    for change in (
        {"logit_bias": {str(first): -100}},
        {"repetition_penalty": 5.0},
        {"frequency_penalty": 2.0, "presence_penalty": 2.0, "max_tokens": 30},
        {"temperature": 5.0, "seed": 1},
    ):
        assert ok(server.post("/v1/completions", {**base, **change}))["choices"][0]["token_ids"][:8] != plain, change
    for change in (
        {"top_k": 1, "temperature": 9.0},
        {"top_p": 0.0, "temperature": 9.0},
        {"min_p": 1.0, "temperature": 9.0},
    ):
        assert ok(server.post("/v1/completions", {**base, **change}))["choices"][0]["token_ids"] == plain, change
    assert ok(server.post("/v1/completions", {**base, "top_k": -1, "user": "x", "unknown": {"a": 1}}))


def test_tokens_and_back(server: ServerProcess, offline: LLM) -> None:
    text = "Héllo <|im_end|> 世界"
    body = ok(server.post("/tokenize", {"prompt": text, "return_token_strs": True}))
    assert body["tokens"] == offline.tokenizer.encode(text) and body["count"] == len(body["tokens"])
    assert len(body["token_strs"]) == body["count"]
    assert ok(server.post("/detokenize", {"tokens": body["tokens"]}))["prompt"] == text
    chat = ok(server.post("/tokenize", {"messages": CHAT}))
    assert (
        ok(server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1}))["usage"]["prompt_tokens"]
        == chat["count"]
    )
    info = ok(server.call("GET", "/tokenizer_info"))
    eos = ok(server.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}))["tokens"]
    assert len(eos) == 1 and eos[0] in info["eos_token_ids"]
    assert info["vocab_size"] == offline.spec.vocab_size and info["chat_template"]


def test_models_version_health_and_metrics(server: ServerProcess) -> None:
    (card,) = ok(server.call("GET", "/v1/models"))["data"]
    assert card["id"] == "smol" and card["max_model_len"] == 8192
    assert ok(server.call("GET", "/v1/models/smol"))["id"] == "smol"
    assert server.call("GET", "/v1/models/other")[0] == 404
    assert ok(server.call("GET", "/health")) == {"status": "ok"}
    assert ok(server.call("GET", "/ready"))["models"] == {"smol": "ready"}
    assert ok(server.call("GET", "/version"))["version"]
    before = server.metric("generation_tokens_total"), server.metric("prompt_tokens_total")
    ok(server.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True}))
    assert server.metric("generation_tokens_total") == before[0] + 9
    assert server.metric("prompt_tokens_total") == before[1] + 3
    assert server.metric("time_to_first_token_seconds_count") > 0 and server.metric("engine_ready") == 1


def test_the_openapi_document_names_every_route(server: ServerProcess) -> None:
    document = ok(server.call("GET", "/openapi.json"))
    assert document["openapi"].startswith("3.1") and set(document["paths"]) >= {"/v1/chat/completions", "/health"}
    refs = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            refs.update({value["$ref"]} if "$ref" in value else ())
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)
    assert all(ref.rpartition("/")[2] in document["components"]["schemas"] for ref in refs)
    fields = json.dumps(document["components"]["schemas"]["ChatBody"])
    assert all(name in fields for name in ("messages", "deadline_ms", "cache_salt", "top_k"))


def test_streams_under_load_equal_the_offline_tokens(server: ServerProcess, offline: LLM) -> None:
    """24 streams at once, sampled and greedy, long and short prompts, each with its own seed."""
    jobs = [
        {"prompt": f"Story {i}: " + "word " * (i * 7 % 90), "max_tokens": 10 + i, "seed": i, "temperature": (i % 3) / 2}
        for i in range(24)
    ]
    got: dict[int, list[int]] = {}

    def one(index: int) -> None:
        events = list(server.stream("/v1/completions", {**jobs[index], "return_token_ids": True}))
        assert events[-1] == "[DONE]"
        got[index] = [token for event in events[:-1] for token in event["choices"][0]["token_ids"]]

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, job in enumerate(jobs):
        params = SamplingParams(max_tokens=job["max_tokens"], seed=job["seed"], temperature=job["temperature"])
        assert got[index] == offline.generate(job["prompt"], params)[0].token_ids, index
