"""Tool calls: how models write them, as text becomes them, and how one is made certain.

required, named ──▶ grammar ──▶ the model's text ──▶ ToolParser ──▶ tool_calls
                                 auto ───────────────────┘
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..grammar.check import JSON_STYLE
from ..text.tokenizer import Tokenizer
from ..types import GrammarSpec
from .faults import Fault

MAX_TOOLS = 128
MAX_CALLS = 8  # that a grammar lets a model make in one answer
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NAMED = re.compile(  # Mistral's; the mark of a first call is gone already
    r"\s*(?:\[TOOL_CALLS\])?\s*([a-zA-Z0-9_.-]{1,64})\s*(?:\[CALL_ID\][a-zA-Z0-9_-]{0,64})?\s*(?:\[ARGS\])?\s*(?={)"
)


@dataclass(frozen=True)
class Dialect:
    """How a family of models writes calls: JSON objects behind `opens`, up to `closes` (empty: to the answer's end).
    With `bare`, an answer that begins with "{" is calls without a mark. `written` are those of a grammar: around all
    calls, around each, and between them; MARK stands for `opens`. Where there is a `named`, a call may also be `opens`,
    name, `named`, arguments, and is written so for models that have `named` as a token."""

    opens: str
    closes: str
    arguments: str  # the arguments' name in the object
    written: tuple[str, str, str, str, str]
    bare: bool = False
    named: str = ""
    id_length: int = 24


DIALECTS = {
    "hermes": Dialect("<tool_call>", "</tool_call>", "arguments", ("", 'MARK "\\n"', '"\\n</tool_call>"', '"\\n"', "")),
    "llama3": Dialect("<|python_tag|>", "", "parameters", ("", "", "", '"; "', ""), bare=True),
    # Mistral's templates refuse ids of any other length.
    "mistral": Dialect(
        "[TOOL_CALLS]", "", "arguments", ('MARK "["', "", "", '", "', '"]"'), named="[ARGS]", id_length=9
    ),
}


def dialect_for(name: str, tokenizer: Tokenizer) -> Dialect:
    """By name, or with "auto" by what the model's chat template writes; Hermes's where it writes none."""
    template = (tokenizer.tool_template or "") + (tokenizer.chat_template or "")
    if name == "auto":
        marks = (("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]"), ("llama3", "<|start_header_id|>"))
        name = next((one for one, mark in marks if mark in template), "hermes") if "tools" in template else "hermes"
    return DIALECTS[name]


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the model's own chat template writes tools."""
    return "tools" in (tokenizer.tool_template or tokenizer.chat_template or "")


@dataclass(frozen=True)
class Toolbox:
    """What one request may call."""

    tools: Sequence[dict[str, Any]]
    dialect: Dialect
    forced: bool  # to call, and nothing else
    parallel: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)

    def parser(self) -> ToolParser:
        return ToolParser(self.dialect, self.names, self.parallel)

    def special(self, tokenizer: Tokenizer) -> bool:
        """Whether the mark is a special token, which texts do not show unless asked."""
        return tokenizer.token_id(self.dialect.opens) in tokenizer.special_ids

    def grammar(self, tokenizer: Tokenizer) -> GrammarSpec:
        """One call or several, each of a tool that there is and with arguments as it wants them."""
        mark = _terminal(self.dialect.opens, tokenizer)
        if self.dialect.named and tokenizer.token_id(self.dialect.named) is not None:
            return self._named_grammar(mark, _terminal(self.dialect.named, tokenizer))
        before, opens, closes, between, after = (part.replace("MARK", mark) for part in self.dialect.written)
        more = f"({between} call){{0,{MAX_CALLS - 1}}}" if self.parallel else ""
        schema = msgspec.json.encode(self._schema()).decode()
        return GrammarSpec(
            "grammar", f"start: {before} call {more} {after}\ncall: {opens} body {closes}\nbody: %json {schema}\n"
        )

    def _named_grammar(self, mark: str, named: str) -> GrammarSpec:
        rules = [f"start: call{{1,{MAX_CALLS if self.parallel else 1}}}"]
        rules.append("call: " + " | ".join(f"call{index}" for index in range(len(self.tools))))
        for index, tool in enumerate(self.tools):
            schema = msgspec.json.encode({"x-guidance": JSON_STYLE, **_wanted(tool)}).decode()
            rules.append(f'call{index}: {mark} "{tool["function"]["name"]}" {named} body{index}')
            rules.append(f"body{index}: %json {schema}")
        return GrammarSpec("grammar", "\n".join(rules) + "\n")

    def _schema(self) -> dict[str, Any]:
        arguments = self.dialect.arguments
        definitions, calls = {}, []
        for index, tool in enumerate(self.tools):
            function = tool["function"]
            definitions[str(index)] = _moved(_wanted(tool), f"#/$defs/{index}")
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, arguments: {"$ref": f"#/$defs/{index}"}},
                    "required": ["name", arguments],
                    "additionalProperties": False,
                }
            )
        return {"x-guidance": JSON_STYLE, "$defs": definitions, "anyOf": calls}


def _terminal(text: str, tokenizer: Tokenizer) -> str:
    """A text in a grammar: as the special token that it is, or else as its characters."""
    token = tokenizer.token_id(text)
    return f"<[{token}]>" if token in tokenizer.special_ids else msgspec.json.encode(text).decode()


def _wanted(tool: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, which have no others than it names."""
    wanted = tool["function"].get("parameters") or {"type": "object"}
    return {"additionalProperties": False, **wanted} if "properties" in wanted else wanted


def _moved(schema: Any, place: str) -> Any:
    """The same schema where it is no longer the document but a part of one, at `place`."""
    if isinstance(schema, dict):
        moved = {key: _moved(value, place) for key, value in schema.items()}
        if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
            moved["$ref"] = place + reference[1:]
        return moved
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema


def toolbox(tools: Any, choice: Any, parallel: bool | None, dialect: Dialect) -> Toolbox | None:
    """From a request's fields; None where nothing may be called. Fault 400 where they are malformed."""
    if not tools:
        if choice not in (None, "none"):
            raise Fault(400, "tool_choice needs tools", param="tool_choice")
        return None
    if len(tools) > MAX_TOOLS:
        raise Fault(400, f"at most {MAX_TOOLS} tools can be given, got {len(tools)}", param="tools")
    for index, tool in enumerate(tools):
        _check_tool(index, tool)
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise Fault(400, "two tools have the same name", param="tools")
    if choice is None or choice in ("auto", "required", "none"):
        box = Toolbox(tools, dialect, choice == "required", parallel is not False)
        return None if choice == "none" else box
    name = choice.get("function", {}) if isinstance(choice, dict) and choice.get("type") == "function" else {}
    name = name.get("name") if isinstance(name, dict) else None
    if name not in names:
        raise Fault(
            400,
            f'tool_choice must be none, auto, required or {{"type": "function", "function": {{"name": ...}}}} with the '
            f"name of a tool, got {choice!r:.80}",
            param="tool_choice",
        )
    return Toolbox([tools[names.index(name)]], dialect, True, False)


def _check_tool(index: int, tool: Any) -> None:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise Fault(400, f"tool {index} must be of type function, with a function", param="tools")
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise Fault(
            400, f"tool {index} needs a name of 1 to 64 letters, digits, _, - or ., got {function.get('name')!r:.80}",
            param="tools",
        )  # fmt: skip
    if not isinstance(function.get("parameters") or {}, dict):
        raise Fault(400, f"tool {index} must have a JSON schema as parameters", param="tools")


def as_messages(messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation for a chat template that knows no tools: they are told in the system message, and past calls are
    text, as in Hermes's models."""
    offered = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    told = (
        "You can call functions. These there are, as JSON in <tools></tools>:\n"
        f"<tools>\n{offered}\n</tools>\n"
        "To call one, answer with its name and arguments as JSON:\n"
        '<tool_call>\n{"name": "<name>", "arguments": {...}}\n</tool_call>'
    )
    shown = [_with_calls_as_text(message) for message in messages]
    if not tools:
        return shown
    if shown and shown[0].get("role") == "system" and isinstance(shown[0].get("content"), str):
        return [{**shown[0], "content": f"{shown[0]['content']}\n\n{told}"}, *shown[1:]]
    return [{"role": "system", "content": told}, *shown]


def _with_calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    lines = [message["content"]] if isinstance(message.get("content"), str) and message["content"] else []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise Fault(400, "a message's tool_calls must each have a function", param="messages")
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(function.get("name"))
        lines.append(f'<tool_call>\n{{"name": {name}, "arguments": {text or "{}"}}}\n</tool_call>')
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": "\n".join(lines)}


class ToolParser:
    """A TextParser: finds calls in a text that comes in pieces. What it makes of it does not depend on how it is cut.

    A call is shown once it is whole, for one that turns out to be malformed, or to name no tool that there is, stays
    text. White space next to calls is no content.
    """

    def __init__(self, dialect: Dialect, names: frozenset[str], parallel: bool = True) -> None:
        self._dialect, self._names, self._parallel = dialect, names, parallel
        self._held = ""  # not shown yet
        self._searched = 0  # of it, where no end was found
        self._space = ""  # after what was shown: content only if more content follows
        self._begun = self._open = False
        self.calls = 0

    @property
    def finish_reason(self) -> str | None:
        return "tool_calls" if self.calls else None

    def push(self, text: str, *, final: bool) -> list[str | dict[str, Any]]:
        self._held += text
        pieces: list[str | dict[str, Any]] = []
        while self._open or self._find_begin(pieces, final):
            end = self._find_end(final)
            if end is None:
                return pieces
            region, self._held = self._held[:end], self._held[end:]
            self._open, self._searched = False, 0
            self._close(region, pieces)
        if final and not self.calls:
            pieces.append(self._space)
        return [piece for piece in pieces if piece]

    def _find_begin(self, pieces: list[str | dict[str, Any]], final: bool) -> bool:
        """Show what comes before a call, and what can be none; True where one begins."""
        mark = self._dialect.opens
        if self._dialect.bare and not self._begun:
            stripped = self._held.lstrip()
            if not stripped and not final:
                return False
            self._begun = True
            self._open = stripped.startswith("{")
        if not self._open:
            at = self._held.find(mark)
            self._open = at >= 0
            if at < 0:
                at = len(self._held) if final else len(self._held) - _overlap(self._held, mark)
            self._content(self._held[:at], pieces)
            self._held = self._held[at:]
        return self._open

    def _find_end(self, final: bool) -> int | None:
        """Where the open call ends in what is held; None where that has not come yet."""
        closes = self._dialect.closes
        at = self._held.find(closes, self._searched) if closes else -1
        if at >= 0:
            return at + len(closes)
        self._searched = max(0, len(self._held) - len(closes))
        return len(self._held) if final else None

    def _close(self, region: str, pieces: list[str | dict[str, Any]]) -> None:
        body = region.removeprefix(self._dialect.opens)
        if self._dialect.closes:
            body = body.removesuffix(self._dialect.closes)
        found = decode_calls(body, self._names, self._dialect)
        if found is None:
            self._content(region, pieces)
            return
        self._space = ""
        for name, arguments in found:
            if self.calls and not self._parallel:
                return
            function = {"name": name, "arguments": arguments}
            pieces.append({"index": self.calls, "id": self._new_id(), "type": "function", "function": function})
            self.calls += 1

    def _new_id(self) -> str:
        length = self._dialect.id_length
        return secrets.token_hex(length)[:length] if length < 10 else f"call_{secrets.token_hex(length // 2)}"

    def _content(self, text: str, pieces: list[str | dict[str, Any]]) -> None:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        pieces.append(shown)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` could begin with."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def decode_calls(
    text: str, names: frozenset[str], dialect: Dialect = DIALECTS["hermes"]
) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON text) of the calls that a text consists of: objects or lists of them, one after another,
    or names and arguments where the dialect has that form. None where it holds anything else, or a name that is not
    among `names`."""
    decoder, position, calls = json.JSONDecoder(parse_constant=_no_number), 0, []
    try:
        while (position := _skip(text, position)) < len(text):
            name = _NAMED.match(text, position) if dialect.named else None
            value, position = decoder.raw_decode(text, name.end() if name else position)
            if name:
                value = {"name": name[1], "arguments": value}
            calls += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        return None
    found = [_call(call, names) for call in calls]
    return None if not found or None in found else [call for call in found if call is not None]


def _skip(text: str, position: int) -> int:
    while position < len(text) and (text[position].isspace() or text[position] in ";,"):
        position += 1
    return position


def _call(value: Any, names: frozenset[str]) -> tuple[str, str] | None:
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair was written as an escape, and must stay one
        text = json.dumps(arguments)
    return name, text


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
