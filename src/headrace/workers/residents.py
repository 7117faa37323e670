"""What a worker knows of the sequences that live on it, and a Step's chunks as the arrays that kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..grammar.compiled import Grammars, Matcher
from ..kernels.ops import Batch, KVGroupBatch
from ..types import LATE, Chunk, Request, Step, Transfer


class Resident:
    """One sequence on this worker: its tokens as far as they are known here, and its row in the page tables."""

    __slots__ = ("in_python", "matcher", "pages", "request", "sampling", "slot", "tokens")

    def __init__(self, request: Request, tokens: list[int], slot: int, pools: int) -> None:
        self.request, self.tokens, self.slot = request, tokens, slot
        self.pages: list[list[int]] = [[] for _ in range(pools)]  # in each pool, from position 0 on
        self.sampling: bytes | None = None  # what the runner keeps to sample for it
        self.in_python = False  # the token of its last chunk is sampled in Python
        self.matcher: Matcher | None = None  # where it must keep to a grammar

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.prompt_length :]


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

    def batch(self, hidden: np.ndarray | None = None) -> Batch:
        return Batch(self.tokens, self.positions, self.chunk_rows, self.logit_rows, self.groups, hidden=hidden)


class Residents:
    """All sequences on a worker. At most `max_sequences` at once, of at most `max_context` tokens, in `pools` pools,
    which are those of a path from `first_pool` on. `grammars` is for those that keep to one."""

    def __init__(
        self,
        max_sequences: int,
        max_context: int,
        page_size: int,
        pools: int,
        grammars: Grammars | None = None,
        first_pool: int = 0,
    ) -> None:
        self._page_size, self._grammars, self._first_pool = page_size, grammars, first_pool
        self._by_handle: dict[int, Resident] = {}
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._tables = [np.zeros((max_sequences, -(-max_context // page_size)), np.int32) for _ in range(pools)]

    def __getitem__(self, handle: int) -> Resident:
        return self._by_handle[handle]

    def clear(self) -> None:
        """Forget every sequence."""
        self._free_slots.extend(resident.slot for resident in self._by_handle.values())
        self._by_handle.clear()

    def update(self, step: Step) -> None:
        """Take in who left, who came, and the pages that the chunks bring."""
        for handle in step.finished:
            self._free_slots.append(self._by_handle.pop(handle).slot)
        for opened in step.opened:
            slot = self._free_slots.pop()
            resident = Resident(opened.request, list(opened.tokens), slot, len(self._tables))
            resident.matcher = self._grammars.matcher(opened.request) if self._grammars else None
            self._by_handle[opened.seq] = resident
        for chunk in step.chunks:
            if not any(chunk.new_pages):
                continue
            resident = self._by_handle[chunk.seq]
            own = chunk.new_pages[self._first_pool : self._first_pool + len(self._tables)]
            for pool, pages in enumerate(own):
                if pages:
                    first = len(resident.pages[pool])
                    self._tables[pool][resident.slot, first : first + len(pages)] = pages
                    resident.pages[pool].extend(pages)

    def prepare(self, step: Step) -> Rows:
        """`update`, then `rows`."""
        self.update(step)
        return self.rows(step)

    def copies(self, step: Step) -> list[Transfer]:
        """The step's copies of pages of this worker's own pools, counted from 0."""
        moves = ((move.pool - self._first_pool, move) for move in step.transfers)
        return [Transfer(pool, m.source, m.target) for pool, m in moves if 0 <= pool < len(self._tables)]

    def rows(self, step: Step) -> Rows:
        """The step's chunks as arrays."""
        residents = [self._by_handle[chunk.seq] for chunk in step.chunks]
        # Plain lists: most chunks have one row, and a numpy call costs more than a few steps of a loop.
        tokens: list[int] = []
        positions: list[int] = []
        chunk_rows, logit_rows = [0], []
        for chunk, resident in zip(step.chunks, residents, strict=True):
            given, start = chunk.tokens, chunk.start
            tokens.extend(given)
            if given[-1] == LATE:
                tokens[-1] = -1 - resident.slot
            rows = len(tokens)
            if len(given) == 1:
                positions.append(start)
                if chunk.logit_rows:
                    logit_rows.append(rows - 1)
            else:
                positions.extend(range(start, start + len(given)))
                logit_rows.extend(range(rows - chunk.logit_rows, rows))
            chunk_rows.append(rows)
        sequences = [resident.slot for resident in residents]
        width = max(positions) // self._page_size + 1
        return Rows(
            step.chunks,
            residents,
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(chunk_rows, np.int32),
            np.array(logit_rows, np.int32),
            tuple(
                KVGroupBatch(self._slots(step.chunks, residents, pool), table[sequences, :width])
                for pool, table in enumerate(self._tables)
            ),
        )

    def _slots(self, chunks: tuple[Chunk, ...], residents: list[Resident], pool: int) -> np.ndarray:
        """int64 [rows]: where each row's key and value go in a pool."""
        size, slots = self._page_size, []
        for chunk, resident in zip(chunks, residents, strict=True):
            pages, position, end = resident.pages[pool], chunk.start, chunk.start + len(chunk.tokens)
            if end - position == 1:
                slots.append(pages[position // size] * size + position % size)
                continue
            while position < end:
                index, offset = divmod(position, size)
                count = min(end - position, size - offset)
                first = pages[index] * size + offset
                slots.extend(range(first, first + count))
                position += count
        return np.array(slots, np.int64)
