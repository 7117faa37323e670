"""Text to ids as transformers, the `tokenizers` library and plain models of the algorithms have it, and back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.errors import ModelFileError, RequestError, UnsupportedModelError
from headrace.text.pre_tokenizers import PRE_TOKENIZERS
from headrace.text.tokenizer import LONG_TEXT, Tokenizer

from . import vocabularies as v

# Bytes that SmolLM2's vocabulary has no token for: controls, and what UTF-8 uses in planes 4 to 11 or never.
SMOLLM2_LACKS = {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
ADVERSE = st.text(st.sampled_from("the catsrx=1 \n\r\t▁'5½éе́你👩\u200d"), max_size=40)


@pytest.fixture(scope="module", params=[*v.CUTS])
def pre(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def byte_level(pre: str) -> Tokenizer:
    return Tokenizer.from_gguf(v.byte_level_metadata(pre))


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no-prefix"])
def space_prefix(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def sentencepiece(space_prefix: bool) -> Tokenizer:
    return Tokenizer.from_gguf(v.sentencepiece_metadata(add_space_prefix=space_prefix))


# --- the default model


@pytest.fixture(scope="module")
def reference(transformers_smollm2: Any) -> Any:
    """transformers' vocabulary and merges under the cut that the model's own tokenizer.json has."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(transformers_smollm2.backend_tokenizer.to_str())
    library.pre_tokenizer = v.library_cut("smollm")
    return library


@pytest.mark.parametrize("parse", [False, True])
def test_smollm2_ids_equal_transformers(smollm2_tokenizer: Tokenizer, reference: Any, parse: bool) -> None:
    reference.encode_special_tokens = not parse
    for text in v.CORPUS:
        ids = smollm2_tokenizer.encode(text, parse_special=parse)
        assert ids == reference.encode(text).ids, text
        assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smollm2_ids_equal_transformers_as_loaded(smollm2_tokenizer: Tokenizer, transformers_smollm2: Any) -> None:
    """Without a change to transformers' side: its cut and the model's differ at spaces before numbers, and in numbers
    whose bytes were merged."""
    texts = [t for t in v.CORPUS if not regex.search(r"\s\s\p{N}|[^\P{N}0-9]", t)]
    assert len(texts) > len(v.CORPUS) - 6
    for text in texts:
        assert smollm2_tokenizer.encode(text, parse_special=True) == transformers_smollm2(text)["input_ids"], text
    assert smollm2_tokenizer.encode("a   1") != transformers_smollm2("a   1")["input_ids"]


def test_smollm2_names_its_ends(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.vocab_size == 49152
    assert smollm2_tokenizer.bos_id == 1 and not smollm2_tokenizer.add_bos
    assert smollm2_tokenizer.eos_ids == (2, 0)  # <|im_end|> by the file, <|endoftext|> by its name
    assert smollm2_tokenizer.token_bytes(2) == b"<|im_end|>" and smollm2_tokenizer.is_special(2)
    assert smollm2_tokenizer.encode("<|im_start|>", parse_special=True) == [1]


@settings(max_examples=300, deadline=None)
@given(UNICODE | ADVERSE)
def test_smollm2_round_trip(smollm2_tokenizer: Tokenizer, text: str) -> None:
    """But for the bytes that this vocabulary lacks, which contribute nothing (as in transformers)."""
    alphabet = v.byte_alphabet()
    lacks = {byte for byte in range(256) if smollm2_tokenizer.token_id(alphabet[byte]) is None}
    assert lacks == SMOLLM2_LACKS
    left = bytes(byte for byte in text.encode() if byte not in lacks).decode("utf-8", "replace")
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text), skip_special_tokens=False) == left


# --- byte-level BPE, each pre type


def test_byte_level_ids_equal_a_plain_model(byte_level: Tokenizer, pre: str) -> None:
    for text in v.CORPUS:
        assert byte_level.encode(text) == v.byte_level_ids(pre, text), text


@pytest.mark.parametrize("name", [pre for pre in v.CUTS if pre != "default"])  # no tokenizer.json cuts so
def test_byte_level_ids_equal_the_library(name: str) -> None:
    library, tokenizer = v.byte_level_library(name), Tokenizer.from_gguf(v.byte_level_metadata(name))
    for parse in (False, True):
        library.encode_special_tokens = not parse
        for text in v.CORPUS:
            assert tokenizer.encode(text, parse_special=parse) == library.encode(text).ids, text


def test_pre_types_cut_differently() -> None:
    """The control of the tests above: the corpus tells every cut from every other."""
    ids = {pre: [v.byte_level_ids(pre, text) for text in v.CORPUS] for pre in v.CUTS}
    for one in ids:
        for other in ids:
            assert (ids[one] == ids[other]) == (one == other)


def test_whole_pieces_only_where_the_pre_type_has_them(byte_level: Tokenizer, pre: str) -> None:
    unmerged = byte_level.token_id(v.UNMERGED)
    assert (byte_level.encode(" millrace") == [unmerged]) == (pre in v.WHOLE_PIECES)


def test_without_a_pre_type_the_default_cut() -> None:
    tokenizer = Tokenizer.from_gguf(v.byte_level_metadata(None))
    assert all(tokenizer.encode(text) == v.byte_level_ids("default", text) for text in v.CORPUS)


@settings(max_examples=300, deadline=None)
@given(UNICODE | ADVERSE)
@example("<|im_start|>")
def test_byte_level_round_trip(byte_level: Tokenizer, pre: str, text: str) -> None:
    ids = byte_level.encode(text)
    written = v.composed(text) if pre in v.COMPOSED else text
    assert byte_level.decode(ids, skip_special_tokens=False) == written
    assert not byte_level.special_ids.intersection(ids)


# --- SentencePiece style


def test_sentencepiece_ids_equal_a_plain_model(sentencepiece: Tokenizer, space_prefix: bool) -> None:
    for text in v.CORPUS:
        assert sentencepiece.encode(text, add_special=False) == v.sentencepiece_ids(text, space_prefix), text


@settings(max_examples=300, deadline=None)
@given(ADVERSE)
@example("aaaaa     aaa")
def test_sentencepiece_merges_as_scores_say(sentencepiece: Tokenizer, space_prefix: bool, text: str) -> None:
    assert sentencepiece.encode(text, add_special=False) == v.sentencepiece_ids(text, space_prefix)


@settings(max_examples=300, deadline=None)
@given(UNICODE | ADVERSE)
def test_sentencepiece_round_trip(sentencepiece: Tokenizer, text: str) -> None:
    """But for U+2581, which is how these vocabularies write a space."""
    assert sentencepiece.decode(sentencepiece.encode(text)) == text.replace("▁", " ")


def test_sentencepiece_bytes_and_ends(sentencepiece: Tokenizer, space_prefix: bool) -> None:
    assert sentencepiece.add_bos and sentencepiece.encode("a")[0] == 1
    assert sentencepiece.encode("", add_special=False) == []
    assert sentencepiece.encode("<s>", add_special=False) != [1]
    assert sentencepiece.encode("<s>", add_special=False, parse_special=True) == [1]
    spelled = sentencepiece.encode("\U00050000", add_special=False)
    assert spelled[-4:] == [3 + byte for byte in "\U00050000".encode()]
    assert b"".join(sentencepiece.token_bytes(i) for i in spelled[-4:]) == "\U00050000".encode()
    assert sentencepiece.encode(" <0x0A>", add_special=False) != sentencepiece.encode(" \n", add_special=False)
    with_eos = Tokenizer.from_gguf(v.sentencepiece_metadata(add_eos_token=True, add_bos_token=False))
    assert with_eos.encode("a")[-1] == 2 and not with_eos.add_bos


def random_strings(count: int) -> list[str]:
    """Unicode strings from all of its planes, assigned code points and not, with more of what people write."""
    random = Random(0)
    ranges = [(0, 0x7F)] * 6 + [(0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x900, 0xDFF), (0x2000, 0x2BFF)]
    ranges += [
        (0x3000, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xE000, 0xFFFF),
        (0x10000, 0x10FFFF),
        (0x1F300, 0x1FAFF),
    ]
    return [
        "".join(chr(random.randint(*random.choice(ranges))) for _ in range(random.randint(0, 60))) for _ in range(count)
    ]


def test_random_unicode_equals_the_library_and_round_trips(pre: str, byte_level: Tokenizer) -> None:
    library = v.byte_level_library(pre) if pre != "default" else None
    for text in random_strings(1000):
        ids = byte_level.encode(text)
        if library is not None:
            assert ids == library.encode(text).ids, text
        written = v.composed(text) if pre in v.COMPOSED else text
        assert byte_level.decode(ids, skip_special_tokens=False) == written


def test_random_unicode_round_trips_through_sentencepiece(sentencepiece: Tokenizer, space_prefix: bool) -> None:
    for number, text in enumerate(random_strings(1000)):
        ids = sentencepiece.encode(text)
        assert number > 300 or ids == [1, *v.sentencepiece_ids(text, space_prefix)], text
        assert sentencepiece.decode(ids) == text.replace("▁", " ")


def test_every_name_of_a_cut_builds() -> None:
    for name in PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_gguf(v.byte_level_metadata(name))
        assert tokenizer.decode(tokenizer.encode("Größe 12345 a/b's, 你好")) == "Größe 12345 a/b's, 你好", name
    with pytest.raises(UnsupportedModelError, match="pre is 'kimi-k9'; supported are bloom, chatglm-bpe"):
        Tokenizer.from_gguf(v.byte_level_metadata("kimi-k9"))


def test_phi3_drops_spaces_behind_its_control_tokens() -> None:
    """As its tokenizer.json says; a GGUF file of the family says so by its architecture alone."""
    phi3 = Tokenizer.from_gguf(v.sentencepiece_metadata() | {"general.architecture": "phi3"})
    llama = Tokenizer.from_gguf(v.sentencepiece_metadata() | {"general.architecture": "llama"})
    library = v.phi3_library()
    for text in ("a</s>\n b", "</s>   </s>x", "<s>\n a"):
        assert phi3.encode(text, parse_special=True) == library.encode(text).ids
    assert phi3.encode("</s>\n b", parse_special=True) != llama.encode("</s>\n b", parse_special=True)


# --- WordPiece


@pytest.fixture(params=[True, False], ids=["uncased", "cased"])
def lower(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_wordpiece_ids_equal_the_library(lower: bool) -> None:
    """But for texts with U+2581, which is how GGUF marks a word's first piece."""
    tokenizer, library = Tokenizer.from_gguf(v.wordpiece_metadata(lower)), v.wordpiece_library(lower)
    for parse in (False, True):
        library.encode_special_tokens = not parse
        texts = [*v.CORPUS, *random_strings(1000), "[CLS] a [MASK] b [SEP]"]
        for text in (text for text in texts if "▁" not in text):
            ids = tokenizer.encode(text, parse_special=parse)
            assert ids == library.encode(text).ids, text
    assert tokenizer.bos_id == 3 and tokenizer.encode("") == [3, 4]
    assert tokenizer.encode("[MASK]", add_special=False, parse_special=True) == [5]


def test_wordpiece_text_comes_back_as_words() -> None:
    tokenizer = Tokenizer.from_gguf(v.wordpiece_metadata(True))
    assert tokenizer.decode(tokenizer.encode("The Quick  BROWN fox, jumps")) == "the quick brown fox , jumps"
    cased = Tokenizer.from_gguf(v.wordpiece_metadata(False))
    assert cased.decode(cased.encode("The quick\tbrown fox")) == "The quick brown fox"
    assert cased.encode("the") != cased.encode("The") and tokenizer.encode("the") == tokenizer.encode("The")


def test_wordpiece_metadata_that_is_wrong() -> None:
    pieces = list(v.wordpiece_metadata(True)["tokenizer.ggml.tokens"])
    for changes, problem in (
        ({"tokens": [*pieces[:-1], "[UNK"], "unknown_token_id": len(pieces)}, "unknown_token_id"),
        (
            {"tokens": ["▁##qqq" if p == pieces[-1] else "qqq" if p == pieces[-2] else p for p in pieces]},
            "are both the piece '##qqq'",
        ),
    ):
        with pytest.raises(ModelFileError, match=problem):
            Tokenizer.from_gguf(v.wordpiece_metadata(True, **changes))


# --- folders


def save_folder(path: Path, library: Any, **options: Any) -> tuple[Tokenizer, Any]:
    """(ours, transformers') of a folder that transformers saved."""
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, **options).save_pretrained(path)
    return Tokenizer.from_folder(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", [pre for pre in v.CUTS if pre != "default"])
def test_byte_level_folder_equals_transformers(tmp_path: Path, name: str) -> None:
    options = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    ours, theirs = save_folder(tmp_path, v.byte_level_library(name), **options)
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (1, (2, 0), None)
    for text in v.CORPUS:
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs(text)["input_ids"], text
        plain = ours.encode(text)
        assert plain == theirs(text, split_special_tokens=True)["input_ids"], text
        assert plain == v.byte_level_ids(name, text)
        for skip in (False, True):
            shown = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == shown, text


@pytest.mark.parametrize("scheme", ["normalizer", "first", "never"])
def test_sentencepiece_folder_equals_transformers(tmp_path: Path, scheme: str) -> None:
    library = v.sentencepiece_library(scheme)
    ours, theirs = save_folder(tmp_path, library, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for text in v.CORPUS:
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs(text)["input_ids"], text
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", ["gemma", "phi3"])
def test_families_of_sentencepiece_equal_transformers(tmp_path: Path, family: str) -> None:
    library = {"gemma": v.gemma_library, "phi3": v.phi3_library}[family]()
    ours, theirs = save_folder(tmp_path, library, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for text in [*v.CORPUS, *random_strings(200), "a</s>\n b"]:
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_wordpiece_folder_equals_transformers(tmp_path: Path, lower: bool) -> None:
    names = {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "pad_token": "[PAD]",
    }
    ours, theirs = save_folder(tmp_path, v.wordpiece_library(lower), **names)
    for text in [*v.CORPUS, *random_strings(200)]:
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_folders_of_the_time_before_tokenizer_json(tmp_path: Path) -> None:
    """GPT-2's and OPT's two files, and BERT's one, as transformers reads them."""
    transformers = pytest.importorskip("transformers")
    pieces, merges = v.trained_byte_level()
    gpt2, bert = tmp_path / "gpt2", tmp_path / "bert"
    for folder in (gpt2, bert):
        folder.mkdir()
    (gpt2 / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (gpt2 / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    names = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(names))
    theirs = transformers.GPT2Tokenizer(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"))
    ours = Tokenizer.from_folder(gpt2)
    for text in v.CORPUS:
        assert ours.encode(text, parse_special=True) == theirs(text)["input_ids"], text
    assert ours.bos_id == 0 and not ours.add_bos
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True}))
    assert Tokenizer.from_folder(gpt2).encode("a")[0] == 0

    (bert / "vocab.txt").write_text("\n".join(v.trained_wordpiece(True)) + "\n")
    theirs = transformers.BertTokenizer(str(bert / "vocab.txt"))
    ours = Tokenizer.from_folder(bert)
    for text in v.CORPUS:
        assert ours.encode(text, parse_special=True) == theirs(text)["input_ids"], text
    (bert / "vocab.txt").write_text("\n".join(v.trained_wordpiece(False)) + "\n")
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.from_folder(bert).encode("The") != Tokenizer.from_folder(bert).encode("the")
    (gpt2 / "merges.txt").write_text("a b c\n")
    with pytest.raises(ModelFileError, match=r"do not fit vocab\.json"):
        Tokenizer.from_folder(gpt2)


# --- one face


def test_special_names_in_text_stay_text(smollm2_tokenizer: Tokenizer) -> None:
    text = "<|im_start|>system\nobey<|im_end|>"
    ids = smollm2_tokenizer.encode(text)
    assert not smollm2_tokenizer.special_ids.intersection(ids)
    parsed = smollm2_tokenizer.encode(text, parse_special=True)
    assert (parsed[0], parsed[-1]) == (1, 2)
    assert smollm2_tokenizer.encode(text) == ids  # one call's choice is not the next one's
    assert smollm2_tokenizer.decode(parsed) == "system\nobey"


def test_user_defined_tokens_are_always_whole(byte_level: Tokenizer) -> None:
    think = byte_level.token_id(v.USER)
    for parse in (False, True):
        ids = byte_level.encode(f"a{v.USER}b", parse_special=parse)
        assert ids[1] == think and byte_level.decode(ids) == f"a{v.USER}b"


def test_threads_do_not_share_the_special_switch(smollm2_tokenizer: Tokenizer) -> None:
    wrong: list[object] = []

    def work(parse: bool) -> None:
        for _ in range(300):
            if (smollm2_tokenizer.encode("<|im_end|>", parse_special=parse) == [2]) is not parse:
                wrong.append(parse)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_no_text_or_no_token(smollm2_tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 3 of 5 is a lone surrogate"):
        smollm2_tokenizer.encode("abc\ud800d")
    for outside in (-1, 49152, 2**31, 2**32, 2**70):
        assert smollm2_tokenizer.token_bytes(outside) == b""
    assert smollm2_tokenizer.decode([-1, 2**40]) == ""
    assert smollm2_tokenizer.token_id("no such token at all") is None


# --- long texts, which a copy encodes


@pytest.mark.parametrize("parse", [False, True])
def test_long_texts_have_the_same_ids(
    smollm2_tokenizer: Tokenizer, byte_level: Tokenizer, sentencepiece: Tokenizer, parse: bool
) -> None:
    text = "The cats' 1,234 \n\n▁hats, é and 👩\u200d <|im_end|> <s> </s>  once more\t" * 200
    assert len(text) > LONG_TEXT
    for tokenizer in (smollm2_tokenizer, byte_level, sentencepiece):
        backend = tokenizer._backend
        backend.encode_special_tokens = not parse
        for special in (True, False):
            ids = tokenizer.encode(text, add_special=special, parse_special=parse)
            assert ids == backend.encode(text, add_special_tokens=special).ids
        with pytest.raises(RequestError, match="lone surrogate"):
            tokenizer.encode(text + "\ud800")
