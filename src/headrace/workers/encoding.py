"""An encoder's loop in its process: what has come from several requests shares steps."""

from __future__ import annotations

from typing import Protocol

from .embedder import Embedder
from .wire import Embed, Embedded, EncoderReady, FromEngine, ToEngine

TOKENS_TOGETHER = 8192  # of several messages, enough to fill steps; then the first messages are answered


class Door(Protocol):
    """The process' end of its socket."""

    closed: bool

    def send(self, message: FromEngine) -> None: ...

    def take(self, *, wait: bool) -> list[ToEngine]: ...


def serve_encoder(door: Door, embedder: Embedder) -> None:
    """Run until the other side closes the door. A text gives the same bytes whatever shares its steps."""
    door.send(EncoderReady())
    waiting: list[Embed] = []
    while not door.closed:
        waiting += [message for message in door.take(wait=not waiting) if isinstance(message, Embed)]
        _answer(door, embedder, waiting)


def _answer(door: Door, embedder: Embedder, waiting: list[Embed]) -> None:
    """Answer the first messages, and take them off the list."""
    texts: list[list[int]] = []
    numbers: list[tuple[int, int]] = []  # of each message: its number, where its texts end
    while waiting and sum(map(len, texts)) < TOKENS_TOGETHER:
        message = waiting.pop(0)
        texts += message.texts
        numbers.append((message.number, len(texts)))
    vectors = embedder.embed(texts)
    first = 0
    for number, last in numbers:
        door.send(Embedded(number, vectors[first:last]))
        first = last
