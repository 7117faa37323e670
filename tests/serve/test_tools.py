"""Tool calls: parsers fed in any pieces, dialects, and the grammars that force calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import write_tiny

from headrace import LLM, SamplingParams
from headrace.serve.faults import Fault
from headrace.serve.tools import DIALECTS, Dialect, ToolParser, as_messages, decode_calls, dialect_for, toolbox

HERMES, LLAMA3, MISTRAL = DIALECTS["hermes"], DIALECTS["llama3"], DIALECTS["mistral"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "$defs": {"City": {"type": "string", "enum": ["Paris", "Köln", "Rome"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
NAMES = frozenset({"weather", "clock"})


def parsed(dialect: Dialect, pieces: list[str], parallel: bool = True) -> tuple[str, list[tuple[str, Any]], str | None]:
    """Content, calls and finish reason of a text that comes in pieces."""
    parser = ToolParser(dialect, NAMES, parallel)
    found: list[Any] = []
    for index, piece in enumerate(pieces):
        found += parser.push(piece, final=index == len(pieces) - 1)
    content = "".join(one for one in found if isinstance(one, str))
    entries = [one for one in found if isinstance(one, dict)]
    assert [entry["index"] for entry in entries] == list(range(len(entries)))
    assert len({entry["id"] for entry in entries}) == len(entries)
    calls = [(entry["function"]["name"], json.loads(entry["function"]["arguments"])) for entry in entries]
    return content, calls, parser.finish_reason


A = '{"name": "weather", "arguments": {"city": "K\\u00f6ln", "days": 2}}'
B = '{"name": "clock", "arguments": {}}'
CALLS = [("weather", {"city": "Köln", "days": 2}), ("clock", {})]
CASES: list[tuple[Dialect, str, str, list[Any]]] = [
    (HERMES, "Just text. ", "Just text. ", []),
    (HERMES, f"<tool_call>\n{A}\n</tool_call>", "", CALLS[:1]),
    (HERMES, f"Let me look.\n\n<tool_call>{A}</tool_call>\n<tool_call>\n{B}\n</tool_call>\n", "Let me look.", CALLS),
    (HERMES, f"<tool_call>{A}</tool_call> Done.", " Done.", CALLS[:1]),
    (HERMES, f"<tool_call>\n{A}", "", CALLS[:1]),
    (HERMES, "<tool_call>\n{nope}\n</tool_call> so", "<tool_call>\n{nope}\n</tool_call> so", []),
    (HERMES, f"<tool_call>{{</tool_call><tool_call>{B}</tool_call>", "<tool_call>{</tool_call>", CALLS[1:]),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
    (HERMES, '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>', None, []),
    (HERMES, '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>', None, []),
    (HERMES, '<tool_call>{"name": "clock", "arguments": {"x": NaN}}</tool_call>', None, []),
    (HERMES, "<tool_call>" + "[" * 5000, None, []),
    (HERMES, "a < b <tool <tool_cal", "a < b <tool <tool_cal", []),
    (LLAMA3, '{"name": "weather", "parameters": {"city": "Köln", "days": 2}}', "", CALLS[:1]),
    (LLAMA3, f'<|python_tag|>{A}; {{"name": "clock", "parameters": {{}}}}', "", CALLS),
    (LLAMA3, f"Sure. <|python_tag|>{B}", "Sure.", CALLS[1:]),
    (LLAMA3, '{"answer": 42} is it', '{"answer": 42} is it', []),
    (LLAMA3, "  plain {", "  plain {", []),
    (MISTRAL, f"[TOOL_CALLS][{A}, {B}]", "", CALLS),
    (MISTRAL, f"Well [TOOL_CALLS] [{B}]", "Well", CALLS[1:]),
    (MISTRAL, "[TOOL_CALLS][{", "[TOOL_CALLS][{", []),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Köln", "days": 2}', "", CALLS[:1]),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Köln", "days": 2}[TOOL_CALLS]clock[ARGS]{}', "", CALLS),
    (MISTRAL, "So: [TOOL_CALLS]clock[CALL_ID]a1B2c3D4e[ARGS]{}", "So:", CALLS[1:]),
    (MISTRAL, "[TOOL_CALLS]clock{}", "", CALLS[1:]),
    (MISTRAL, "[TOOL_CALLS]clock[ARGS]{} and so", None, []),
    (MISTRAL, "[TOOL_CALLS]clock[ARGS]", None, []),
    (MISTRAL, "[TOOL_CALLS]rm[ARGS]{}", None, []),
    (MISTRAL, "[TOOL_CALLS]clock[ARGS][1]", None, []),
    (HERMES, "<tool_call>clock[ARGS]{}</tool_call>", None, []),
    (MISTRAL, "[TOOL", "[TOOL", []),
]


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), CASES)
def test_texts_in_any_pieces(dialect: Dialect, text: str, content: str | None, calls: list[Any]) -> None:
    """Whole, a character at a time, and cut at random; a malformed call stays the text that it was."""
    expected = (text if content is None else content, calls, "tool_calls" if calls else None)
    assert parsed(dialect, [text]) == expected
    assert parsed(dialect, [*text, ""]) == expected

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, len(text)), max_size=6))
    def cut(places: list[int]) -> None:
        edges = [0, *sorted(places), len(text)]
        assert parsed(dialect, [text[a:b] for a, b in pairwise(edges)]) == expected

    cut()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(DIALECTS.values())),
    st.lists(st.sampled_from([*"[]{ \nx<", A, B, *(d.opens for d in DIALECTS.values()), "</tool_call>"])),
)  # fmt: skip
def test_any_text_is_the_same_in_any_pieces(dialect: Dialect, parts: list[str]) -> None:
    text = "".join(parts)
    whole = parsed(dialect, [text])
    assert parsed(dialect, [*text, ""]) == whole == parsed(dialect, [*parts, ""])
    if not whole[1]:
        assert whole[0] == text


def test_text_is_not_held_longer_than_needed() -> None:
    parser = ToolParser(HERMES, NAMES)
    assert parser.push("Hello <", final=False) == ["Hello"]
    assert parser.push("b", final=False) == [" <b"]


def test_one_call_where_calls_must_not_be_parallel() -> None:
    assert parsed(HERMES, [f"<tool_call>{B}</tool_call><tool_call>{B}</tool_call>"], parallel=False)[1] == CALLS[1:]
    assert len(decode_calls(f"[{A}, {B}]", NAMES) or []) == 2


# Requests


@pytest.mark.parametrize(
    ("tools", "choice", "problem"),
    [
        (None, "auto", "needs tools"),
        ([], "required", "needs tools"),
        (TOOLS, "perhaps", "tool_choice must be"),
        (TOOLS, {"type": "function", "function": {"name": "rm"}}, "tool_choice must be"),
        (TOOLS, {"type": "function", "function": 3}, "tool_choice must be"),
        ([{"type": "code"}], None, "type function"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "a b"),
        ([{"type": "function", "function": {"name": "a", "parameters": [1]}}], None, "JSON schema"),
        ([CLOCK, CLOCK], None, "same name"),
        ([CLOCK] * 200, None, "200"),
    ],
)
def test_malformed_tools_are_refused(tools: Any, choice: Any, problem: str) -> None:
    with pytest.raises(Fault, match=problem) as caught:
        toolbox(tools, choice, None, HERMES)
    assert caught.value.status == 400 and caught.value.param in ("tools", "tool_choice")


def test_choices() -> None:
    assert toolbox(None, None, None, HERMES) is None and toolbox(TOOLS, "none", None, HERMES) is None
    auto, must = toolbox(TOOLS, None, None, HERMES), toolbox(TOOLS, "required", False, HERMES)
    assert auto and not auto.forced and auto.parallel and must and must.forced and not must.parallel
    named = toolbox(TOOLS, {"type": "function", "function": {"name": "clock"}}, None, HERMES)
    assert named and named.forced and named.names == {"clock"}


def test_templates_without_tools_are_told_in_words() -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    shown = as_messages(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}], TOOLS
    )
    assert "weather" in shown[0]["content"] and shown[0]["role"] == "system" and shown[1]["content"] == "hi"
    assert parsed(HERMES, [shown[2]["content"]])[1] == [("clock", {})] and "tool_calls" not in shown[2]
    system = as_messages([{"role": "system", "content": "Be brief."}], TOOLS)
    assert len(system) == 1 and system[0]["content"].startswith("Be brief.\n")


# Grammars


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path: Path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with LLM(str(path)) as llm:
        yield llm


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_valid_and_parsed(llm: LLM, name: str, parallel: bool) -> None:
    """A model with random weights can say nothing else."""
    box = toolbox([WEATHER], "required", parallel, DIALECTS[name])
    assert box is not None and dialect_for("auto", llm.tokenizer) == HERMES
    params = SamplingParams(grammar=box.grammar(llm.tokenizer), max_tokens=440, seed=2)
    for output in llm.generate(["a", "b"], params):
        assert output.finish_reason == "stop", output.text
        content, calls, finish = parsed(DIALECTS[name], [output.text], parallel)
        assert content == "" and finish == "tool_calls" and (parallel or len(calls) == 1)
        for tool, arguments in calls:
            assert tool == "weather" and arguments["city"] in ("Paris", "Köln", "Rome") and 1 <= arguments["days"] <= 9
            assert set(arguments) == {"city", "days"}


@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_by_name_where_the_marks_are_special_tokens(tmp_path: Path, parallel: bool) -> None:
    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    with LLM(str(write_tiny(tmp_path / "tiny.gguf", specials=marks))) as llm:
        box = toolbox(TOOLS, "required", parallel, MISTRAL)
        assert box is not None and box.special(llm.tokenizer)
        params = SamplingParams(
            grammar=box.grammar(llm.tokenizer), max_tokens=440, seed=3, skip_special_tokens=False, n=4
        )
        for sample in llm.generate(["a"], params)[0].samples:
            assert sample.finish_reason == "stop" and sample.token_ids[0] == llm.tokenizer.token_id("[TOOL_CALLS]")
            assert "[ARGS]" in sample.text
            content, calls, finish = parsed(MISTRAL, [sample.text], parallel)
            assert content == "" and finish == "tool_calls" and (parallel or len(calls) == 1)
            assert all(name == "clock" or set(arguments) == {"city", "days"} for name, arguments in calls)


def test_ids_are_as_mistral_wants_them() -> None:
    (entry,) = ToolParser(MISTRAL, NAMES).push(f"[TOOL_CALLS][{B}]", final=True)
    assert isinstance(entry, dict) and re.fullmatch("[a-zA-Z0-9]{9}", entry["id"])
