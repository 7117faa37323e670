"""/v1/embeddings, by the openai package and by hand: an encoder beside a decoder in one server."""

from __future__ import annotations

import base64
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tests.serve.harness import ServerProcess, until

from headrace import LLM

TEXTS = ["Why is the sky blue?", "Ελληνικά, naïve façades and 中文字 🙂", "water " * 100]
LONG = "water " * 600


@pytest.fixture(scope="module")
def server(minilm: Path, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("embeddings") / "log"
    models = [f"minilm={minilm}", "--model", f"tiny={tiny_model}"]
    with ServerProcess(*models, "--threads", "1", "--kv-memory", "3000000", log=log) as server:
        yield server


@pytest.fixture(scope="module")
def llm(minilm: Path) -> Iterator[LLM]:
    with LLM(str(minilm), threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def embed(server: ServerProcess, given: Any, **more: Any) -> tuple[int, Any]:
    return server.post("/v1/embeddings", {"model": "minilm", "input": given, **more})


def vectors(answer: Any) -> np.ndarray:
    return np.array([entry["embedding"] for entry in answer["data"]], np.float32)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_client(client: openai.OpenAI, llm: LLM, encoding: Any) -> None:
    answer = client.embeddings.create(model="minilm", input=TEXTS, encoding_format=encoding, user="somebody")
    rows = [entry.embedding for entry in answer.data]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]  # type: ignore[arg-type]
    assert np.abs(np.array(rows) - llm.embed(TEXTS)).max() < 1e-6
    assert [entry.index for entry in answer.data] == [0, 1, 2] and answer.model == "minilm"
    tokens = sum(len(llm.tokenizer.encode(text)) for text in TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    plain = client.embeddings.create(model="minilm", input=TEXTS[0])  # asks for base64, and decodes it itself
    assert np.abs(np.array(plain.data[0].embedding) - llm.embed(TEXTS[0])[0]).max() < 1e-6


def test_shapes_of_input(server: ServerProcess, llm: LLM) -> None:
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    expected = llm.embed(TEXTS)
    for given, rows in (
        (TEXTS[0], expected[:1]), (ids[0], expected[:1]), (ids, expected), (TEXTS * 50, np.tile(expected, (50, 1))),
    ):  # fmt: skip
        status, answer = embed(server, given, dimensions=384)
        assert status == 200 and np.abs(vectors(answer) - rows).max() < 1e-6


def test_texts_are_cut_only_if_asked(server: ServerProcess, llm: LLM) -> None:
    limit = llm.spec.context_length
    status, answer = embed(server, ["x", LONG])
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert "text 1" in answer["error"]["message"] and str(limit) in answer["error"]["message"]
    status, answer = embed(server, LONG, truncate_prompt_tokens=-1)
    assert status == 200 and answer["usage"]["prompt_tokens"] == limit
    assert np.abs(vectors(answer) - llm.embed(LONG)).max() < 1e-6
    status, answer = embed(server, LONG, truncate_prompt_tokens=12)
    assert answer["usage"]["prompt_tokens"] == 12
    assert np.abs(vectors(answer) - llm.embed("water " * 10)).max() < 1e-6
    status, answer = embed(server, "é" * 400_000)
    assert status == 400 and "characters" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": []}, "from 1 to 2048"),
        ({"input": ""}, "empty"),
        ({"input": ["x", ""]}, "text 1"),
        ({"input": [[]]}, "empty"),
        ({"input": ["x", 5]}, "mixed"),
        ({"input": [-1]}, "30521"),
        ({"input": [[5], [30522]]}, "text 1"),
        ({"input": ["x"] * 2049}, "2049"),
        ({"input": {"text": "x"}}, "input"),
        ({"input": None}, "input"),
        ({}, "input"),
        ({"input": "x", "encoding_format": "int8"}, "int8"),
        ({"input": "x", "dimensions": 100}, "384"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": 10_000}, "256"),
    ],
)
def test_bad_requests(server: ServerProcess, body: dict[str, Any], says: str) -> None:
    status, answer = server.post("/v1/embeddings", {"model": "minilm", **body})
    assert status == 400 and says in answer["error"]["message"], answer
    assert embed(server, "x")[0] == 200


def test_models_are_not_mixed_up(server: ServerProcess) -> None:
    status, answer = server.post("/v1/embeddings", {"model": "tiny", "input": "x"})
    assert status == 400 and "embeddings" in answer["error"]["message"]
    message = {"messages": [{"role": "user", "content": "x"}]}
    for path, body in (
        ("/v1/chat/completions", message), ("/v1/completions", {"prompt": "x"}), ("/v1/score", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]}),
    ):  # fmt: skip
        status, answer = server.post(path, {"model": "minilm", **body})
        assert status == 400 and "encoder" in answer["error"]["message"], path
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2})[0] == 200
    cards = server.call("GET", "/v1/models")[1]["data"]
    assert {card["id"]: card["max_model_len"] for card in cards}["minilm"] == 256
    assert server.call("GET", "/health")[0] == server.call("GET", "/ready")[0] == 200
    for path in ("/live", "/live?model=minilm", "/live?model=tiny"):
        assert server.call("GET", path)[0] == 200


def test_the_log_and_the_metrics_know(server: ServerProcess) -> None:
    texts = ["Nobody else asks for so many."] * 7
    before = server.metric("prompt_tokens_total")
    _, answer = embed(server, texts)
    tokens = answer["usage"]["prompt_tokens"]
    assert server.metric("prompt_tokens_total") == before + tokens
    # The line follows the answer.
    (line,) = until(lambda: [line for line in server.logs() if line.get("texts") == len(texts)])
    assert line["path"] == "/v1/embeddings" and line["status"] == 200
    assert line["prompt_tokens"] == tokens and line["model"] == "minilm"


def test_a_dead_process_is_replaced_under_requests(server: ServerProcess, llm: LLM) -> None:
    answers: list[tuple[int, Any]] = []
    many = TEXTS * 200
    asking = threading.Thread(target=lambda: answers.append(embed(server, many)))
    asking.start()
    time.sleep(0.3)
    assert asking.is_alive()
    os.kill(server.engine_pids()[0], signal.SIGKILL)  # the model that was loaded first
    asking.join(60)
    status, answer = answers[0]
    assert status == 200 and np.abs(vectors(answer) - np.tile(llm.embed(TEXTS), (200, 1))).max() < 1e-6
    assert server.metric("engine_restarts_total") == 1
    assert embed(server, "x")[0] == 200
