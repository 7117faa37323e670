"""From what a user writes to Requests: encoding, chat templates, and every check that needs the model's vocabulary."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from itertools import count
from operator import index
from typing import TYPE_CHECKING, Any

import msgspec

from .completion import stop_ids
from .errors import RequestError
from .text.tokenizer import Tokenizer
from .types import Kind, Request, SamplingParams

if TYPE_CHECKING:
    from .text.chat import ChatTemplate

Prompt = str | Sequence[int]
Message = dict[str, Any]
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name": str, ...}}
MAX_PRIORITY = 1 << 31
MAX_SALT = 1024
GUARD = "\ufdd0"  # a code point that Unicode keeps out of texts


class Frontend:
    """Makes requests for one model. `vocab_size` is the model's, which may be larger than the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._numbers = count()
        self._compiled: dict[str, ChatTemplate] = {}

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Text is encoded; what looks like a special token in it stays text."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not ids:
                raise RequestError("the prompt has no tokens; give some text")
            return ids
        try:
            ids = [index(token) for token in prompt]
        except TypeError:
            ids = None
        if ids is None or any(isinstance(token, bool) for token in prompt):
            raise RequestError(f"a prompt must be text or token ids, got {prompt!r:.80}")
        return ids

    def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat format, up to where the assistant speaks.

        `tools` are what the model may call; `variables` are the template's own switches, such as enable_thinking. The
        template's special tokens are special; the same characters inside a message stay text. RequestError or
        TemplateError where the conversation cannot be written.
        """
        name = self._special_name
        bos, eos = name(self.tokenizer.bos_id), name(next(iter(self.tokenizer.eos_ids), None))
        names = {text for token in self.tokenizer.special_ids if len(text := name(token)) > 1}
        given = [messages, tools or None, _checked_variables(variables)]
        try:
            guarded = _guard(given, names)
        except RecursionError:
            raise RequestError("the messages or tools are nested too deeply") from None
        switches = {"bos_token": bos, "eos_token": eos, **guarded[2]}
        text = self._template(bool(tools)).render(guarded[0], tools=guarded[1], **switches)
        if guarded == given:
            return self.tokenizer.encode(text, add_special=False, parse_special=True)
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})", text):
            token = self.tokenizer.token_id(piece) if piece in names else None
            ids += [token] if token is not None else self.tokenizer.encode(piece.replace(GUARD, ""), add_special=False)
        return ids

    def _template(self, tools: bool) -> ChatTemplate:
        source = (tools and self.tokenizer.tool_template) or self.tokenizer.chat_template
        if source is None:
            raise RequestError(
                "this model has no chat template; give it plain text (generate, or --raw on the command line)"
            )
        if source not in self._compiled:
            from .text.chat import ChatTemplate

            self._compiled[source] = ChatTemplate(source)
        return self._compiled[source]

    def _special_name(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.token_bytes(token).decode("utf-8", "replace")

    def requests(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, kind: Kind = "generate", priority: int = 0,
        deadline: float | None = None, salt: str = "",
    ) -> list[Request]:  # fmt: skip
        """One request per sample. An absent seed is drawn here; `deadline` is in seconds from now."""
        if not all(0 <= token < self.vocab_size for token in (min(prompt_ids, default=0), max(prompt_ids, default=0))):
            raise RequestError(
                f"the prompt has token ids from {min(prompt_ids)} to {max(prompt_ids)}; this model's go from 0 to "
                f"{self.vocab_size - 1}"
            )
        if kind not in ("generate", "score"):
            raise RequestError(f"kind must be generate or score, got {kind!r:.80}")
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise RequestError(f"priority must be a whole number of at most {MAX_PRIORITY}, got {priority!r:.80}")
        if deadline is not None and not (isinstance(deadline, (int, float)) and 0 <= deadline < math.inf):
            raise RequestError(f"deadline must be seconds from now, got {deadline!r:.80}")
        if not isinstance(salt, str) or len(salt) > MAX_SALT:
            raise RequestError(f"salt must be text of at most {MAX_SALT} characters, got {salt!r:.80}")
        for name, tokens in (
            ("logit_bias", params.logit_bias),
            ("banned_tokens", params.banned_tokens),
            ("stop_token_ids", params.stop_token_ids),
        ):
            for token in tokens:
                if token >= self.vocab_size:
                    raise RequestError(f"{name} names token {token}; ids go from 0 to {self.vocab_size - 1}")
        if params.grammar is not None and not self.tokenizer.eos_ids:
            raise RequestError("this model has no end token, so an answer cannot end where its grammar does")
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
        return [msgspec.structs.replace(first, sample_index=sample) for sample in range(params.n)]


def _guard(value: Any, names: set[str]) -> Any:
    """The same plain data, with every special token's name in it broken up by GUARD."""
    if isinstance(value, str):
        if GUARD in value or any(name in value for name in names):
            value = value.replace(GUARD, "")
            for name in names:
                value = value.replace(name, name[0] + GUARD + name[1:])
        return value
    if isinstance(value, Mapping):
        return {key: _guard(item, names) for key, item in value.items()}
    return [_guard(item, names) for item in value] if isinstance(value, (list, tuple)) else value


def _checked_variables(variables: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not isinstance(variables or {}, Mapping) or not all(isinstance(name, str) for name in variables or ()):
        raise RequestError(f"the template's variables must be an object, got {variables!r:.80}")
    if taken := {"messages", "tools", "seconds"}.intersection(variables or ()):
        raise RequestError(f"{sorted(taken)[0]!r} cannot be set as a variable of the template")
    return variables or {}
