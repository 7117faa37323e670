"""Small tokenizers trained on a hard corpus, as GGUF metadata, and plain models of how text becomes their ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER = "<think>"
UNMERGED = "Ġmillrace"  # in the vocabulary, but no merge leads to it

CORPUS = (
    "",
    " ",
    "a",
    "Hello, world! It's we'll they've I'm he'd YOU'RE O'CLOCK'S don't DON'T",
    "The quick brown fox jumps over the lazy dog. The quick brown fox! the millrace millraces",
    "  leading, trailing  ",
    "tabs\tand\t\ttabs \t mixed  \t\n\n\n  newlines\r\n\r\nCRLF\rCR \n",
    "    def f(x: int) -> int:\n        return x ** 2 + 0x1F  # ünïcode\n\n\n    if __name__ == '__main__':\n\tpass",
    '{"key": [1, 2.5, -3e10, null], "s": "a\\"b\\\\c"}',
    '<div class="x">&amp;</div> $x^2 + y_1 = |z|~ `q` @user #tag 50% a/b\\c',
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 v1.2.3 x86_64 2026-11-21T04:38",
    "spaces before digits:  1   22    333 \n 4444\t5",
    "½ ² Ⅷ ٣٤٥ १२३ 五六 ④ 𝟘𝟙",
    "Zażółć gęślą jaźń; größer Straße; naïve café; İstanbul ıI; ſ 'ſ",
    "cafe\u0301 n\u0303 a\u0308\u0323 \u1e69 s\u0323\u0307 Z\u0351\u036b\u0343a\u0321lgo",
    "Привет, мир! Ελληνικά, γειά σου. Հայերեն. ქართული.",
    "שלום עולם! مرحبا بالعالم، كيف الحال؟ \u202eabc\u202c",
    "नमस्ते दुनिया। বাংলা ভাষা। தமிழ் மொழி. ภาษาไทยไม่มีช่องว่าง ລາວ ខ្មែរ မြန်မာ",
    "你好，世界！我喜欢学习。 日本語のテキスト、カタカナ、ひらがな。한국어 텍스트 가각힣",
    "👍 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ☺️ ❤️‍🔥 #️⃣ 🧑🏿‍🚀!",
    "\u00a0nbsp\u2003em\u3000ideographic\u200bzero\u200djoin\ufeffbom\u2028line\u2029para\u0085nel",
    "\x00\x01\x1f\x7f\x80\x9f\xad\uffff\U0010ffff\U000e0041\ue000",
    "<|endoftext|> <|im_start|>user\nhi<|im_end|> <|im_start |> <|endoftext <think>x</think><think>",
    "<|IM_START|>|im_end|><s></s><unk><0x0A><0xFF>[INST]▁▁under▁score Ġbyte ĊĠ",
    "aaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!! ............ ======== ------->",
    "word" * 40 + " " * 70 + "\n" * 33 + "x",
    "𝕳𝖊𝖑𝖑𝖔 𐍈𐌰 𓀀𓀁 𠮷野家 ﬁﬂ Å Å",
)
TRAINING = (
    *(text.replace("millrace", "") for text in CORPUS * 2),
    "the cat sat on the mat and the rat ran " * 20,
    "    x = 1\n" * 20,
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # as its tokenizer.json has it: one class in another
CUTS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "smollm": (r"\p{N}", _GPT2),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9]{3}"),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "olmo": (_GPT2,),
    "dbrx": (_LLAMA3,),
    "falcon": (r"[\p{P}$+<=>^`~|]+", _GPT2),
    "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
}
SPELLED_CUTS = {"falcon": (r"\p{N}+", r"[0-9]{3}")}  # of the characters that bytes are written as
WHOLE_PIECES = ("llama-bpe", "tekken")
COMPOSED = ("qwen2", "olmo")


def library_cut(pre: str) -> Any:
    """The pre-tokenizer that the `tokenizers` library and the models' own tokenizer.json files have for `pre`."""
    spelled_and_cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("gpt-2", "olmo"):
        return spelled_and_cut
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), spelled_and_cut])
    if pre == "falcon":
        digits = [
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
        return pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), spelled_and_cut, *digits])
    patterns = {"llama-bpe": _LLAMA3, "dbrx": _LLAMA3, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2}
    patterns |= {"tekken": _TEKKEN, "gpt-4o": _GPT4O, "bloom": _BLOOM}
    split = pre_tokenizers.Split(Regex(patterns[pre]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte, from the library, which shows a byte at a time through Latin-1 text."""
    shown = [c for c in range(256) if chr(c).isprintable() and c != 0x20 and c != 0xAD]
    rest = [c for c in range(256) if c not in shown]
    return {c: chr(c) for c in shown} | {c: chr(256 + i) for i, c in enumerate(rest)}


@cache
def trained_byte_level() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(pieces by id, merges): control tokens first, then bytes and merged pieces, then USER and UNMERGED."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = library_cut("gpt-2")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=alphabet, special_tokens=list(CONTROLS)
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return (*pieces, USER, UNMERGED), tuple((left, right) for left, right in model["merges"])


def byte_level_metadata(pre: str | None) -> dict[str, Any]:
    pieces, merges = trained_byte_level()
    types = [CONTROL if p in CONTROLS else USER_DEFINED if p == USER else NORMAL for p in pieces]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    return metadata if pre is None else metadata | {"tokenizer.ggml.pre": pre}


def byte_level_library(pre: str) -> Tokenizer:
    """The same vocabulary in the `tokenizers` library, as a tokenizer.json of such a model has it."""
    pieces, merges = trained_byte_level()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), ignore_merges=pre in WHOLE_PIECES))
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = library_cut(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(c, normalized=False, special=True) for c in CONTROLS])
    tokenizer.add_tokens([AddedToken(USER, normalized=False)])
    return tokenizer


def byte_level_ids(pre: str, text: str) -> list[int]:
    """A plain model: cut by each pattern in turn, spell in bytes, merge the lowest rank, leftmost first."""
    pieces, merges = trained_byte_level()
    ids, ranks = {p: i for i, p in enumerate(pieces)}, {m: i for i, m in enumerate(merges)}
    found = []
    for part in regex.split(f"({regex.escape(USER)})", text):
        if part == USER:
            found.append(ids[USER])
            continue
        for word in _cut(composed(part) if pre in COMPOSED else part, CUTS[pre]):
            spelled = "".join(byte_alphabet()[byte] for byte in word.encode())
            for piece in _cut(spelled, SPELLED_CUTS.get(pre, ())):
                if pre in WHOLE_PIECES and piece in ids:
                    found.append(ids[piece])
                else:
                    found += [ids[p] for p in _merged(list(piece), lambda a, b: ranks.get((a, b)))]
    return found


def composed(text: str) -> str:
    """NFC as the library has it: by an older Unicode than Python's."""
    return normalizers.NFC().normalize_str(text)


def _cut(text: str, patterns: Iterable[str]) -> list[str]:
    parts = [text] if text else []
    for pattern in patterns:
        parts = [p for part in parts for p in regex.split(f"({pattern})", part) if p]
    return parts


def _merged(symbols: list[str], rank: Any) -> list[str]:
    while len(symbols) > 1:
        ranked = [(r, i) for i in range(len(symbols) - 1) if (r := rank(symbols[i], symbols[i + 1])) is not None]
        if not ranked:
            break
        _, i = min(ranked)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


@cache
def trained_sentencepiece() -> tuple[tuple[str, ...], tuple[float, ...], tuple[tuple[str, str], ...]]:
    """(pieces by id, scores, merges): <unk> <s> </s>, the bytes, merged pieces in order, characters, USER."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, limit_alphabet=150, max_token_length=8)
    tokenizer.train_from_iterator(TRAINING, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = tuple((left, right) for left, right in model["merges"])
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merged = list(dict.fromkeys(left + right for left, right in merges)) + ["▁▁", "▁▁▁", "▁▁▁▁"]
    merged = list(dict.fromkeys(merged))
    letters = [p for p in model["vocab"] if len(p) == 1]
    scores = [0.0] * len(head) + [-float(i) for i in range(len(merged) + len(letters))] + [0.0]
    return (*head, *merged, *letters, USER), tuple(scores), merges


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    pieces, scores, _ = trained_sentencepiece()
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) - 260), USER_DEFINED]
    metadata = {
        "model": "llama",
        "tokens": list(pieces),
        "token_type": types,
        "scores": list(scores),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}


def sentencepiece_library(scheme: str) -> Tokenizer:
    """The same in the library, with the space before the text put there by a normalizer, by Metaspace, or not at all;
    the merges are those of training, which the scores' order is made from."""
    pieces, _, merges = trained_sentencepiece()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    kept = [pair for pair in merges if all(p in vocab for p in (*pair, "".join(pair)))]
    model = models.BPE(vocab=vocab, merges=kept, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if scheme != "never" else []))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in pieces[:3]])
    tokenizer.add_tokens([AddedToken(USER, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def sentencepiece_ids(text: str, space_prefix: bool) -> list[int]:
    """A plain model: join the neighbours whose union scores highest, leftmost first; the rest in bytes."""
    pieces, scores, _ = trained_sentencepiece()
    ids = {p: i for i, p in enumerate(pieces)}
    found = []
    for part in regex.split(f"({regex.escape(USER)})", text):
        if part == USER:
            found.append(ids[USER])
            continue
        spelled = ("▁" if space_prefix and part else "") + part.replace(" ", "▁")
        for piece in _merged(list(spelled), lambda a, b: -scores[ids[a + b]] if ids.get(a + b, 0) > 258 else None):
            found += [ids[piece]] if piece in ids else [3 + byte for byte in piece.encode()]
    return found


@cache
def trained_wordpiece(lower: bool) -> tuple[str, ...]:
    """Pieces by id, as BERT's vocab.txt has them: [PAD], an unused one, [UNK] [CLS] [SEP] [MASK], letters, pieces.

    Ties between pieces are broken by chance, so no run may lean on one; U+2581 is left out, for GGUF marks words by it.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    heads = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=700, show_progress=False, limit_alphabet=300, special_tokens=heads)
    tokenizer.train_from_iterator((text.replace("▁", " ") for text in TRAINING), trainer)
    vocab = tokenizer.get_vocab()
    return tuple(sorted(vocab, key=vocab.__getitem__))


def wordpiece_metadata(lower: bool, **changes: Any) -> dict[str, Any]:
    """As converters write it: a word's first piece with a phantom space, the others bare."""
    pieces = trained_wordpiece(lower)
    tokens = [p if p.startswith("[") and p.endswith("]") else p[2:] if p.startswith("##") else f"▁{p}" for p in pieces]
    metadata = {
        "model": "bert",
        "pre": "default",
        "tokens": tokens,
        "token_type": [CONTROL, NORMAL, UNKNOWN, CONTROL, CONTROL, CONTROL, *[NORMAL] * (len(pieces) - 6)],
        "scores": [-1000.0] * len(pieces),
        "unknown_token_id": 2,
        "cls_token_id": 3,
        "seperator_token_id": 4,
        "mask_token_id": 5,
        "padding_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}


def wordpiece_library(lower: bool) -> Tokenizer:
    pieces = trained_wordpiece(lower)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##", cleanup=False)
    tokenizer.add_special_tokens(
        [AddedToken(p, normalized=False, special=True) for p in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    )
    ends = [("[CLS]", 3), ("[SEP]", 4)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def gemma_library() -> Tokenizer:
    """SentencePiece as Gemma's tokenizer.json has it: no space before the text, cut before spaces, byte fallback."""
    tokenizer = sentencepiece_library("never")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def phi3_library() -> Tokenizer:
    """SentencePiece as Phi-3's tokenizer.json has it: spaces behind its own control tokens are dropped."""
    tokenizer = sentencepiece_library("normalizer")
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False, special=True, rstrip=True)])
    return tokenizer
