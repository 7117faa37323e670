"""A tokenizer from GGUF metadata: byte-level BPE (`gpt2`), SentencePiece's BPE with byte fallback (`llama`), and
WordPiece (`bert`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby, repeat
from typing import TYPE_CHECKING, Any

from ..errors import ModelFileError, UnsupportedModelError
from .parts import Spelling, TokenizerParts, set_ends
from .pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from .wordpiece import CONTINUED, wordpiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
MAX_VOCAB = 4_000_000
MAX_PIECE_CHARS = 4096

_SPELLINGS: Mapping[Any, Spelling] = {"gpt2": "byte-level", "llama": "sentencepiece", "bert": "wordpiece"}


def read_gguf(metadata: Mapping[str, Any], path: object) -> TokenizerParts:
    """Build the tokenizer that `tokenizer.*` describes. Raises ModelFileError (malformed) or UnsupportedModelError."""
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in _SPELLINGS:
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.model is {kind!r:.80}; supported are {', '.join(map(repr, _SPELLINGS))}"
        )
    vocab = _Vocabulary(metadata, path)
    bos, *ends = (vocab.special_id(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
    last, strips, adds_last = ends[0], False, vocab.flag("add_eos_token", default=False)
    if kind == "gpt2":
        pre = _pre_tokenizer(metadata, path)
        backend, adds_bos = _byte_level(vocab, pre), pre.add_bos
    elif kind == "llama":
        strips = vocab.flag("add_space_prefix", default=True)
        backend, adds_bos = _sentencepiece(vocab, strips), True
    else:  # [CLS] text [SEP]; the separator is spelled so in the format
        backend, adds_bos, strips = _wordpiece(vocab), True, True
        bos = next((i for i in (vocab.special_id("cls_token_id"), bos, vocab.ids.get("[CLS]")) if i is not None), None)
        last = vocab.special_id("seperator_token_id")
        last = vocab.ids.get("[SEP]") if last is None else last
        adds_last = vocab.flag("add_sep_token", default=True)
    _add_tokens(vocab, backend, _takes_spaces(vocab) if kind == "llama" else frozenset())
    set_ends(backend, bos if vocab.flag("add_bos_token", default=adds_bos) else None, last if adds_last else None)
    return TokenizerParts(
        backend=backend,
        spelling=_SPELLINGS[kind],
        strips_first_space=strips,
        special_ids=frozenset((*vocab.of_type(CONTROL), *vocab.of_type(UNKNOWN))),
        user_ids=frozenset(vocab.of_type(USER_DEFINED)),
        byte_ids=_byte_ids(vocab),
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        chat_template=_template(metadata, ""),
        tool_template=_template(metadata, ".tool_use"),
    )


def _template(metadata: Mapping[str, Any], ending: str) -> str | None:
    value = metadata.get(f"tokenizer.chat_template{ending}")
    return value if isinstance(value, str) else None


class _Vocabulary:
    """The checked arrays of `tokenizer.ggml`: `pieces[id]`, `types[id]`, `scores[id]`, and `ids[piece]`."""

    def __init__(self, metadata: Mapping[str, Any], path: object) -> None:
        self.metadata, self.path = metadata, path
        self.pieces: list[str] = self.array("tokens", str) or []
        if not self.pieces or len(self.pieces) > MAX_VOCAB:
            raise self.error("tokens", f"holds {len(self.pieces)} tokens; 1 to {MAX_VOCAB} are supported")
        longest = max(map(len, self.pieces))
        self.ids: dict[str, int] = {piece: i for i, piece in enumerate(self.pieces)}
        if longest > MAX_PIECE_CHARS:
            raise self.error("tokens", f"has a token of {longest} characters; at most {MAX_PIECE_CHARS} are supported")
        if len(self.ids) != len(self.pieces):
            again = next(i for i, piece in enumerate(self.pieces) if self.ids[piece] != i)
            first, last = again, self.ids[self.pieces[again]]
            raise self.error("tokens", f"token {first} and token {last} are both {self.pieces[again]!r:.80}")
        self.types: list[int] = self.array("token_type", int) or []
        self.scores: list[float] = self.array("scores", float) or []
        for name, values in (("token_type", self.types), ("scores", self.scores)):
            if values and len(values) != len(self.pieces):
                raise self.error(name, f"has {len(values)} entries for {len(self.pieces)} tokens")
        self._marked: defaultdict[int, list[int]] = defaultdict(list)  # ids by type, of those that are not NORMAL
        for i, kind in enumerate(self.types):
            if kind != NORMAL:
                self._marked[kind].append(i)

    def error(self, field: str, problem: str) -> ModelFileError:
        return ModelFileError(self.path, f"tokenizer.ggml.{field}", problem)

    def array(self, name: str, kind: type) -> list[Any] | None:
        """The values, each of type `kind`; None where there is no such field."""
        values = self.metadata.get(f"tokenizer.ggml.{name}")
        if hasattr(values, "tolist"):
            values = values.tolist()  # type: ignore[union-attr]
        if values is not None and (not isinstance(values, Sequence) or isinstance(values, (str, bytes))):
            raise self.error(name, f"is {type(values).__name__}, not an array")
        if values is not None and not set(map(type, values)) <= {kind}:
            raise self.error(name, f"is not an array of {kind.__name__} only")
        return values if values is None or isinstance(values, list) else list(values)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, (bool, int)):
            raise self.error(name, f"is {value!r:.80}, not a boolean")
        return bool(value)

    def special_id(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not (type(value) is int and 0 <= value < len(self.pieces)):
            raise self.error(name, f"is {value!r:.80}; the vocabulary has ids 0 to {len(self.pieces) - 1}")
        return value

    def of_type(self, kind: int) -> list[int]:
        return self._marked[kind]


def _takes_spaces(vocab: _Vocabulary) -> frozenset[str]:
    """Control tokens behind which spaces are dropped. Phi-3's tokenizer.json says so; GGUF has no field for it."""
    if vocab.metadata.get("general.architecture") != "phi3":
        return frozenset()
    return frozenset(vocab.pieces[i] for i in vocab.of_type(CONTROL)) - {"<unk>", "<s>", "<|endoftext|>"}


def _pre_tokenizer(metadata: Mapping[str, Any], path: object) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.pre is {name!r:.80}; supported are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocab: _Vocabulary, pre: PreTokenizer) -> Backend:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    merges = _listed_merges(vocab)
    try:
        model = models.BPE(vocab=vocab.ids, merges=merges, ignore_merges=pre.whole_pieces)
    except Exception:  # the library's own error has no type and names no merge
        raise _bad_merge(vocab, merges) from None
    backend = Tokenizer(model)
    before, after = (
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        for patterns in (pre.splits, pre.spelled_splits)
    )
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, spell, *after])
    if pre.composed:
        backend.normalizer = normalizers.NFC()
    return backend


def _listed_merges(vocab: _Vocabulary) -> list[tuple[str, str]]:
    lines = vocab.array("merges", str) or []
    spaces = list(map(str.count, lines, repeat(" ")))
    if spaces.count(1) != len(lines):
        bad = next(i for i, count in enumerate(spaces) if count != 1)
        raise vocab.error("merges", f"merge {bad} is {lines[bad]!r:.80}: not two tokens with one space between")
    flat = " ".join(lines).split(" ") if lines else []  # one split for all: a third of the time that one for each takes
    return list(zip(flat[::2], flat[1::2], strict=True))


def _bad_merge(vocab: _Vocabulary, merges: Sequence[tuple[str, str]]) -> ModelFileError:
    for i, (left, right) in enumerate(merges):
        for piece in (left, right, left + right):
            if piece not in vocab.ids:
                return vocab.error("merges", f"merge {i} names {piece!r:.80}, which is not among the tokens")
    return vocab.error("merges", "cannot be used with these tokens")


def _sentencepiece(vocab: _Vocabulary, space_prefix: bool) -> Backend:
    """SentencePiece BPE joins the neighbours whose union has the highest score; as merges ranked by score do."""
    from tokenizers import Tokenizer, models, normalizers

    if not (vocab.scores and vocab.types):
        missing = "scores" if not vocab.scores else "token_type"
        raise vocab.error(missing, "is missing; a 'llama' tokenizer needs it: convert the model again")
    unknown = vocab.special_id("unknown_token_id")
    if unknown is None:
        unknown = next(iter(vocab.of_type(UNKNOWN)), None)
    if unknown is None and len(_byte_ids(vocab)) < 256:
        raise vocab.error("tokens", f"has {len(_byte_ids(vocab))} of 256 byte tokens and no unknown token to stand in")
    model = models.BPE(
        vocab=vocab.ids,
        merges=_ranked_merges(vocab),
        unk_token=None if unknown is None else vocab.pieces[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_prefix else spaces
    return backend


def _ranked_merges(vocab: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make an ordinary piece of two others, highest score first, longest left part first.

    Control, unknown, unused and byte tokens take no part: text never turns into them.
    """
    ordinary = {p for p, kind in zip(vocab.pieces, vocab.types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    scores, pieces = vocab.scores, vocab.pieces
    if any(score != score for score in scores):
        raise vocab.error("scores", "holds a value that is not a number")
    made = [i for i, piece in enumerate(pieces) if len(piece) > 1 and piece in ordinary]
    made.sort(key=scores.__getitem__, reverse=True)
    merges: list[tuple[str, str]] = []
    for _, alike in groupby(made, scores.__getitem__):
        found = []
        for i in alike:
            piece = pieces[i]
            for cut in range(len(piece) - 1, 0, -1):
                if piece[:cut] in ordinary and (right := piece[cut:]) in ordinary:
                    found.append((-cut, cut - len(piece), i, piece[:cut], right))
        if len(found) > 1:
            found.sort()
        merges += [pair[3:] for pair in found]
    return merges


def _wordpiece(vocab: _Vocabulary) -> Backend:
    """GGUF marks the first piece of a word with ▁ and leaves the others bare; WordPiece marks the others with ##."""
    bare = {*vocab.of_type(CONTROL), *vocab.of_type(UNKNOWN), *vocab.of_type(USER_DEFINED)}
    bare |= {i for i, piece in enumerate(vocab.pieces) if piece.startswith("[") and piece.endswith("]")}
    pieces: dict[str, int] = {}
    for i, piece in enumerate(vocab.pieces):
        name = piece if i in bare else piece[1:] if piece.startswith("▁") else f"{CONTINUED}{piece}"
        if pieces.setdefault(name, i) != i:
            raise vocab.error("tokens", f"token {pieces[name]} and token {i} are both the piece {name!r:.80}")
    unknown = vocab.special_id("unknown_token_id")
    unknown = "[UNK]" if unknown is None else vocab.pieces[unknown]
    if unknown not in pieces:
        raise vocab.error("tokens", f"has no unknown token {unknown!r:.80}")
    # The file does not say whether text is to be in lower case; a vocabulary without a capital letter does.
    lower = not any(piece != piece.lower() for i, piece in enumerate(vocab.pieces) if i not in bare)
    return wordpiece(pieces, unknown, lower)


def _byte_ids(vocab: _Vocabulary) -> dict[int, int]:
    """Token id to byte of the tokens of type BYTE, spelled <0x00> to <0xFF>."""
    spelled = {f"<0x{byte:02X}>": byte for byte in range(256)}
    return {i: spelled[vocab.pieces[i]] for i in vocab.of_type(BYTE) if vocab.pieces[i] in spelled}


def _add_tokens(vocab: _Vocabulary, backend: Backend, take_spaces: frozenset[str]) -> None:
    """Control tokens are found in text only when asked for; user-defined ones always. Both are found whole, some with
    the spaces behind them."""
    from tokenizers import AddedToken

    def added(kind: int, special: bool) -> list[AddedToken]:
        pieces = [vocab.pieces[i] for i in vocab.of_type(kind)]
        return [AddedToken(p, normalized=False, special=special, rstrip=p in take_spaces) for p in pieces]

    backend.add_special_tokens(added(UNKNOWN, True) + added(CONTROL, True))
    backend.add_tokens(added(USER_DEFINED, False))
