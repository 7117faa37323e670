"""A model held by several ranks, each with an op set and weights of its own, all in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from headrace.formats.gguf import GGUFFile
from headrace.formats.safetensors import Checkpoint
from headrace.kernels.native import SAMPLE, Limits, NativeOps, Ticket, logits_spec
from headrace.kernels.ops import Batch, Group
from headrace.kernels.reference import ReferenceOps
from headrace.model.decoder import Decoder
from headrace.model.families import read_spec
from headrace.model.shares import Share, split
from headrace.model.weights import column_blocks, load_weights
from headrace.parallel.group import GroupSizes, SharedGroup

from .harness import PAGE_SIZE, PAGES, Model, Part, make_batch

ROWS, SEQUENCES = 128, 16
MakeOps = Callable[[Group | None], NativeOps | ReferenceOps]


def sizes_of(spec: Any, shares: Sequence[Share], rows: int = ROWS) -> GroupSizes:
    return GroupSizes(len(shares), rows, spec.dim, rows, max(len(share.vocab) for share in shares))


def shared_groups(sizes: GroupSizes) -> list[SharedGroup]:
    """Every rank's end of a new group."""
    file = SharedGroup.create(sizes)
    try:
        return [SharedGroup(file, rank) for rank in range(sizes.ranks)]
    finally:
        os.close(file)


class Ranks(Model):
    """The interface of Model over `ranks` ranks. Every step checks that all have the same bytes."""

    def __init__(
        self,
        source: GGUFFile | Checkpoint,
        ranks: int,
        make_ops: MakeOps,
        *,
        layers: range | None = None,
        context: int | None = None,
        kv_dtype: str = "float32",
        make_groups: Callable[[GroupSizes], Sequence[Group]] = shared_groups,
    ) -> None:
        self.spec = read_spec(source)
        layers = layers or range(self.spec.layers)
        self.shares = split(self.spec, ranks, column_blocks(source, self.spec))
        self.groups = make_groups(sizes_of(self.spec, self.shares)) if ranks > 1 else [None]
        self.all_ops, self.decoders, self.all_caches, self.programs = [], [], [], []
        for share, group in zip(self.shares, self.groups, strict=True):
            own = share if ranks > 1 else None
            ops, local = make_ops(group), share.local(self.spec)
            decoder = Decoder(self.spec, load_weights(source, self.spec, ops, layers, own), layers, context, own)
            caches = [
                ops.kv_cache(len(kv.layers), PAGES, PAGE_SIZE, local.kv_heads, local.head_dim, kv_dtype)
                for kv in decoder.kv_groups
            ]
            self.all_ops.append(ops), self.decoders.append(decoder), self.all_caches.append(caches)
            if isinstance(ops, NativeOps):
                self.programs.append(self._capture(ops, decoder, caches, layers))
        self._threads = ThreadPoolExecutor(ranks)

    def _capture(self, ops: NativeOps, decoder: Decoder, caches: list, layers: range):
        pages = (PAGES - 1,) * len(caches)
        limits = Limits(rows=ROWS, logits=ROWS, chunks=SEQUENCES, sequences=SEQUENCES, pages=pages)
        hidden = None if layers.start == 0 else self.spec.dim
        return ops.capture(lambda batch: decoder.forward(ops, batch, caches), limits, hidden)

    def submit(self, batch: Batch, samples: np.ndarray) -> list[Ticket]:
        """Queue a step on every rank's program."""
        arrays = (batch.tokens, batch.positions, batch.chunk_rows, batch.logit_rows, batch.groups, samples)
        return [program.submit(*arrays, batch.hidden) for program in self.programs]

    def all_run(self, batch: Batch) -> list[np.ndarray]:
        """Every rank's logits, or hidden states, of all rows of a batch."""
        if self.programs:
            samples = np.array([logits_spec()] * len(batch.logit_rows), SAMPLE)
            return [ticket.result()[1].copy() for ticket in self.submit(batch, samples)]
        parts = zip(self.decoders, self.all_ops, self.all_caches, strict=True)
        jobs = [self._threads.submit(decoder.forward, ops, batch, caches) for decoder, ops, caches in parts]
        return [job.result() for job in jobs]

    def run(self, *parts: Part, hidden: np.ndarray | None = None) -> np.ndarray:
        batch = make_batch(parts, len(self.all_caches[0]))
        batch.hidden = hidden
        if hidden is not None:
            batch.tokens = np.zeros(0, np.int32)
        first, *others = self.all_run(batch)
        assert all(other.tobytes() == first.tobytes() for other in others)
        return first

    def generate(self, prompt: list[int], count: int, sample: tuple, slot: int = 3) -> list[int]:
        """Tokens after a prompt, each from the one before, which is late-bound: all steps are queued at once."""
        samples = np.array([sample], SAMPLE)
        samples["slot"] = slot
        steps = [Part(prompt), *(Part([-1 - slot], len(prompt) + i) for i in range(count - 1))]
        tickets = []
        for part in steps:
            batch = make_batch([part], len(self.all_caches[0]))
            batch.logit_rows = batch.logit_rows[-1:]
            tickets.append(self.submit(batch, samples))
        chosen = [[int(ticket.result()[0][0]) for ticket in step] for step in tickets]
        assert all(len(set(tokens)) == 1 for tokens in chosen)
        return [tokens[0] for tokens in chosen]


@contextmanager
def aborting(groups: Sequence[Any]) -> Iterator[None]:
    """Nothing that a test leaves waiting waits for ever."""
    try:
        yield
    finally:
        for group in groups:
            group.abort()
