"""WordPiece as BERT has it: words of cleaned text, each the longest pieces from its start on (Wu et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

CONTINUED = "##"  # before a piece that goes on with a word


def wordpiece(pieces: Mapping[str, int], unknown: str, lower: bool, accents: bool | None = None) -> Backend:
    """`pieces`: id by spelling. `lower`: text is put in lower case. `accents`: they stay; by default they do unless
    `lower`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    model = models.WordPiece(dict(pieces), unk_token=unknown, continuing_subword_prefix=CONTINUED)
    backend = Tokenizer(model)
    strip = None if accents is None else not accents
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend
