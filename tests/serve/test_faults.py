"""Bad input and faults, a table: each gets the stated status in OpenAI's shape, the next request is served, and nothing
is left behind."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

import pytest
from tests.serve.harness import ServerProcess, until

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> tuple[str, bytes]:
    return COMPLETE, json.dumps({"prompt": "abc", "max_tokens": 4, **fields}).encode()


def chat(**fields: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({"messages": HI, "max_tokens": 4, **fields}).encode()


def text(path: str, body: str | bytes) -> tuple[str, bytes]:
    return path, body if isinstance(body, bytes) else body.encode()


def deep_tool(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


# (what, request, status, words of the message)
BAD: list[tuple[str, tuple[str, bytes], int, str]] = [
    # JSON
    ("no body", text(COMPLETE, ""), 400, "JSON"),
    ("not JSON", text(COMPLETE, "{"), 400, "JSON"),
    ("two values", text(COMPLETE, '{"prompt":"x"} {}'), 400, "JSON"),
    ("not an object", text(COMPLETE, "[1]"), 400, "object"),
    ("null", text(COMPLETE, "null"), 400, "object"),
    ("bad UTF-8", text(COMPLETE, b'{"prompt":"\xff\xfe"}'), 400, "JSON"),
    ("depth bomb of lists", text(COMPLETE, '{"prompt":"x","guided_json":' + "[" * 90_000), 400, "deep"),
    ("depth bomb of objects", text(CHAT, '{"messages":[' + '{"a":' * 30_000), 400, "deep"),
    ("NaN", text(COMPLETE, '{"prompt":"x","temperature":NaN}'), 400, "JSON"),
    ("Infinity", text(COMPLETE, '{"prompt":"x","temperature":-Infinity}'), 400, "JSON"),
    ("a number beyond floats", text(COMPLETE, '{"prompt":"x","temperature":1e999}'), 400, ""),
    ("a number of 5,000 digits", text(COMPLETE, '{"prompt":"x","seed":' + "9" * 5000 + "}"), 400, ""),
    ("form data", text(COMPLETE, "prompt=x&max_tokens=4"), 400, "JSON"),
    # Prompts and messages
    ("no prompt", text(COMPLETE, "{}"), 400, "prompt"),
    ("an empty prompt", completion(prompt=""), 400, "empty"),
    ("no prompts", completion(prompt=[]), 400, "got 0"),
    ("an empty prompt among others", completion(prompt=["a", ""]), 400, "prompt 1"),
    ("an empty list of ids", completion(prompt=[[]]), 400, "empty"),
    ("a mixed list", completion(prompt=["a", 1]), 400, "mixed"),
    ("a float id", completion(prompt=[1.5]), 400, "prompt"),
    ("a bool id", completion(prompt=[True]), 400, "prompt"),
    ("a negative id", completion(prompt=[-1]), 400, "-1"),
    ("an id outside the vocabulary", completion(prompt=[259]), 400, "258"),
    ("an id beyond 64 bits", completion(prompt=[2**70]), 400, ""),
    ("lists nested too far", completion(prompt=[[[1]]]), 400, "prompt"),
    ("too many prompts", completion(prompt=["x"] * 300), 400, "300"),
    ("a prompt longer than the context", completion(prompt=[5] * 600), 400, "512"),
    ("prompt and max_tokens beyond the context", completion(prompt=[5] * 400, max_tokens=200), 400, "512"),
    ("a lone surrogate", text(COMPLETE, '{"prompt":"\\ud800"}'), 400, ""),
    ("suffix", completion(suffix="end"), 400, "suffix"),
    ("no messages", chat(messages=[]), 400, "messages"),
    ("messages that are text", chat(messages="hi"), 400, "messages"),
    ("a message without a role", chat(messages=[{"content": "x"}]), 400, "role"),
    ("a message without content", chat(messages=[{"role": "user"}]), 400, "content"),
    ("content of a number", chat(messages=[{"role": "user", "content": 5}]), 400, "content"),
    ("a part without a type", chat(messages=[{"role": "user", "content": [{}]}]), 400, "type"),
    ("an image", chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), 400, "text"),
    ("audio", chat(modalities=["text", "audio"], audio={"voice": "x"}), 400, "text"),
    ("a template in the request", chat(chat_template="{{ 1 }}"), 200, ""),  # ignored: templates are the model's alone
    # Numbers
    ("n = 0", completion(n=0), 400, "n must"),
    ("n huge", completion(n=10**9), 400, "n must"),
    ("n true", completion(n=True), 400, "bool"),
    ("n text", completion(n="2"), 400, "n"),
    ("n negative", completion(n=-1), 400, "n must"),
    ("best_of below n", completion(n=3, best_of=2), 400, "best_of"),
    ("best_of huge", completion(best_of=10**6), 400, "best_of"),
    ("best_of streamed", completion(best_of=2, stream=True), 400, "stream"),
    ("max_tokens = 0", completion(max_tokens=0), 400, "max_tokens"),
    ("max_tokens negative", completion(max_tokens=-5), 400, "max_tokens"),
    ("max_tokens huge", completion(max_tokens=2**40), 400, "max_tokens"),
    ("max_tokens fraction", completion(max_tokens=1.5), 400, "int"),
    ("temperature negative", completion(temperature=-0.1), 400, "temperature"),
    ("temperature huge", completion(temperature=1e6), 400, "temperature"),
    ("temperature a bool", completion(temperature=True), 400, "bool"),
    ("top_p above 1", completion(top_p=1.01), 400, "top_p"),
    ("top_k = -2", completion(top_k=-2), 400, "top_k"),
    ("min_p above 1", completion(min_p=2), 400, "min_p"),
    ("repetition_penalty = 0", completion(repetition_penalty=0), 400, "repetition_penalty"),
    ("presence_penalty huge", completion(presence_penalty=1e9), 400, "presence_penalty"),
    ("logprobs negative", completion(logprobs=-1), 400, "logprobs"),
    ("logprobs huge", completion(logprobs=10**6), 400, "logprobs"),
    ("top_logprobs without logprobs", chat(top_logprobs=2), 400, "logprobs"),
    ("top_logprobs huge", chat(logprobs=True, top_logprobs=9999), 400, "logprobs"),
    ("seed beyond 64 bits", completion(seed=2**64), 400, "seed"),
    ("seed a fraction", completion(seed=0.5), 400, "int"),
    ("priority huge", completion(priority=2**50), 400, "priority"),
    ("deadline of zero", completion(deadline_ms=0), 400, "deadline_ms"),
    ("deadline huge", completion(deadline_ms=1e18), 400, "deadline_ms"),
    ("min_tokens above max_tokens", completion(min_tokens=9), 400, "min_tokens"),
    ("more log-probabilities than memory", completion(logprobs=256, n=12, max_tokens=500), 400, "1048576"),
    ("more of a prompt than is streamed",
     completion(prompt=[5] * 100, logprobs=250, echo=True, stream=True), 400, "streamed"),
    ("a text that cannot fit", completion(prompt="x" * 150_000), 400, "131072"),
    # Lists
    ("too many stops", completion(stop=["x"] * 65), 400, "stop"),
    ("an empty stop", completion(stop=[""]), 400, "stop"),
    ("a long stop", completion(stop="x" * 5000), 400, "stop"),
    ("a stop of a number", completion(stop=[1]), 400, "stop"),
    ("stop_token_ids outside", completion(stop_token_ids=[100_000]), 400, "stop_token_ids"),
    ("stop_token_ids negative", completion(stop_token_ids=[-1]), 400, "token id"),
    ("logit_bias too large", completion(logit_bias={"5": 101}), 400, "logit_bias"),
    ("logit_bias of words", completion(logit_bias={"five": 1}), 400, "logit_bias"),
    ("logit_bias of other scripts' digits", completion(logit_bias={"٣": 1}), 400, "logit_bias"),
    ("logit_bias of digits in groups", completion(logit_bias={"1_0": 1}), 400, "logit_bias"),
    ("logit_bias outside", completion(logit_bias={"100000": 1}), 400, "logit_bias"),
    ("logit_bias of 5,000", completion(logit_bias={str(i): 1 for i in range(5000)}), 400, "logit_bias"),
    ("a long cache_salt", completion(cache_salt="x" * 2000), 400, "salt"),
    ("all tokens banned", completion(logit_bias={str(i): -100 for i in range(259)}), 200, ""),
    ("stream_options without stream", completion(stream_options={}), 400, "stream"),
    ("a tool's schema that nests too deeply", chat(tools=[deep_tool(300)], tool_choice="required"), 400, "deep"),
    # Elsewhere
    ("an unknown model", completion(model="gpt-4"), 404, "gpt-4"),
    ("a path as a model", completion(model="../../etc/passwd"), 404, "passwd"),
    ("embeddings of a generator", text("/v1/embeddings", '{"input":"x"}'), 400, "embeddings"),
    ("a score of nothing", text("/v1/score", '{"prompt":""}'), 400, "empty"),
    ("tokenize neither", text("/tokenize", "{}"), 400, "either"),
    ("tokenize what cannot fit", text("/tokenize", json.dumps({"prompt": "x" * 150_000})), 400, "131072"),
    ("tokenize messages that cannot fit",
     text("/tokenize", json.dumps({"messages": [{"role": "user", "content": "", "x": "y" * 150_000}]})), 400, "131072"),
    ("a large field of a message", chat(messages=[{"role": "user", "content": "", "e": [[1]] * 35_000}]), 400, "13107"),
    ("tokenize both", text("/tokenize", '{"prompt":"x","messages":[{"role":"user","content":"x"}]}'), 400, "either"),
    ("detokenize outside", text("/detokenize", '{"tokens":[-1]}'), 400, "258"),
    ("detokenize text", text("/detokenize", '{"tokens":["a"]}'), 400, "tokens"),
    ("an unknown route", text("/v1/images", "{}"), 404, "not found"),
    ("a path upwards", text("/v1/../health", "{}"), 404, "not found"),
    ("a wrong method", text("/metrics", "{}"), 405, "not allowed"),
    ("admin without its keys", text("/admin/load", '{"model":"x"}'), 403, "admin"),
    ("a large body", text(COMPLETE, b'{"prompt":"' + b"x" * 300_000 + b'"}'), 413, "200000"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "request_", "status", "words"), BAD, ids=[row[0] for row in BAD])
def test_bad_input(tiny_server: ServerProcess, what: str, request_: tuple[str, bytes], status: int, words: str) -> None:
    path, body = request_
    got, answer = tiny_server.post(path, body)
    assert got == status, answer
    if status >= 400:
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"} and words in error["message"], error
        assert "Traceback" not in error["message"] and "/src/" not in error["message"]
    assert tiny_server.post(*completion())[0] == 200


def post_head(length: int, *headers: str, path: str = COMPLETE) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length}", *headers, "", ""]
    return "\r\n".join(lines).encode()


BODY = completion()[1]
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n"

# (what, bytes, what the answer must begin with, or contain; "" where the server may just hang up)
RAW: list[tuple[str, bytes, bytes]] = [
    ("noise", bytes(range(256)) * 4, b"HTTP/1.1 400"),
    ("TLS to a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HTTP/1.1 400"),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 4"),
    ("no method", b" / HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
    ("a header that never ends", b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000, b"HTTP/1.1 431"),
    ("many headers", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", b"HTTP/1.1 431"),
    ("a long path", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 431"),
    ("two lengths", post_head(5, "Content-Length: 6") + b"123456", b"HTTP/1.1 400"),
    ("length and chunks", post_head(5, "Transfer-Encoding: chunked") + b"0\r\n\r\n", b"HTTP/1.1 400"),
    ("a negative length", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 400"),
    ("an endless length", post_head(10**18), b"HTTP/1.1 413"),
    ("a chunk size of letters", CHUNKED + b"zz\r\n", b"HTTP/1.1 400"),
    ("a compressed body",
     post_head(2, "Content-Encoding: gzip", "Connection: close") + b"{}", b"HTTP/1.1 415"),
    ("a compressed chunked body", CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n", b"HTTP/1.1 415"),
    ("an upgrade", b"GET /health HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", b"HTTP/1.1 400"),
    ("a percent-encoded path upwards", b"GET /%2e%2e/passwd HTTP/1.1\r\nConnection: close\r\n\r\n", b"HTTP/1.1 404"),
    ("a null in the path", b"GET /%00 HTTP/1.1\r\nConnection: close\r\n\r\n", b"HTTP/1.1 404"),
    ("a page of another origin",
     post_head(2, "Origin: http://evil.example", "Connection: close") + b"{}", b"HTTP/1.1 403"),
    ("a head that stops", b"GET /health HTTP/1.1\r\nHost:", b"HTTP/1.1 408"),
    ("blank lines", b"\r\n\r\n", b"HTTP/1.1 408"),
    ("nothing at all", b"", b"HTTP/1.1 408"),
    ("a body that stops", post_head(100) + b"{", b"HTTP/1.1 408"),
    ("HTTP/1.0", b"GET /health HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"),
    ("100-continue", post_head(len(BODY), "Expect: 100-continue", "Connection: close") + BODY, b"HTTP/1.1 100"),
    ("pipelined requests", b"GET /version HTTP/1.1\r\n\r\n" * 20 + LAST, b"HTTP/1.1 200"),
    ("too many pipelined requests", b"GET /version HTTP/1.1\r\n\r\n" * 5000, b""),
]  # fmt: skip


@pytest.mark.parametrize(("what", "data", "start"), RAW, ids=[row[0] for row in RAW])
def test_bad_bytes(tiny_server: ServerProcess, what: str, data: bytes, start: bytes) -> None:
    before = time.monotonic()
    answer = tiny_server.raw(data, timeout=3)
    assert answer.startswith(start), answer[:300]
    assert time.monotonic() - before < 2.9, "the server hangs up by itself"
    assert tiny_server.post(*completion())[0] == 200


def test_http_1_0_streams_without_chunks(tiny_server: ServerProcess) -> None:
    body = completion(stream=True)[1]
    answer = tiny_server.raw(post_head(len(body)).replace(b"HTTP/1.1", b"HTTP/1.0") + body, timeout=3)
    head, _, events = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"chunked" not in head.lower()
    assert events.startswith(b"data: {") and events.endswith(b"\n\ndata: [DONE]\n\n")
    assert all(line.startswith(b"data: ") for line in events.split(b"\n\n")[:-1])


def test_connections_that_are_reset_are_no_errors(tiny_server: ServerProcess) -> None:
    def errors() -> list[Any]:
        return [line for line in tiny_server.logs() if line["level"] == "error"]

    before = len(errors())
    for wait in (False, True) * 20:
        one = socket.create_connection(("127.0.0.1", tiny_server.port))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it resets it
        one.sendall(long_request(True))
        if wait:
            one.recv(10)
        one.close()
    tiny_server.wait_idle()
    assert errors()[before:] == []


def test_slow_loris_is_cut_off_and_keeps_nobody_out(tiny_server: ServerProcess) -> None:
    sockets = [socket.create_connection(("127.0.0.1", tiny_server.port)) for _ in range(50)]
    try:
        for one in sockets:
            one.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            for one in sockets:
                try:
                    one.sendall(b"X-A: b\r\n")
                except OSError:
                    pass
            assert tiny_server.post(*completion())[0] == 200
            time.sleep(0.2)
        for one in sockets:
            one.settimeout(1)
            assert one.recv(100).startswith(b"HTTP/1.1 408")
    finally:
        for one in sockets:
            one.close()


def long_request(stream: bool, tokens: int = 500, prompt: int = 3, **more: Any) -> bytes:
    body = {"prompt": [5] * prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream, **more}
    data = json.dumps(body).encode()
    return post_head(len(data)) + data


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("phase", ["in the queue", "in prefill", "mid-stream"])
def test_a_client_that_leaves_stops_its_work(tiny_server: ServerProcess, stream: bool, phase: str) -> None:
    """Of n = 4 each, four requests fill the places that run and some of those that wait."""
    tiny_server.wait_idle()
    before = tiny_server.metric("generation_tokens_total")
    prompt = 8 if phase != "in prefill" else 400
    count = 3 if phase == "in the queue" else 1
    sockets = []
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", tiny_server.port))
        one.sendall(long_request(stream, tokens=512 - prompt, prompt=prompt, n=4))
        sockets.append(one)
    if phase == "mid-stream" and stream:
        assert sockets[0].recv(10)
    elif phase == "mid-stream":
        time.sleep(0.02)
    for one in sockets:
        one.close()
    tiny_server.wait_idle()
    made = tiny_server.metric("generation_tokens_total") - before
    assert made < count * 4 * (512 - prompt), "it was generated to the end"


def test_a_client_that_never_reads_is_given_up(tiny_server: ServerProcess) -> None:
    """Its answer is larger than what sockets hold: logprobs of 256 tokens for each of many tokens."""
    tiny_server.wait_idle()
    descriptors = tiny_server.descriptors()
    sockets = []
    for _ in range(3):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", tiny_server.port))
        one.sendall(long_request(True, n=4, logprobs=250))
        sockets.append(one)
    memory = tiny_server.memory()
    time.sleep(0.5)
    assert tiny_server.post(*completion())[0] in (200, 429)
    until(lambda: tiny_server.descriptors() <= descriptors, 15)
    assert tiny_server.memory() < memory + 60e6
    for one in sockets:
        one.close()
    tiny_server.wait_idle()


def test_many_large_bodies_at_once_are_bounded(tiny_server: ServerProcess) -> None:
    """200 kB each, and never whole: the 17th is too many."""
    sockets = []
    for _ in range(24):
        one = socket.create_connection(("127.0.0.1", tiny_server.port))
        one.sendall(post_head(200_000) + b"x" * 199_000)
        sockets.append(one)
    answers = []
    for one in sockets:
        one.settimeout(3)
        try:
            answers.append(one.recv(12))
        except ConnectionError:
            answers.append(b"reset")
        one.close()
    assert answers.count(b"HTTP/1.1 503") >= 1 and answers.count(b"HTTP/1.1 408") >= 15, answers
    assert tiny_server.post(*completion())[0] == 200


def test_a_full_queue_is_told_with_a_time_to_come_back(tiny_server: ServerProcess) -> None:
    tiny_server.wait_idle()
    sockets = [socket.create_connection(("127.0.0.1", tiny_server.port)) for _ in range(8)]
    for one in sockets:
        one.settimeout(20)
        one.sendall(long_request(False, n=2))
    answers = []
    for one in sockets:
        answers.append(one.recv(65536))
        one.close()
    statuses = [answer.split()[1] for answer in answers]
    assert statuses.count(b"429") >= 1 and statuses.count(b"200") >= 6 - 2, statuses
    refused = next(answer for answer in answers if answer.split()[1] == b"429")
    assert b"retry-after: " in refused.lower() and b'"code":"queue_full"' in refused
    tiny_server.wait_idle()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_deadline_ends_a_request(tiny_server: ServerProcess, stream: bool) -> None:
    body = {"prompt": [5], "max_tokens": 511, "n": 4, "ignore_eos": True, "logprobs": 50, "deadline_ms": 40}
    if stream:
        events = list(tiny_server.stream(COMPLETE, body))
        assert events[-1] == "[DONE]" and events[-2]["error"]["code"] == "deadline_exceeded"
        assert events[0]["choices"]
    else:
        status, answer = tiny_server.post(COMPLETE, body)
        assert status == 408 and answer["error"]["code"] == "deadline_exceeded"
    status, answer = tiny_server.post(*completion(deadline_ms=0.001))
    assert status == 408
    tiny_server.wait_idle()


def test_pages_run_out_and_all_are_served(tiny_server: ServerProcess) -> None:
    """Four sequences of 512 tokens do not fit the KV memory together: some are preempted, none is wrong."""
    tiny_server.wait_idle()
    body = {"prompt": [7] * 30, "max_tokens": 480, "n": 4, "seed": 1, "ignore_eos": True, "return_token_ids": True}
    status, answer = tiny_server.post(COMPLETE, body)
    assert status == 200 and [len(choice["token_ids"]) for choice in answer["choices"]] == [480] * 4
    for index in range(2):
        alone = tiny_server.post(COMPLETE, {**body, "n": index + 1})[1]["choices"][index]
        assert alone["token_ids"] == answer["choices"][index]["token_ids"]
    tiny_server.wait_idle()


def test_nothing_is_left_after_all_of_this(tiny_server: ServerProcess) -> None:
    tiny_server.wait_idle()
    until(lambda: tiny_server.descriptors() < 40, 10)
    assert tiny_server.metric("engine_restarts_total") == 0
    failed = [line for line in tiny_server.logs() if line["level"] == "error"]
    assert not failed, failed[:3]
