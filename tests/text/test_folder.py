"""Hugging Face folders: neighbours of tokenizer.json, and files that are missing or malformed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from headrace.errors import ModelFileError, UnsupportedModelError
from headrace.text.tokenizer import Tokenizer

from . import vocabularies as v


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    v.byte_level_library("smollm").save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config", {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))


def test_names_come_from_the_neighbours(folder: Path) -> None:
    write(folder, "generation_config", {"eos_token_id": [5, 2]})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (5, 2, 0), False)
    config = {"bos_token": "<|im_start|>", "add_bos_token": True, "add_eos_token": True, "eos_token": "<|im_end|>"}
    write(folder, "tokenizer_config", config)
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("a")
    assert tokenizer.add_bos and (ids[0], ids[-1]) == (1, 2) and len(ids) == 3


def test_where_the_chat_template_is(folder: Path) -> None:
    write(folder, "tokenizer_config", {"chat_template": "one"})
    assert Tokenizer.from_folder(folder).chat_template == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    write(folder, "tokenizer_config", {"chat_template": named})
    assert Tokenizer.from_folder(folder).chat_template == "three"
    assert Tokenizer.from_folder(folder).tool_template == "two"
    (folder / "chat_template.jinja").write_text("four")
    assert Tokenizer.from_folder(folder).chat_template == "four"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("five")
    assert Tokenizer.from_folder(folder).tool_template == "five"
    (folder / "chat_template.jinja").unlink()
    write(folder, "tokenizer_config", {})
    write(folder, "chat_template", {"chat_template": "six"})
    assert Tokenizer.from_folder(folder).chat_template == "six"


def test_truncation_and_padding_of_the_file_are_off(folder: Path) -> None:
    library = v.byte_level_library("smollm")
    library.enable_truncation(2)
    library.enable_padding(length=8)
    library.save(str(folder / "tokenizer.json"))
    text = "the quick brown fox"
    assert Tokenizer.from_folder(folder).encode(text) == v.byte_level_ids("smollm", text)


MALFORMED: dict[str, tuple[str, Any, str]] = {
    "not JSON": ("tokenizer", "{", "is not a tokenizer"),
    "not a tokenizer": ("tokenizer", {"model": {"type": "Nothing"}}, "is not a tokenizer"),
    "a list": ("tokenizer_config", [1], "is list, not an object"),
    "config not JSON": ("tokenizer_config", "{,", "cannot be read"),
    "nested too deeply": ("tokenizer_config", "[" * 100_000, "cannot be read"),
    "bos unknown": ("tokenizer_config", {"bos_token": "<none>"}, "'<none>' is not among the tokens"),
    "bos a number": ("tokenizer_config", {"bos_token": 1}, "bos_token: 1 is not among the tokens"),
    "end outside": ("generation_config", {"eos_token_id": 10_000}, "is 10000; the vocabulary has ids 0 to"),
    "end a text": ("generation_config", {"eos_token_id": ["2"]}, "is '2'; the vocabulary has ids 0 to"),
    "end a boolean": ("generation_config", {"eos_token_id": True}, "is True; the vocabulary has ids 0 to"),
}


@pytest.mark.parametrize("name, value, problem", MALFORMED.values(), ids=MALFORMED)
def test_malformed(folder: Path, name: str, value: Any, problem: str) -> None:
    Tokenizer.from_folder(folder)  # the control
    write(folder, name, value)
    with pytest.raises(ModelFileError, match=problem) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_tokenizer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="save the tokenizer again"):
        Tokenizer.from_folder(tmp_path)


def test_an_unknown_decoder_is_refused(folder: Path) -> None:
    library = v.byte_level_library("smollm")
    library.decoder = decoders.CTC()
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="its decoder is CTC; supported are ByteLevel"):
        Tokenizer.from_folder(folder)
