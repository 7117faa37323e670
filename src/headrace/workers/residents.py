"""What a worker knows of the sequences that live on it, and a Step's chunks as the arrays that kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.ops import Batch, KVGroupBatch
from ..types import LATE, Chunk, Request, Step


class Resident:
    """One sequence on this worker: its tokens as far as they are known here, and its row in the page tables."""

    __slots__ = ("pages", "request", "sampling", "slot", "tokens")

    def __init__(self, request: Request, tokens: list[int], slot: int, pools: int) -> None:
        self.request, self.tokens, self.slot = request, tokens, slot
        self.pages = [0] * pools  # pages in each pool's table
        self.sampling: bytes | None = None  # what the runner keeps to sample for it

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)


@dataclass(frozen=True)
class Rows:
    """A step as arrays. A LATE token stands in `tokens` as -1 - slot: what its sequence's slot sampled last."""

    chunks: tuple[Chunk, ...]
    residents: list[Resident]  # one per chunk
    tokens: np.ndarray  # int32 [rows]
    positions: np.ndarray  # int32 [rows]
    chunk_rows: np.ndarray  # int32 [chunks + 1]
    logit_rows: np.ndarray  # int32 [n]
    groups: tuple[KVGroupBatch, ...]

    def bind(self, index: int) -> None:
        """Put the LATE token of chunk `index` in its place: it is known now."""
        row = int(self.chunk_rows[index + 1]) - 1
        self.tokens[row] = self.residents[index].tokens[self.positions[row]]

    def batch(self) -> Batch:
        return Batch(self.tokens, self.positions, self.chunk_rows, self.logit_rows, self.groups)


class Residents:
    """All sequences on a worker. At most `max_sequences` at once, of at most `max_context` tokens, in `pools` pools."""

    def __init__(self, max_sequences: int, max_context: int, page_size: int, pools: int) -> None:
        self._page_size = page_size
        self._by_handle: dict[int, Resident] = {}
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._tables = [np.zeros((max_sequences, -(-max_context // page_size)), np.int32) for _ in range(pools)]

    def __getitem__(self, handle: int) -> Resident:
        return self._by_handle[handle]

    def update(self, step: Step) -> None:
        """Take in who left, who came, and the pages that the chunks bring."""
        for handle in step.finished:
            self._free_slots.append(self._by_handle.pop(handle).slot)
        for opened in step.opened:
            slot = self._free_slots.pop()
            self._by_handle[opened.seq] = Resident(opened.request, list(opened.tokens), slot, len(self._tables))
            for table in self._tables:
                table[slot] = 0
        for chunk in step.chunks:
            resident = self._by_handle[chunk.seq]
            for pool, pages in enumerate(chunk.new_pages):
                if pages:
                    first = resident.pages[pool]
                    self._tables[pool][resident.slot, first : first + len(pages)] = pages
                    resident.pages[pool] = first + len(pages)

    def rows(self, step: Step) -> Rows:
        """The step's chunks as arrays."""
        residents = [self._by_handle[chunk.seq] for chunk in step.chunks]
        counts = np.array([len(chunk.tokens) for chunk in step.chunks])
        starts = np.array([chunk.start for chunk in step.chunks])
        chunk_rows = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=chunk_rows[1:])
        tokens: list[int] = []
        for chunk, resident in zip(step.chunks, residents, strict=True):
            tokens.extend(chunk.tokens)
            if chunk.tokens[-1] == LATE:
                tokens[-1] = -1 - resident.slot
        of_chunk = np.repeat(np.arange(len(counts)), counts)
        positions = (starts[of_chunk] + np.arange(len(tokens)) - chunk_rows[of_chunk]).astype(np.int32)
        wanted = np.array([chunk.logit_rows for chunk in step.chunks])
        ends = chunk_rows[1:][of_chunk]
        logit_rows = np.flatnonzero(np.arange(len(tokens)) >= ends - wanted[of_chunk]).astype(np.int32)
        slots = np.array([resident.slot for resident in residents])
        width = int((starts + counts - 1).max()) // self._page_size + 1
        groups = tuple(self._group(table, slots, slots[of_chunk], positions, width) for table in self._tables)
        return Rows(step.chunks, residents, np.array(tokens, np.int32), positions, chunk_rows, logit_rows, groups)

    def _group(
        self, table: np.ndarray, slots: np.ndarray, row_slots: np.ndarray, positions: np.ndarray, width: int
    ) -> KVGroupBatch:
        pages, offsets = np.divmod(positions, self._page_size)
        return KVGroupBatch(table[row_slots, pages].astype(np.int64) * self._page_size + offsets, table[slots, :width])
