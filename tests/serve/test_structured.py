"""Structured answers and tool calls over HTTP: the openai package unchanged, and what is refused."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import openai
import pydantic
import pytest
from tests.serve.harness import ServerProcess

from headrace import LLM, SamplingParams
from headrace.types import GrammarSpec

MESSAGES: Any = [{"role": "user", "content": "Invent a person. Answer as JSON."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Paris", "London", "Rome"]},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["city", "unit"],
            },
        },
    }
]
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "smol", "messages": MESSAGES, "temperature": 0, "max_tokens": 90} | more
    )


def test_json_schema(client: openai.OpenAI, offline: LLM) -> None:
    text = chat(client, response_format=FORMAT).choices[0].message.content
    person = json.loads(text)
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 120
    streamed = chat(client, response_format=FORMAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    spec = GrammarSpec("json_schema", json.dumps(SCHEMA, separators=(",", ":")))
    assert offline.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=90, grammar=spec)).text == text


def test_parse_of_the_openai_package(client: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=20)
        age: int = pydantic.Field(ge=0, le=120)

    answer = client.chat.completions.parse(
        model="smol", messages=MESSAGES, temperature=0, max_tokens=90, response_format=Person
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person) and 0 <= person.age <= 120


def test_json_object(client: openai.OpenAI) -> None:
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=200).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.startswith("{")


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[0-9]{4}"}, "[0-9]{3}-[0-9]{4}"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"guided_json": {"type": "integer", "minimum": 1, "maximum": 5}}, "[1-5]"),
        ({"structured_outputs": {"regex": "[A-C]{2}"}}, "[A-C]{2}"),
        ({"structured_outputs": {"choice": ["x", "y"]}}, "x|y"),
        ({"structured_outputs": {"grammar": 'start: "a" /[0-9]/'}}, "a[0-9]"),
        ({"response_format": {"type": "text"}}, ".*"),
    ],
)
def test_guided(server: ServerProcess, extra: dict[str, Any], pattern: str) -> None:
    body = {"model": "smol", "prompt": "My favourite colour is", "max_tokens": 20, "temperature": 0.8, "seed": 1}
    status, answer = server.post("/v1/completions", body | extra)
    assert status == 200 and re.fullmatch(pattern, answer["choices"][0]["text"], re.S)


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"guided_regex": "(a"}, "unclosed group"),
        ({"guided_regex": "a" * 200_000}, "131072"),
        ({"guided_json": "{"}, "json_schema cannot be used"),
        ({"guided_json": 3}, "not understood"),
        ({"guided_json": {"type": "object", "x": "y" * 1_000_000}}, "131072"),
        ({"guided_choice": []}, "choices"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "both"),
        ({"structured_outputs": {"xml": "a"}}, "not understood"),
        ({"response_format": {"type": "xml"}}, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
            "strin",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:9/"}}}},
            "fetch",
        ),
        ({"guided_grammar": "start: start"}, "no text can match"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_grammars_are_400(server: ServerProcess, extra: dict[str, Any], problem: str, stream: bool) -> None:
    status, answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 2, "stream": stream} | extra)
    assert status == 400 and problem in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_a_grammar_that_takes_long_stalls_nobody(server: ServerProcess) -> None:
    slow = {"prompt": "x", "guided_json": {"type": "integer", "multipleOf": 9999991}, "max_tokens": 4}
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", slow)))
    thread.start()
    gaps, last = [], time.monotonic()
    for _ in server.stream("/v1/completions", {"prompt": "Once", "max_tokens": 150, "ignore_eos": True}):
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    thread.join()
    assert len(gaps) > 100 and max(gaps[1:]) < 2.0, "it would be 5 s"
    assert answers[0][0] == 400 and "compile" in answers[0][1]["error"]["message"]


# Tools


def test_required_tools_give_a_valid_call(client: openai.OpenAI) -> None:
    choice = chat(client, messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and call.type == "function" and call.id
    assert arguments["city"] in ("Paris", "London", "Rome") and arguments["unit"] in ("C", "F")
    chunks = list(
        chat(client, messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, stream=True)
    )
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert deltas[0].function.name == "get_weather" and chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_named_tool_and_the_answer_to_its_call(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    message = chat(client, messages=ASK, tools=TOOLS, tool_choice=named).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_weather"]
    told = [
        *ASK,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 degrees"},
    ]
    answer = chat(client, messages=told, tools=TOOLS, tool_choice="none", max_tokens=20).choices[0].message
    assert answer.content and not answer.tool_calls


def test_auto_leaves_text_as_it_is(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi!"}], "tools": TOOLS, "max_tokens": 40}
    whole = chat(client, **options).choices[0]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, **options, stream=True))
    assert text == (whole.message.content or "")
    assert whole.message.content or whole.message.tool_calls


def test_the_stream_helper_of_the_openai_package(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="smol", messages=ASK, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=90
    ) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert calls and calls[0].function.name == "get_weather"


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": "sometimes"},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            "tool_choice": "required",
        },
    ],
)
def test_malformed_tools_are_400(server: ServerProcess, extra: dict[str, Any]) -> None:
    status, answer = server.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 2} | extra)
    assert status == 400 and answer["error"]["message"]
