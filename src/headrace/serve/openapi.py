"""The OpenAPI document, from the structs that bodies are checked against."""

from __future__ import annotations

from typing import Any

import msgspec

from .. import __version__
from .bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    LoadBody,
    ScaleBody,
    ScoreBody,
    TokenizeBody,
)

_POSTS: dict[str, tuple[type[msgspec.Struct], str, bool]] = {
    "/v1/chat/completions": (ChatBody, "The assistant's answer to a conversation.", True),
    "/v1/completions": (CompletionBody, "Complete prompts.", True),
    "/v1/embeddings": (EmbeddingBody, "Vectors of texts, by models that make them.", False),
    "/v1/score": (ScoreBody, "Log-probabilities of prompts' own tokens.", False),
    "/tokenize": (TokenizeBody, "A text, or a conversation, as token ids.", False),
    "/detokenize": (DetokenizeBody, "Token ids as text.", False),
    "/admin/load": (LoadBody, "Load one more model.", False),
    "/admin/unload": (LoadBody, "Unload a model.", False),
    "/admin/scale": (ScaleBody, "Have so many replicas of a stage of a split model.", False),
}
_GETS = {
    "/v1/models": "The models that are served.",
    "/health": "Whether the engines make progress. Needs no key.",
    "/ready": "Whether requests are taken.",
    "/metrics": "Prometheus metrics.",
    "/version": "The server's version.",
    "/tokenizer_info": "A model's tokenizer.",
    "/admin/timeline": "What a model did in the last seconds, as a trace for Perfetto.",
    "/openapi.json": "This document.",
}
_ERRORS = {
    "400": "The request is malformed, or asks for what is not supported.",
    "401": "A key is needed.",
    "403": "Not allowed.",
    "404": "No such model or route.",
    "408": "The body did not come in time, or the deadline passed.",
    "409": "In conflict with what is loaded.",
    "413": "The body is too large.",
    "415": "The body's encoding is not supported.",
    "429": "The queue is full.",
    "500": "The server failed.",
    "503": "The model is loading, stopped or going down.",
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in _POSTS.values()))
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(kinds, schemas, strict=True))
    components["Error"] = _ERROR
    paths: dict[str, Any] = {}
    for path, (kind, text, streams) in _POSTS.items():
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if streams:
            content["text/event-stream"] = {}
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema_of[kind]}}},
                "responses": {"200": {"description": "The answer.", "content": content}, **_errors()},
            }
        }
    for path, text in _GETS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        answer = {"200": {"description": text, "content": {kind: {"schema": {}}}}, **_errors()}
        if path in ("/health", "/ready"):
            answer["503"] = {"description": "The state.", "content": {kind: {"schema": {"type": "object"}}}}
        paths[path] = {"get": {"summary": text, "responses": answer}}
    paths["/health"]["get"]["security"] = []
    paths["/tokenizer_info"]["get"]["parameters"] = [{"name": "model", "in": "query", "schema": {"type": "string"}}]
    paths["/admin/timeline"]["get"]["parameters"] = [
        {"name": "seconds", "in": "query", "schema": {"type": "number", "default": 10}},
        {"name": "model", "in": "query", "schema": {"type": "string"}},
    ]
    paths["/v1/models/{name}"] = {
        "get": {
            "summary": "One model.",
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
            "responses": {
                "200": {"description": "The model.", "content": {"application/json": {"schema": {"type": "object"}}}},
                **_errors(),
            },
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}
