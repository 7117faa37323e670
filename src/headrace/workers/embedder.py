"""Whole texts through an encoder: many in a step, each a chunk of its own, without padding."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..kernels.native import SAMPLE, Limits, NativeOps, NativeProgram
from ..kernels.ops import Array, Batch
from ..kernels.reference import ReferenceOps
from ..model.encoder import Encoder
from ..model.encoder_spec import Pooling

STEPS_AHEAD = 2  # queued while another's hidden states are pooled
HEAD_ROWS = 64  # whose logits are computed at once: each has a float32 for every token of the vocabulary
Tokens = Sequence[int]


class Embedder:
    """Runs an encoder over texts given as token ids, at most `rows` tokens a step (a longer text is a step by itself).

    A text's result is the same to the bit whatever else is in its step. Texts must have at least one token, at most the
    spec's `context_length`, and ids of the vocabulary.
    """

    def __init__(self, encoder: Encoder, ops: NativeOps | ReferenceOps, rows: int, texts: int) -> None:
        self.encoder, self.ops = encoder, ops
        self._rows, self._texts = max(rows, encoder.spec.context_length), texts
        self._forward = self._runner(encoder.forward, Limits(self._rows, 1, texts, 1, ()))
        self._head: _Run | None = None

    def embed(self, texts: Sequence[Tokens], normalize: bool = True) -> np.ndarray:
        """float32 [texts, dim]: each text's pooled hidden states, of length 1 if `normalize`."""
        out = np.empty((len(texts), self.encoder.spec.dim), np.float32)
        for row, hidden in zip(out, self.hidden(texts), strict=True):
            row[:] = pool(hidden, self.encoder.spec.pooling)
        if normalize:
            out /= np.maximum(np.sqrt(np.square(out).sum(axis=1, keepdims=True)), np.float32(1e-12))
        return out

    def hidden(self, texts: Sequence[Tokens]) -> Iterator[np.ndarray]:
        """Each text's hidden states in order, float32 [tokens, dim]."""
        steps = pack_texts([len(text) for text in texts], self._rows, self._texts)
        queued: deque[tuple[np.ndarray, Callable[[], np.ndarray]]] = deque()
        for step in (*steps, *[range(0)] * STEPS_AHEAD):
            if step:
                cuts = np.cumsum([0, *(len(texts[index]) for index in step)], dtype=np.int32)
                tokens = np.concatenate([np.asarray(texts[index], np.int32) for index in step])
                positions = np.concatenate([np.arange(end - first, dtype=np.int32) for first, end in pairwise(cuts)])
                queued.append((cuts, self._forward(_batch(tokens, positions, cuts))))
            if queued and (not step or len(queued) > STEPS_AHEAD):
                cuts, result = queued.popleft()
                states = result()
                yield from (states[first:end] for first, end in pairwise(cuts))

    def logits(self, texts: Sequence[Tokens]) -> list[np.ndarray]:
        """The head's logits of each text: float32 [tokens, vocabulary] where it is for masked tokens, else [1, labels].

        The model must have a head.
        """
        head = self.encoder.spec.head
        assert head is not None
        return [self._logits(hidden[:1] if head.task == "classify" else hidden) for hidden in self.hidden(texts)]

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        if self._head is None:
            limits, width = Limits(HEAD_ROWS, 1, 1, 1, ()), self.encoder.spec.dim
            self._head = self._runner(lambda ops, batch: self.encoder.head(ops, batch.hidden), limits, width)
        parts = []
        for first in range(0, len(hidden), HEAD_ROWS):
            part = hidden[first : first + HEAD_ROWS]
            rows = np.arange(len(part), dtype=np.int32)
            batch = _batch(np.empty(0, np.int32), rows, np.array([0, len(part)], np.int32))
            batch.hidden = np.ascontiguousarray(part)
            parts.append(self._head(batch)())
        return np.concatenate(parts)

    def _runner(self, model: Callable[[Any, Batch], Array], limits: Limits, hidden: int | None = None) -> _Run:
        """Queues a batch; what it gives waits for the result."""
        if isinstance(self.ops, ReferenceOps):
            return lambda batch: lambda: np.asarray(model(self.ops, batch))
        program = self.ops.capture(lambda batch: model(self.ops, batch), limits, hidden)
        return lambda batch: _submit(program, batch)


_Run = Callable[[Batch], Callable[[], np.ndarray]]


def _batch(tokens: np.ndarray, positions: np.ndarray, cuts: np.ndarray) -> Batch:
    return Batch(tokens, positions, cuts, logit_rows=np.empty(0, np.int32), groups=())


def _submit(program: NativeProgram, batch: Batch) -> Callable[[], np.ndarray]:
    arrays = (batch.tokens, batch.positions, batch.chunk_rows, batch.logit_rows)
    ticket = program.submit(*arrays, (), np.empty(0, SAMPLE), batch.hidden)
    return lambda: ticket.result()[1]


def pack_texts(lengths: Sequence[int], rows: int, texts: int) -> list[range]:
    """Consecutive texts by step: as many as have at most `rows` tokens together, and at most `texts`."""
    steps, first, taken = [], 0, 0
    for index, length in enumerate(lengths):
        if index > first and (taken + length > rows or index - first == texts):
            steps.append(range(first, index))
            first, taken = index, 0
        taken += length
    return [*steps, range(first, len(lengths))] if lengths else []


def pool(hidden: np.ndarray, pooling: Pooling) -> np.ndarray:
    """One vector [dim] of a text's hidden states [tokens, dim]; sums go from the first token to the last."""
    if pooling == "cls":
        return hidden[0]
    if pooling == "max":
        return hidden.max(axis=0)
    return np.add.reduce(hidden, axis=0) / np.float32(len(hidden))
