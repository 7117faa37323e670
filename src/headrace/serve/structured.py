"""What an answer must look like, by the names that clients have for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ..types import GrammarSpec
from .faults import Fault

if TYPE_CHECKING:
    from .bodies import Body

ANY_OBJECT = {"type": "object"}


def grammar_of(body: Body) -> GrammarSpec | None:
    """Of response_format, structured_outputs or guided_*; None where the answer is free. Fault 400 where more than one
    is given, or one is malformed."""
    asked: list[tuple[str, GrammarSpec]] = []
    if (wanted := _response_format(body.response_format)) is not None:
        asked.append(("response_format", wanted))
    guided = {name: getattr(body, f"guided_{name}") for name in ("json", "regex", "grammar", "choice")}
    for prefix, given in (("guided_", guided), ("structured_outputs.", body.structured_outputs or {})):
        asked += [
            (prefix + name, _one(name, value, prefix + name)) for name, value in given.items() if value is not None
        ]
    if len(asked) > 1:
        raise Fault(400, f"{asked[0][0]} and {asked[1][0]} cannot both be asked for", param=asked[1][0])
    return asked[0][1] if asked else None


def _response_format(given: dict[str, Any] | None) -> GrammarSpec | None:
    kind = None if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return _schema(ANY_OBJECT, "response_format")
    if kind == "json_schema":
        outer = given.get("json_schema")
        if not isinstance(outer, dict) or not isinstance(outer.get("schema"), dict):
            raise Fault(
                400, 'response_format must be {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}',
                param="response_format",
            )  # fmt: skip
        return _schema(outer["schema"], "response_format")
    raise Fault(
        400,
        f"response_format's type must be text, json_object or json_schema, got {kind!r:.80}",
        param="response_format",
    )


def _one(name: str, value: Any, param: str) -> GrammarSpec:
    if name == "json" and isinstance(value, str):
        return GrammarSpec("json_schema", value)
    if name == "json" and isinstance(value, dict):
        return _schema(value, param)
    if name == "json_object" and value is True:
        return _schema(ANY_OBJECT, param)
    if name == "regex" and isinstance(value, str):
        return GrammarSpec("regex", value)
    if name == "grammar" and isinstance(value, str):
        return GrammarSpec("grammar", value)
    if name == "choice" and isinstance(value, list):
        return GrammarSpec.choice(value)
    raise Fault(400, f"{param} is not understood: {value!r:.80}", param=param)


def _schema(schema: dict[str, Any], param: str) -> GrammarSpec:
    try:
        return GrammarSpec("json_schema", msgspec.json.encode(schema).decode())
    except RecursionError:
        raise Fault(400, f"{param} nests too deeply", param=param) from None
