"""Tokens to text while they arrive: every character once, whole, and as soon as nothing can change it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer

_MAX_PENDING_BYTES = 3  # of an unfinished UTF-8 character


class Detokenizer:
    """Incremental `Tokenizer.decode`: what all `push` calls and `finish` return, joined, is the same for any chunking.

    Without `prompt_ids` it equals `tokenizer.decode(ids)`. With them it is what `ids` add to the prompt's text: the
    first word keeps its space, and a character that the prompt left unfinished is completed.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> None:
        self._bytes = tokenizer.plain_bytes if skip_special_tokens else tokenizer.all_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        tail = b""  # a UTF-8 decoder's state depends on the last three bytes alone
        for token in reversed(prompt_ids):
            tail = self._bytes[token] + tail
            if len(tail) >= _MAX_PENDING_BYTES:
                break
        self._decode(tail)
        self._at_start = tokenizer.strips_first_space and not tail

    def push(self, ids: Sequence[int]) -> str:
        """The text that is final now and was not before; it may be empty."""
        table = self._bytes
        text = self._decode(b"".join([table[token] for token in ids]))
        return self._after_start(text) if self._at_start and text else text

    def finish(self) -> str:
        """What was held back, with U+FFFD for a character that never became whole."""
        text = self._decode(b"", True)
        return self._after_start(text) if self._at_start and text else text

    def _after_start(self, text: str) -> str:
        self._at_start = False
        return text.removeprefix(" ")
