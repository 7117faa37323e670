"""A conversation as the text that a model was trained on, by the model's own chat template."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import HeadraceError, RequestError, TemplateError

MAX_RENDERED_CHARS = 1 << 22
SECONDS = 1.0

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates have for it


class ChatTemplate:
    """A compiled chat template. Compiling takes milliseconds, so whoever renders often keeps one. Thread-safe.

    Templates are untrusted programs and run under the limits of `sandbox.py`: time, work, memory, output are bounded.
    """

    def __init__(self, source: str) -> None:
        from .sandbox import BoundedEnvironment

        self._environment = BoundedEnvironment()
        self._lock = threading.Lock()  # the environment holds one budget at a time
        try:
            self._template = self._environment.prepare(source)
        except HeadraceError:
            raise
        except Exception as error:
            raise TemplateError(f"the chat template cannot be compiled: {_reason(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] | None = None,
        bos_token: str = "",
        eos_token: str = "",
        seconds: float = SECONDS,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation. `messages`: [{"role": str, "content": str | list of parts | None, ...}];
        `tools`: what the model may call, [{"type": "function", "function": {"name": str, ...}}].

        A content of text parts only becomes one text, a line per part. `variables` are plain data for the template.
        Raises RequestError (malformed messages or tools) or TemplateError (the template refuses, fails or breaks a
        limit).
        """
        from .budget import Budget

        given = {"documents": None, "bos_token": bos_token, "eos_token": eos_token, **variables}
        given |= {"messages": checked_messages(messages), "tools": checked_tools(tools)}
        given["add_generation_prompt"] = add_generation_prompt
        try:
            values = _plain(given, "the template's variables")
        except RecursionError:
            raise RequestError("the messages or tools are nested too deeply") from None
        with self._lock:
            self._environment.budget = Budget(seconds)
            try:
                return self._collect(self._template.new_context(values))
            except HeadraceError:
                raise
            except Exception as error:
                raise TemplateError(f"the chat template failed: {_reason(error)}") from None

    def _collect(self, context: Any) -> str:
        pieces, length = [], 0
        for piece in self._template.root_render_func(context):
            length += len(piece)
            if length > MAX_RENDERED_CHARS:
                raise TemplateError(
                    f"the chat template wrote more than {MAX_RENDERED_CHARS} characters; shorten the messages"
                )
            pieces.append(piece)
        return "".join(pieces)


def render_chat(template: str, messages: Sequence[Message], **options: Any) -> str:
    """`ChatTemplate(template).render(messages, **options)`, for a template that is used once."""
    return ChatTemplate(template).render(messages, **options)


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the one shape that templates expect. Raises RequestError naming the message that is malformed."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError(f"messages must be a list of at least one message, got {messages!r:.80}")
    return [_checked_message(i, message) for i, message in enumerate(messages)]


def _checked_message(i: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {i} must be an object with role and content, got {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"message {i} must have a role such as 'user', got {role!r:.80}")
    if content is None and not message.get("tool_calls"):
        raise RequestError(f"message {i} has no content; give a string or a list of parts")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise RequestError(f"message {i} has a content part without a type: {part!r:.80}")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise RequestError(f"message {i} has a text part without a text: {part!r:.80}")
        if all(part["type"] == "text" for part in content):
            content = "\n".join(part["text"] for part in content)
    elif content is not None and not isinstance(content, str):
        raise RequestError(f"message {i} must have a string or a list of parts as content, got {content!r:.80}")
    checked = {**message, "content": content} if "content" in message else {**message}
    if checked.pop("tool_calls", None) is not None:
        checked["tool_calls"] = _checked_calls(i, message["tool_calls"])
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return checked if reasoning is None else {"thinking": reasoning, **checked, "reasoning_content": reasoning}


def _checked_calls(i: int, calls: Any) -> list[Any]:
    """A message's tool calls, with arguments as the object that templates expect where they are given as JSON text."""
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise RequestError(f"message {i} must have a list of objects as tool_calls, got {calls!r:.80}")
    checked = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                problem = f"has a tool call whose arguments are not JSON: {function['arguments']!r:.80}"
                raise RequestError(f"message {i} {problem}") from None
            call = {**call, "function": {**function, "arguments": arguments}}
        checked.append(call)
    return checked


def checked_tools(tools: Sequence[Tool] | None) -> list[Tool] | None:
    """A list of tools, as templates expect it. Raises RequestError naming the tool that is malformed."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools must be a list of objects, got {tools!r:.80}")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            problem = 'must be {"type": "function", "function": {"name": str, ...}}'
            raise RequestError(f"tool {i} {problem}, got {tool!r:.80}")
    return list(tools)


def _plain(value: Any, where: str) -> Any:
    """Plain data rebuilt from plain types only: no object with methods of its own reaches a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise RequestError(f"{where[:200]} is {type(value).__name__}; a chat template takes plain data (as in JSON) only")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500] if not isinstance(error, RecursionError) else "it nests too deeply"
