"""POST /v1/embeddings: a request's texts as token ids, and the answer as its vectors come."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec
import numpy as np

from ..text.tokenizer import LONG_TEXT
from .async_encoder import AsyncEncoder
from .bodies import CHARACTERS_PER_TOKEN, EmbeddingBody
from .faults import Fault

MAX_TEXTS = 2048  # of a request, as OpenAI's own
MODEL_LIMIT = -1  # truncate_prompt_tokens: to what the model takes


async def embedding_texts(body: EmbeddingBody, encoder: AsyncEncoder) -> list[list[int]]:
    """Token ids of each text. Fault 400 where the request is malformed, or a text is too long and none is to be cut."""
    if body.encoding_format not in (None, "float", "base64"):
        raise Fault(400, f"encoding_format must be float or base64, got {body.encoding_format!r:.40}",
                    param="encoding_format")  # fmt: skip
    if body.dimensions not in (None, encoder.spec.dim):
        raise Fault(400, f"this model's embeddings have {encoder.spec.dim} dimensions, which cannot be changed to "
                    f"{body.dimensions}; leave dimensions out", param="dimensions")  # fmt: skip
    given, ends = body.input, len(encoder.tokenizer.encode("")) // 2  # tokens put before a text, and as many behind it
    limit = _limit(body, encoder, 2 * ends + 1)
    kinds = {type(item) for item in given} if isinstance(given, list) else set()
    if len(kinds) > 1:
        raise Fault(400, "input must be a text, token ids, or a list of either; these are mixed", param="input")
    many: list[Any] = [given] if isinstance(given, str) or kinds == {int} else list(given)
    if not 1 <= len(many) <= MAX_TEXTS:
        raise Fault(400, f"input must hold from 1 to {MAX_TEXTS} texts, got {len(many)}", param="input")
    for index, text in enumerate(many):
        _check(index, text, encoder, cut=body.truncate_prompt_tokens is not None)

    def encode() -> list[list[int]]:
        return [_ids(index, text, encoder, limit, ends, body) for index, text in enumerate(many)]

    return encode() if sum(map(len, many)) <= LONG_TEXT else await asyncio.to_thread(encode)


def _limit(body: EmbeddingBody, encoder: AsyncEncoder, least: int) -> int:
    """Tokens that a text may have."""
    limit, asked = encoder.spec.context_length, body.truncate_prompt_tokens
    if asked is None or asked == MODEL_LIMIT:
        return limit
    if not least <= asked <= limit:
        raise Fault(400, f"truncate_prompt_tokens must be from {least} to {limit}, or {MODEL_LIMIT} for what the model "
                    f"takes, got {asked}", param="truncate_prompt_tokens")  # fmt: skip
    return asked


def _check(index: int, text: str | list[int], encoder: AsyncEncoder, cut: bool) -> None:
    """Refuse what cannot be before any work is done on it."""
    if not text:
        raise Fault(400, f"text {index} of input is empty; leave it out", param="input")
    if isinstance(text, str):
        most = encoder.spec.context_length * CHARACTERS_PER_TOKEN
        if len(text) > most and not cut:
            raise _too_long(index, f"{len(text)} characters", f"{most} of them at most", encoder)
    elif min(text) < 0 or max(text) >= encoder.spec.vocab_size:
        raise Fault(400, f"token ids go from 0 to {encoder.spec.vocab_size - 1}; text {index} of input has others",
                    param="input")  # fmt: skip


def _ids(
    index: int, text: str | list[int], encoder: AsyncEncoder, limit: int, ends: int, body: EmbeddingBody
) -> list[int]:
    if isinstance(text, str):
        # Where a text is cut anyway, what is far behind the cut is not encoded.
        ids = encoder.frontend.prompt_ids(text[: encoder.spec.context_length * CHARACTERS_PER_TOKEN])
    else:
        ids, ends = text, 0
    if len(ids) <= limit:
        return ids
    if body.truncate_prompt_tokens is None:
        raise _too_long(index, f"{len(ids)} tokens", f"{limit} at most", encoder)
    return ids[: limit - ends] + ids[len(ids) - ends :]


def _too_long(index: int, has: str, most: str, encoder: AsyncEncoder) -> Fault:
    message = (
        f"this model takes texts of {encoder.spec.context_length} tokens; text {index} of input has {has}, {most}; "
        f"shorten it, or have it cut by truncate_prompt_tokens ({MODEL_LIMIT}: to what the model takes)"
    )
    return Fault(400, message, code="context_length_exceeded", param="input")


async def embedding_answer(
    body: EmbeddingBody, encoder: AsyncEncoder, texts: list[list[int]], model: str
) -> dict[str, Any]:
    """OpenAI's answer. Vectors become JSON some at a time, as they come, so that many of them hold up nobody."""
    data: list[dict[str, Any]] = []
    async for vectors in encoder.embed(texts):
        for vector in vectors:
            data.append({"object": "embedding", "index": len(data), "embedding": _shown(vector, body.encoding_format)})
    tokens = sum(map(len, texts))
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _shown(vector: np.ndarray, encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return msgspec.Raw(msgspec.json.encode(vector.tolist()))
