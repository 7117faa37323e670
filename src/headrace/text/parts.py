"""What a model file says of its tokenizer, in the one shape that both readers make and `tokenizer.py` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Spelling = Literal["byte-level", "sentencepiece", "wordpiece"]


@dataclass(frozen=True)
class TokenizerParts:
    """What a file says of its tokenizer, checked: the readers of `gguf.py` and `folder.py` make it."""

    backend: Backend  # with added tokens and post-processor in place
    spelling: Spelling  # how a piece spells its bytes
    strips_first_space: bool  # encoding put a space before the text, so decoding takes it off
    special_ids: frozenset[int]
    user_ids: frozenset[int]  # added tokens that are matched whole in any text, and spelled literally
    byte_ids: Mapping[int, int]  # sentencepiece: token id to the byte that it stands for
    bos_id: int | None
    eos_ids: tuple[int, ...]  # named by the file
    chat_template: str | None
    tool_template: str | None = None  # the one for conversations with tools, where that is another


def set_ends(backend: Backend, bos: int | None, eos: int | None) -> None:
    """Make encoding put `bos` before and `eos` after the text; None puts nothing there."""
    from tokenizers import processors

    ends = [(name, token) for name, token in (("BOS", bos), ("EOS", eos)) if token is not None]
    special: list[Any] = [{"id": name, "ids": [token], "tokens": [backend.id_to_token(token)]} for name, token in ends]
    template = [*(["BOS"] if bos is not None else []), "$A", *(["EOS"] if eos is not None else [])]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
