"""Text to token ids and back. The merging itself is done by the `tokenizers` library; this is the one face it has here,
whether the vocabulary came from a GGUF file or from a Hugging Face folder."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .folder import read_folder
from .gguf import read_gguf
from .parts import TokenizerParts
from .wordpiece import CONTINUED

LONG_TEXT = 8192  # characters

# Tokens that end a turn or a text in the chat formats in use. A file names one or two of them at most, so a special
# token spelled like this ends generation even where the file does not say so.
END_TEXTS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<turn|>",
    "<EOT>",
)


class Tokenizer:
    """A model's vocabulary: `encode`, `decode`, and the bytes that each token contributes.

    Thread-safe. `vocab_size` counts added tokens too; a model's embedding may have more rows than that.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self._lock = threading.Lock()  # guards the backend's special-token switch during an encode
        self._beside: Any = None  # a copy for long texts
        self._beside_lock = threading.Lock()
        self._special_ids = parts.special_ids
        self.vocab_size: int = parts.backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = parts.bos_id
        self.chat_template, self.tool_template = parts.chat_template, parts.tool_template
        self.strips_first_space = parts.strips_first_space
        endings = (self.token_id(text) for text in END_TEXTS)
        self.eos_ids: tuple[int, ...] = tuple(
            dict.fromkeys([*parts.eos_ids, *(i for i in endings if i is not None and i in parts.special_ids)])
        )
        self.add_bos: bool = parts.bos_id is not None and self._backend.encode("").ids[:1] == [parts.bos_id]
        self.all_bytes = TokenBytes(parts, skip_special=False)
        self.plain_bytes = TokenBytes(parts, skip_special=True)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From a Hugging Face folder with a tokenizer.json. Raises ModelFileError or UnsupportedModelError."""
        return cls(read_folder(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: object = "GGUF metadata") -> Tokenizer:
        """From a GGUF file's metadata; `path` is named in errors. Raises ModelFileError or UnsupportedModelError."""
        return cls(read_gguf(metadata, path))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; with `add_special` between the begin and end tokens that the model asks for.

        A special token's name inside `text` is ordinary text unless `parse_special`. Raises RequestError where `text`
        is not valid Unicode (a lone surrogate). While a text above LONG_TEXT is encoded, other threads run on.
        """
        try:
            if len(text) > LONG_TEXT:
                return self._encode_beside(text, add_special, parse_special)
            with self._lock:
                if self._backend.encode_special_tokens is parse_special:
                    self._backend.encode_special_tokens = not parse_special
                return self._backend.encode(text, add_special_tokens=add_special).ids
        except (UnicodeEncodeError, TypeError):  # the tokenizers library has raised either
            where = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            if where is None:
                raise
            raise RequestError(
                f"the text is not valid Unicode: character {where} of {len(text)} is a lone surrogate; "
                "decode its source as UTF-8 with errors='replace'"
            ) from None

    def _encode_beside(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """`encode` without the interpreter's lock, and by a copy, so that nobody waits for the backend."""
        with self._beside_lock:
            if self._beside is None:
                self._beside = type(self._backend).from_str(self._backend.to_str())
            self._beside.encode_special_tokens = not parse_special
            return self._beside.encode_batch_fast([text], add_special_tokens=add_special)[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary contribute nothing."""
        table = self.plain_bytes if skip_special_tokens else self.all_bytes
        text = b"".join([table[i] for i in ids]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_first_space else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token contributes to a text (a special token: its name; outside the vocabulary: nothing)."""
        return self.all_bytes[token]

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled `text` in the vocabulary, or None."""
        return self._backend.token_to_id(text)


class TokenBytes(dict[int, bytes]):
    """Token id to bytes, filled as ids are met, so that loading costs nothing. Bounded by the vocabulary."""

    def __init__(self, parts: TokenizerParts, *, skip_special: bool) -> None:
        super().__init__()
        self._spell = parts.backend.id_to_token
        self._byte_level = byte_alphabet() if parts.spelling == "byte-level" else None
        self._words = parts.spelling == "wordpiece"
        self._byte_ids = parts.byte_ids
        self._literal = parts.special_ids | parts.user_ids
        self._skipped = parts.special_ids if skip_special else frozenset()

    def __missing__(self, token: int) -> bytes:
        piece = self._spell(token) if 0 <= token < 2**32 else None
        if piece is None:
            return b""
        value = self[token] = b"" if token in self._skipped else self._bytes_of(token, piece)
        return value

    def _bytes_of(self, token: int, piece: str) -> bytes:
        if token in self._byte_ids:
            return bytes((self._byte_ids[token],))
        if token in self._literal:
            return piece.encode()
        if self._words:
            return (piece[len(CONTINUED) :] if piece.startswith(CONTINUED) else f" {piece}").encode()
        if self._byte_level is None:
            return piece.replace("▁", " ").encode()
        try:
            return bytes([self._byte_level[character] for character in piece])
        except KeyError:  # a piece that is not written in the byte alphabet stands for itself
            return piece.encode()


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2), turned around: bytes that print as
    themselves in Latin-1 keep their character, the 68 others take the characters from U+0100 up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
