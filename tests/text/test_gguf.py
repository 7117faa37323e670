"""Tokenizer metadata that is wrong: a typed error that names the field and what is wrong, before anything large."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.errors import ModelFileError, UnsupportedModelError
from headrace.text.gguf import MAX_PIECE_CHARS
from headrace.text.tokenizer import Tokenizer

from . import vocabularies as v

PIECES, MERGES = v.trained_byte_level()
LINES = [f"{left} {right}" for left, right in MERGES]
SPM_PIECES, SPM_SCORES, _ = v.trained_sentencepiece()
N = len(PIECES)

BYTE_LEVEL = {
    "no tokens": ({"tokens": []}, "tokens: holds 0 tokens"),
    "tokens missing": ({"tokens": None}, "tokens: holds 0 tokens"),
    "tokens a text": ({"tokens": "abc"}, "tokens: is str, not an array"),
    "tokens a number": ({"tokens": 7}, "tokens: is int, not an array"),
    "tokens of numbers": ({"tokens": [1, 2, 3]}, "tokens: is not an array of str only"),
    "one token a number": ({"tokens": [*PIECES[:-1], 5]}, "tokens: is not an array of str only"),
    "one token bytes": ({"tokens": [*PIECES[:-1], b"x"]}, "tokens: is not an array of str only"),
    "tokens twice": ({"tokens": [*PIECES[:-1], PIECES[9]]}, f"token 9 and token {N - 1} are both"),
    "a token too long": ({"tokens": [*PIECES[:-1], "x" * (MAX_PIECE_CHARS + 1)]}, f"{MAX_PIECE_CHARS + 1} characters"),
    "types too few": ({"token_type": [1] * (N - 1)}, f"token_type: has {N - 1} entries for {N} tokens"),
    "types a text": ({"token_type": "11"}, "token_type: is str"),
    "types of texts": ({"token_type": ["1"] * N}, "token_type: is not an array of int only"),
    "types of lists": ({"token_type": [[1]] * N}, "token_type: is not an array of int only"),
    "merge of one": ({"merges": [*LINES, "ab"]}, f"merge {len(LINES)} is 'ab'"),
    "merge of three": ({"merges": ["a b c", *LINES]}, "merge 0 is 'a b c'"),
    "merges cancel out": ({"merges": ["a b c", "ab"]}, "merge 0 is 'a b c'"),
    "merge unknown left": ({"merges": ["zzq a"]}, "merge 0 names 'zzq'"),
    "merge unknown union": ({"merges": [*LINES, "! ~"]}, f"merge {len(LINES)} names '!~'"),
    "merges of numbers": ({"merges": [1, 2]}, "merges: is not an array of str only"),
    "merges of lists": ({"merges": [["a", "b"]]}, "merges: is not an array of str only"),
    "merges a number": ({"merges": 3}, "merges: is int"),
    "bos outside": ({"bos_token_id": N}, f"bos_token_id: is {N}; the vocabulary has ids 0 to {N - 1}"),
    "eos negative": ({"eos_token_id": -1}, "eos_token_id: is -1"),
    "eot a text": ({"eot_token_id": "2"}, "eot_token_id: is '2'"),
    "eom real": ({"eom_token_id": 2.0}, "eom_token_id: is 2.0"),
    "bos a boolean": ({"bos_token_id": True}, "bos_token_id: is True"),
    "add_bos a text": ({"add_bos_token": "yes"}, "add_bos_token: is 'yes'"),
}

SENTENCEPIECE = {
    "no scores": ({"scores": None}, "scores: is missing"),
    "no types": ({"token_type": None}, "token_type: is missing"),
    "scores too many": ({"scores": [*SPM_SCORES, 0.0]}, f"scores: has {len(SPM_SCORES) + 1} entries"),
    "scores nan": ({"scores": [float("nan"), *SPM_SCORES[1:]]}, "scores: holds a value that is not a number"),
    "scores texts": ({"scores": ["a"] * len(SPM_SCORES)}, "scores: is not an array of float only"),
    "no bytes, no unknown": (
        {"token_type": [v.CONTROL] * 3 + [v.NORMAL] * (len(SPM_SCORES) - 3), "unknown_token_id": None},
        "has 0 of 256 byte tokens and no unknown token",
    ),
    "unknown outside": ({"unknown_token_id": 1 << 40}, "unknown_token_id: is 1099511627776"),
    "prefix a list": ({"add_space_prefix": []}, r"add_space_prefix: is \[\]"),
}


def changed(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in merged.items() if value is not None}


@pytest.mark.parametrize("changes, problem", BYTE_LEVEL.values(), ids=BYTE_LEVEL)
def test_malformed_byte_level(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFileError, match=f"^model.gguf: tokenizer.ggml.*{problem}"):
        Tokenizer.from_gguf(changed(v.byte_level_metadata("smollm"), changes), "model.gguf")


@pytest.mark.parametrize("changes, problem", SENTENCEPIECE.values(), ids=SENTENCEPIECE)
def test_malformed_sentencepiece(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFileError, match=f"^model.gguf: tokenizer.ggml.*{problem}"):
        Tokenizer.from_gguf(changed(v.sentencepiece_metadata(), changes), "model.gguf")


@pytest.mark.parametrize("pre", ["kimi-k9", "", 5, ["smollm"]])
def test_unsupported_pre_type_lists_what_is_supported(pre: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"supported are bloom, .*, llama-bpe, .*, qwen2, .*, tekken"):
        Tokenizer.from_gguf(v.byte_level_metadata(pre))


@pytest.mark.parametrize("kind", ["rwkv", "t5", None, 3, ["gpt2"]])
def test_unsupported_model_lists_what_is_supported(kind: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="supported are 'gpt2', 'llama', 'bert'"):
        Tokenizer.from_gguf(v.byte_level_metadata("smollm") | {"tokenizer.ggml.model": kind})


def test_what_was_changed_is_what_was_refused() -> None:
    """The control: without a change both load, and with fields that may be missing left out too."""
    Tokenizer.from_gguf(changed(v.byte_level_metadata("smollm"), {"token_type": None, "bos_token_id": None}))
    Tokenizer.from_gguf(changed(v.sentencepiece_metadata(), {"bos_token_id": None, "unknown_token_id": None}))


def test_llama_bpe_begins_with_bos_where_the_file_does_not_say() -> None:
    for pre, adds in (("llama-bpe", True), ("smollm", False)):
        metadata = changed(v.byte_level_metadata(pre), {"add_bos_token": None})
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.add_bos is adds and (tokenizer.encode("a")[:1] == [1]) is adds
