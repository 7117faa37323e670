"""Tokens that arrive in pieces: the same text for any chunking, and only whole characters on the way."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.text.detokenizer import Detokenizer
from headrace.text.tokenizer import Tokenizer

from . import vocabularies as v

TOKENIZERS = {
    "byte-level": Tokenizer.from_gguf(v.byte_level_metadata("smollm")),
    "sentencepiece": Tokenizer.from_gguf(v.sentencepiece_metadata()),
    "no prefix": Tokenizer.from_gguf(v.sentencepiece_metadata(add_space_prefix=False)),
}
SIZES = st.lists(st.integers(0, 5), max_size=12)


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    ends = [min(end, len(ids)) for end in accumulate(sizes)] + [len(ids)]
    return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def streamed(detokenizer: Detokenizer, parts: list[list[int]]) -> list[str]:
    return [*(detokenizer.push(part) for part in parts), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 899), max_size=30), sizes=SIZES, skip=st.booleans())
@example(ids=[3 + 0xF0, 3 + 0x9F, 3 + 0x91, 1, 3 + 0x8D], sizes=[1] * 5, skip=True)
def test_any_tokens_in_any_chunks(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool) -> None:
    """Any ids, so mostly text that no one wrote: broken characters, special tokens amid characters."""
    shown = streamed(Detokenizer(tokenizer, skip), chunks(ids, sizes))
    assert "".join(shown) == tokenizer.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("aé你👩🏽\u200d̈ \n"), max_size=20), sizes=SIZES)
def test_never_half_a_character(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text, add_special=False)
    shown = streamed(Detokenizer(tokenizer), chunks(ids, sizes))
    assert "".join(shown) == text and "\ufffd" not in "".join(shown)
    assert shown[-1] == ""  # nothing was held back that was whole


def test_a_character_is_shown_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    alphabet = v.byte_alphabet()
    ids: list[Any] = [tokenizer.token_id(alphabet[byte]) for byte in "é👍a".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "é", "", "", "", "👍", "a"]
    cut = Detokenizer(tokenizer)
    assert cut.push(ids[:4]) == "é" and cut.finish() == "\ufffd" == tokenizer.decode(ids[2:4])
    broken = Detokenizer(tokenizer)
    assert broken.push([*ids[2:4], ids[6]]) == "\ufffda"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("aé你👩 \n"), min_size=1, max_size=20),
    cut=st.integers(0, 40),
    sizes=SIZES,
    bos=st.booleans(),
)
def test_after_a_prompt_the_text_goes_on(
    tokenizer: Tokenizer, text: str, cut: int, sizes: list[int], bos: bool
) -> None:
    """Prompt and answer, cut inside a character or not: the answer is all that the prompt's whole characters lack."""
    ids = tokenizer.encode(text, add_special=bos)
    prompt, rest = ids[:cut], ids[cut:]
    answer = "".join(streamed(Detokenizer(tokenizer, prompt_ids=prompt), chunks(rest, sizes)))
    before = Detokenizer(tokenizer).push(prompt)
    assert before + answer == tokenizer.decode(ids) == text


def test_first_space_goes_at_the_start_only() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("the cat", add_special=False)
    assert "".join(streamed(Detokenizer(tokenizer), [ids])) == "the cat"
    assert "".join(streamed(Detokenizer(tokenizer, prompt_ids=ids), [ids])) == " the cat"
    two = tokenizer.encode("  x", add_special=False)
    assert "".join(streamed(Detokenizer(tokenizer), [[i] for i in two])) == "  x" == tokenizer.decode(two)


def test_ids_outside_the_vocabulary_contribute_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab", add_special=False)
    assert "".join(streamed(Detokenizer(tokenizer), [[-1], ids, [1 << 40]])) == "ab"
