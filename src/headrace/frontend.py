"""From what a user writes to Requests: encoding, chat templates, and every check that needs the model's vocabulary."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from itertools import count

from .completion import stop_ids
from .errors import RequestError
from .text.tokenizer import Tokenizer
from .types import Kind, Request, SamplingParams

Prompt = str | Sequence[int]
Message = dict[str, object]


class Frontend:
    """Makes requests for one model. `vocab_size` is the model's, which may be larger than the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._numbers = count()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Text is encoded; what looks like a special token in it stays text."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not ids:
                raise RequestError("the prompt has no tokens; give some text")
            return ids
        ids = list(prompt)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise RequestError(f"prompt token {token!r:.40} is not an id of this model; ids go from 0 to {self.vocab_size - 1}")
        return ids

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the model's chat format, up to where the assistant speaks."""
        from .text.chat import chat_prompt

        return chat_prompt(self.tokenizer, messages)

    def requests(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, kind: Kind = "generate", priority: int = 0,
        deadline: float | None = None, salt: str = "",
    ) -> list[Request]:  # fmt: skip
        """One request per sample. An absent seed is drawn here; `deadline` is in seconds from now."""
        for name, tokens in (("logit_bias", params.logit_bias), ("banned_tokens", params.banned_tokens), ("stop_token_ids", params.stop_token_ids)):
            for token in tokens:
                if token >= self.vocab_size:
                    raise RequestError(f"{name} names token {token}; ids go from 0 to {self.vocab_size - 1}")
        now = time.monotonic()
        first = Request(
            id=f"request-{next(self._numbers)}",
            prompt_ids=tuple(prompt_ids),
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed % 2**64,
            stop_ids=stop_ids(params, self.tokenizer),
            arrival=now,
            priority=priority,
            deadline=None if deadline is None else now + deadline,
            kind=kind,
            salt=salt,
        )
        return [_sample_of(first, index) for index in range(params.n)]


def _sample_of(request: Request, index: int) -> Request:
    return Request(**{name: getattr(request, name) for name in request.__struct_fields__} | {"sample_index": index})
