"""A tokenizer from a Hugging Face folder: tokenizer.json, and its neighbours' special tokens and templates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelFileError, UnsupportedModelError
from .parts import Spelling, TokenizerParts, set_ends
from .wordpiece import CONTINUED, wordpiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20
MAX_TEMPLATES = 16

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def read_folder(folder: Path) -> TokenizerParts:
    """Raises ModelFileError (missing or malformed file) or UnsupportedModelError (a decoder that is not known)."""
    config = _read_json(folder / "tokenizer_config.json")
    names = _read_json(folder / "special_tokens_map.json") | config
    generation = _read_json(folder / "generation_config.json")
    file = folder / "tokenizer.json"
    backend = _load_backend(file) if file.is_file() else _older_backend(folder, names)
    spelling, strips, byte_fallback = _decoding(backend, file)
    added = backend.get_added_tokens_decoder()
    bos = _token_id(backend, folder, names, "bos_token")
    eos = _token_id(backend, folder, names, "eos_token")
    if "add_bos_token" in config or "add_eos_token" in config:  # overrides the post-processor of tokenizer.json
        set_ends(backend, bos if config.get("add_bos_token") else None, eos if config.get("add_eos_token") else None)
    return TokenizerParts(
        backend=backend,
        spelling=spelling,
        strips_first_space=strips,
        special_ids=frozenset(i for i, token in added.items() if token.special),
        user_ids=frozenset(i for i, token in added.items() if not token.special),
        byte_ids=_byte_ids(backend) if byte_fallback else {},
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys((*_generation_ends(generation, backend, folder), *([] if eos is None else [eos])))),
        chat_template=(templates := _chat_templates(folder, config)).get("default"),
        tool_template=templates.get("tool_use"),
    )


def _read_bytes(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise ModelFileError(path, "size", f"{size} bytes; at most {limit} are read")
    return path.read_bytes()


def _read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_bytes(path, limit))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, "JSON", f"cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(path, "JSON", f"is {type(value).__name__}, not an object")
    return value


def _load_backend(path: Path) -> Backend:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_buffer(_read_bytes(path, MAX_TOKENIZER_BYTES))
    except Exception as error:  # the library's errors have no type of their own
        raise ModelFileError(path, "JSON", f"is not a tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _older_backend(folder: Path, names: Mapping[str, Any]) -> Backend:
    """A tokenizer from the files of the time before tokenizer.json: GPT-2's vocab.json and merges.txt, or BERT's
    vocab.txt. `names` are of special tokens, which those files do not mark."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words, merges, pieces = (folder / name for name in ("vocab.json", "merges.txt", "vocab.txt"))
    if words.is_file() and merges.is_file():
        lines = _read_bytes(merges, MAX_TOKENIZER_BYTES).decode("utf-8", "replace").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        vocab = _read_json(words, MAX_TOKENIZER_BYTES)
        try:
            backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))  # type: ignore[arg-type]
        except Exception as error:  # the library's errors have no type of their own
            raise ModelFileError(merges, "merges", f"do not fit {words.name}: {error}") from None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(names.get("add_prefix_space")))
        backend.decoder = decoders.ByteLevel()
    elif pieces.is_file():
        lines = _read_bytes(pieces, MAX_TOKENIZER_BYTES).decode("utf-8", "replace").rstrip("\n").split("\n")
        vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)}
        unknown = _text(names.get("unk_token"), "[UNK]")
        lower, accents = names.get("do_lower_case", True) is not False, names.get("strip_accents")
        backend = wordpiece(vocab, unknown, lower, None if accents is None else not accents)
        backend.decoder = decoders.WordPiece(CONTINUED)
        ends = {name: _text(names.get(f"{name}_token"), f"[{name.upper()}]") for name in ("cls", "sep")}
        set_ends(backend, vocab.get(ends["cls"]), vocab.get(ends["sep"]))
    else:
        raise ModelFileError(
            folder / "tokenizer.json",
            "file",
            "is missing; save the tokenizer again in the fast format, which writes tokenizer.json",
        )
    marked = (_text(value, "") for name, value in names.items() if name.endswith("_token"))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in marked if name in vocab])
    return backend


def _text(name: Any, default: str) -> str:
    """A special token's name, which may be an object with a content."""
    name = name.get("content") if isinstance(name, dict) else name
    return name if isinstance(name, str) else default


def _decoding(backend: Backend, path: Path) -> tuple[Spelling, bool, bool]:
    """How pieces spell text: (spelling, whether the first space goes, whether <0xHH> pieces are bytes)."""
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    steps: dict[str, dict[str, Any]] = {step["type"]: step for step in state.get("decoders", [state])}
    kinds = set(steps)
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return "byte-level", False, False
    if kinds == {"WordPiece"} and steps["WordPiece"].get("prefix") == CONTINUED:
        return "wordpiece", True, False
    if "Metaspace" in kinds and kinds <= {"Metaspace", "ByteFallback", "Fuse"}:
        return "sentencepiece", steps["Metaspace"].get("prepend_scheme") != "never", "ByteFallback" in kinds
    if "Replace" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replace, strip = steps["Replace"], steps.get("Strip")
        stripped = (strip["content"], strip["start"], strip["stop"]) if strip else None
        if (replace["pattern"], replace["content"], stripped in (None, (" ", 1, 0))) == ({"String": "▁"}, " ", True):
            return "sentencepiece", strip is not None, "ByteFallback" in kinds
    raise UnsupportedModelError(
        f"{path}: its decoder is {' + '.join(sorted(kinds))}; supported are ByteLevel, Metaspace, "
        "WordPiece, and Replace('▁', ' ') with ByteFallback, Fuse and Strip of one space"
    )


def _byte_ids(backend: Backend) -> dict[int, int]:
    ids = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {i: byte for i, byte in ids.items() if i is not None}


def _token_id(backend: Backend, folder: Path, names: Mapping[str, Any], key: str) -> int | None:
    name = names.get(key)
    if isinstance(name, dict):
        name = name.get("content")
    if name is None:
        return None
    token = backend.token_to_id(name) if isinstance(name, str) else None
    if token is None:
        raise ModelFileError(folder / "tokenizer_config.json", key, f"{name!r:.80} is not among the tokens")
    return token


def _generation_ends(generation: Mapping[str, Any], backend: Backend, folder: Path) -> Iterable[int]:
    value, size = generation.get("eos_token_id"), backend.get_vocab_size()
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < size:
            problem = f"is {token!r:.80}; the vocabulary has ids 0 to {size - 1}"
            raise ModelFileError(folder / "generation_config.json", "eos_token_id", problem)
    return ids


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: "default", and others such as "tool_use". Files go before the tokenizer's config, where there
    is one template, or a list of named ones."""
    given = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    elif not isinstance(given, dict):
        given = {"default": given}
    templates = {str(name): template for name, template in given.items() if isinstance(template, str)}
    files = {"default": folder / "chat_template.jinja"}
    files |= {
        file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))[:MAX_TEMPLATES]
    }
    for name, file in files.items():
        if file.is_file():
            templates[name] = _read_bytes(file, MAX_CONFIG_BYTES).decode("utf-8", "replace")
    return templates
