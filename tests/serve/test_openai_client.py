"""The openai package, unchanged: sync, async, streams, errors."""

from __future__ import annotations

import asyncio

import openai
import pytest
from tests.serve.harness import ServerProcess

from headrace import LLM, SamplingParams

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(offline: LLM) -> str:
    return offline.chat(MESSAGES, SamplingParams(max_tokens=16, temperature=0)).text


def chat(client: openai.OpenAI, **more: object):  # type: ignore[no-untyped-def]
    return client.chat.completions.create(
        model="smol", messages=MESSAGES, max_tokens=16, temperature=0, **more  # type: ignore[arg-type]
    )  # fmt: skip


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smol"]
    assert client.models.retrieve("smol").id == "smol"


def test_chat(client: openai.OpenAI, expected: str) -> None:
    answer = chat(client)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}]
    assert client.chat.completions.create(model="smol", messages=parts, max_completion_tokens=2).choices  # type: ignore


def test_streamed_chat(client: openai.OpenAI, expected: str) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(chunks) - 1
    assert chunks[0].choices[0].delta.role == "assistant"
    with client.chat.completions.stream(model="smol", messages=MESSAGES, max_tokens=16, temperature=0) as stream:  # type: ignore
        assert stream.get_final_completion().choices[0].message.content == expected


def test_logprobs(client: openai.OpenAI) -> None:
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smol", prompt=["a", "b"], max_tokens=3, logprobs=1, echo=True, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("a") and answer.choices[0].logprobs.token_logprobs[0] is None
    pieces = client.completions.create(model="smol", prompt="a", max_tokens=5, stream=True, temperature=0)
    whole = client.completions.create(model="smol", prompt="a", max_tokens=5, temperature=0).choices[0].text
    assert "".join(piece.choices[0].text for piece in pieces) == whole


async def test_many_at_once(server: ServerProcess, expected: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def one(stream: bool) -> str:
            options = {"model": "smol", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
            if not stream:
                answer = await client.chat.completions.create(**options)  # type: ignore[call-overload]
                return answer.choices[0].message.content
            chunks = await client.chat.completions.create(**options, stream=True)  # type: ignore[call-overload]
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        assert await asyncio.gather(*(one(index % 2 == 0) for index in range(12))) == [expected] * 12


def test_errors_are_the_package_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, n=1000)
    assert caught.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smol", prompt="x", max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="smol", input="x")
