"""Pages of KV cache: who holds which, which prefixes they contain, and when they come free.

    never used ──grow──▶ held (refs > 0) ──release──▶ idle, if published ──grow, oldest first──▶ held by another
        ▲                      │   ▲                        │
        └──release, if not ────┘   └──────── adopt ─────────┘
           published

A pool's pages are all of `page_size` tokens. Page 0 is the trash page: padding writes there, and nobody holds it. A
full page whose content is known is *published* under a key that hashes its tokens and everything before them, and
can then be adopted by any sequence with the same prefix.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from ..errors import ConfigError
from ..types import Transfer

TRASH = 0
UNBOUNDED = 1 << 62

Tables = tuple["PageTable", ...]


class PageTable:
    """The pages of one sequence in one pool, from position 0 on; TRASH where a page has left the window."""

    __slots__ = ("pages", "slid")

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.slid = 0  # leading pages given back because the window has passed them


def most_pages(page_size: int, window: int, ahead: int) -> int:
    """Pages that a sequence holds at most where its window slides: it is at most `ahead` tokens further than what has
    been computed, and gave back, so far."""
    return -(-(window + ahead) // page_size) + 1


class Pages:
    """The allocator of one pool. `window` is the attention window of the pool's layers, in tokens, or None; with one,
    `ahead` is how many tokens of a sequence steps in flight may hold beyond what is computed."""

    def __init__(self, count: int, page_size: int, window: int | None = None, ahead: int = 0) -> None:
        if count < 2 or page_size < 1:
            raise ConfigError(f"a pool needs at least 2 pages of at least 1 token, got {count} pages of {page_size}")
        self.count, self.page_size, self.window = count, page_size, window
        self._most = count if window is None else most_pages(page_size, window, ahead)
        self._refs = [0] * count
        self._key_of: list[bytes | None] = [None] * count
        self._by_key: dict[bytes, int] = {}
        self._free = list(range(count - 1, TRASH, -1))
        self._idle: dict[int, None] = {}  # published pages that nobody holds, least recently used first

    @property
    def available(self) -> int:
        """Pages that `grow` could still hand out."""
        return len(self._free) + len(self._idle)

    @property
    def capacity(self) -> int:
        """Tokens of one sequence that fit when it is alone: any number where its window slides within the pool."""
        slides = self.window is not None and self._most < self.count
        return UNBOUNDED if slides else (self.count - 1) * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def missing(self, table: PageTable, tokens: int) -> int:
        """How many pages `grow` would take for the table to cover `tokens` positions."""
        return max(0, self.pages_for(tokens) - len(table.pages))

    def grow(self, table: PageTable, tokens: int) -> tuple[int, ...] | None:
        """Extend the table to cover `tokens` positions; the new pages. None, and nothing has changed, where they do
        not fit."""
        need = self.missing(table, tokens)
        if not need:
            return ()
        if need > self.available:
            return None
        new = tuple(self._take() for _ in range(need))
        table.pages.extend(new)
        return new

    def match(self, keys: Sequence[bytes]) -> list[bool]:
        """Which pages of a chain are published here."""
        return [key in self._by_key for key in keys]

    def usable(self, present: Sequence[bool], pages: int) -> bool:
        """Whether a sequence may start behind its first `pages` pages: those that its window still needs are
        present."""
        return all(present[self._first_needed(pages * self.page_size) : pages])

    def adopt(self, table: PageTable, keys: Sequence[bytes]) -> None:
        """Hold the published pages of a matched chain. Pages that the window has passed are left out."""
        first = self._first_needed(len(keys) * self.page_size)
        for index, key in enumerate(keys):
            if index < first:
                table.pages.append(TRASH)
            else:
                self._hold(self._by_key[key])
                table.pages.append(self._by_key[key])
        table.slid = min(first, len(keys))

    def fits(self, keys: Sequence[bytes], tokens: int) -> bool:
        """Whether a sequence of `tokens` fits behind these published pages, of which adopting takes the idle ones."""
        idle = sum(self._by_key[key] in self._idle for key in keys[self._first_needed(len(keys) * self.page_size) :])
        return min(self.pages_for(tokens) - len(keys), self._most) <= self.available - idle

    def can_fork(self, parent: PageTable, shared: int, tokens: int) -> bool:
        """Whether the parent still holds what a row at `shared` sees, and a sequence of `tokens` fits behind it."""
        held = parent.slid <= self._first_needed(shared)
        return held and min(self.pages_for(tokens) - shared // self.page_size, self._most) <= self.available

    def fork(self, parent: PageTable, table: PageTable, tokens: int) -> tuple[int, int] | None:
        """Give `table` the parent's first `tokens` positions: full pages shared, a partial last page copied at
        once, since its next token will write there. Returns the copy to make as (source, target)."""
        full, partial = divmod(tokens, self.page_size)
        for page in parent.pages[:full]:
            if page != TRASH:
                self._hold(page)
        table.pages = parent.pages[:full]
        table.slid = min(parent.slid, full)
        if not partial:
            return None
        target = self._take()
        table.pages.append(target)
        return parent.pages[full], target

    def publish(self, table: PageTable, index: int, key: bytes) -> None:
        """Make a full page known by its key. Of two pages with the same content the first stays known."""
        page = table.pages[index]
        if page != TRASH and self._key_of[page] is None and key not in self._by_key:
            self._by_key[key] = page
            self._key_of[page] = key

    def slide(self, table: PageTable, computed: int) -> None:
        """Give back the pages that no position from `computed` on can see any more."""
        if self.window is None:
            return
        for index in range(table.slid, min(self._first_needed(computed), len(table.pages))):
            self._drop(table.pages[index])
            table.pages[index] = TRASH
            table.slid = index + 1

    def release(self, table: PageTable) -> None:
        """Let go of every page. Published ones stay findable until they are needed; ends of chains are reused
        before their roots."""
        for page in reversed(table.pages):
            if page != TRASH:
                self._drop(page)
        table.pages, table.slid = [], 0

    def forget(self) -> None:
        """Unpublish everything: the memory behind the pages is gone or no longer trusted."""
        self._by_key.clear()
        self._key_of = [None] * self.count
        self._free.extend(self._idle)
        self._idle.clear()

    def map(self) -> bytes:
        """A byte a page: 0 free, 1 kept for its prefix, 2 held once, 3 shared."""
        idle = self._idle
        return bytes(1 if page in idle else min(refs + 1, 3) if refs else 0 for page, refs in enumerate(self._refs))

    def check(self, tables: Iterable[PageTable]) -> None:
        """Prove that no page is lost, held twice or freed while held, given every live table. Raises AssertionError."""
        refs = [0] * self.count
        for table in tables:
            assert all(page == TRASH for page in table.pages[: table.slid])
            for page in table.pages:
                refs[page] += page != TRASH
        assert refs == self._refs, "reference counts differ from the live tables"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle, "a page is free twice"
        held = {page for page, count in enumerate(refs) if count}
        assert free | idle | held == set(range(1, self.count)) and not held & (free | idle), (
            "a page is lost or both held and free"
        )
        assert {page: key for key, page in self._by_key.items()} == {
            p: k for p, k in enumerate(self._key_of) if k is not None
        }
        assert all(self._key_of[page] is not None for page in idle) and not any(self._key_of[page] for page in free)

    def _first_needed(self, position: int) -> int:
        """Index of the first page that a row at `position` or later can see."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page]
            key = self._key_of[page]
            assert key is not None
            del self._by_key[key]
            self._key_of[page] = None
        self._refs[page] = 1
        return page

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._refs[page] += 1

    def _drop(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page]:
            return
        if self._key_of[page] is None:
            self._free.append(page)
        else:
            self._idle[page] = None


class Path:
    """The pools that a sequence's keys and values live in, one for each KV group of each stage: all of them grow,
    or none. `key` says which replica of each stage they belong to. See `routes.Routes` for the rest."""

    def __init__(
        self,
        pools: Sequence[Pages],
        key: tuple[int, ...] = (),
        depth: int = UNBOUNDED,
        parts: int = 1,
        late: bool = True,
    ) -> None:
        if not pools or len({pool.page_size for pool in pools}) != 1:
            raise ConfigError("a path needs at least one pool, and one page size in all of them")
        self.pools = tuple(pools)
        self.page_size = pools[0].page_size
        self._sliding = [(index, pool) for index, pool in enumerate(pools) if pool.window is not None]
        self._no_pages: tuple[tuple[int, ...], ...] = ((),) * len(pools)
        self.key, self.depth, self.parts, self.late = key, depth, parts, late
        # What the scheduler counts.
        self.in_flight = self.running = self.bound = 0  # steps, sequences there, sequences that wait for it
        self.last_step = -1
        self.full = self.closing = False

    @property
    def load(self) -> int:
        """Sequences that run here, or wait to."""
        return self.running + self.bound

    @property
    def held(self) -> float:
        """The share of pages that are held, in the fullest pool."""
        return max(1 - pool.available / (pool.count - 1) for pool in self.pools)

    @property
    def capacity(self) -> int:
        """Tokens of one sequence that fit when it is alone."""
        return min(pool.capacity for pool in self.pools)

    def match(self, keys: Sequence[bytes]) -> int:
        """How many pages of a chain, from its start, a sequence could adopt in every pool."""
        present = [pool.match(keys) for pool in self.pools]
        for pages in range(len(keys), 0, -1):
            if all(pool.usable(found, pages) for pool, found in zip(self.pools, present, strict=True)):
                return pages
        return 0

    def fits(self, keys: Sequence[bytes], tokens: int) -> bool:
        """Whether a sequence of `tokens` fits behind the published pages `keys`."""
        return all(pool.fits(keys, tokens) for pool in self.pools)

    def open(self, keys: Sequence[bytes]) -> Tables:
        """New tables that hold the published pages `keys`, which `match` has found."""
        tables = tuple(PageTable() for _ in self.pools)
        for pool, table in zip(self.pools, tables, strict=True):
            pool.adopt(table, keys)
        return tables

    def grow(self, tables: Tables, tokens: int) -> tuple[tuple[int, ...], ...] | None:
        """Cover `tokens` positions in every pool; the new pages of each. None, and nothing has changed, where one
        is full."""
        for table in tables:
            if len(table.pages) * self.page_size < tokens:
                break
        else:  # nearly every step of a sequence that decodes
            return self._no_pages
        if any(pool.missing(table, tokens) > pool.available for pool, table in zip(self.pools, tables, strict=True)):
            return None
        return tuple(pool.grow(table, tokens) or () for pool, table in zip(self.pools, tables, strict=True))

    def short(self, tables: Tables, tokens: int) -> list[Pages]:
        """The pools that cannot cover `tokens` positions now."""
        both = zip(self.pools, tables, strict=True)
        return [pool for pool, table in both if pool.missing(table, tokens) > pool.available]

    def can_fork(self, parent: Tables, shared: int, tokens: int) -> bool:
        """Whether a sequence of `tokens` can share the parent's first `shared` positions now."""
        return all(pool.can_fork(table, shared, tokens) for pool, table in zip(self.pools, parent, strict=True))

    def fork(self, parent: Tables, shared: int) -> tuple[Tables, tuple[Transfer, ...]]:
        """Tables that share the parent's first `shared` positions, and the copies to make."""
        tables = tuple(PageTable() for _ in self.pools)
        copies = [pool.fork(old, new, shared) for pool, old, new in zip(self.pools, parent, tables, strict=True)]
        return tables, tuple(Transfer(index, *copy) for index, copy in enumerate(copies) if copy)

    def publish(self, tables: Tables, index: int, key: bytes) -> None:
        for pool, table in zip(self.pools, tables, strict=True):
            pool.publish(table, index, key)

    def slide(self, tables: Tables, computed: int) -> None:
        for index, pool in self._sliding:
            pool.slide(tables[index], computed)

    def release(self, tables: Tables) -> None:
        for pool, table in zip(self.pools, tables, strict=True):
            pool.release(table)

    def forget(self) -> None:
        for pool in self.pools:
            pool.forget()


class PrefixKeys:
    """The keys of one sequence's full pages, computed as its tokens become known.

    A key is a 128-bit BLAKE2b hash over the previous key and the page's tokens; the first hashes `root`: whatever
    must be equal for two sequences to share keys and values (salt, adapter, KV format).
    """

    __slots__ = ("_last", "_page_size", "keys")

    def __init__(self, page_size: int, root: str) -> None:
        self._page_size = page_size
        self._last = hashlib.blake2b(root.encode(), digest_size=16).digest()
        self.keys: list[bytes] = []

    def extend(self, tokens: Sequence[int], pages: int) -> list[bytes]:
        """Keys of the first `pages` pages of `tokens`."""
        for index in range(len(self.keys), pages):
            page = array("i", tokens[index * self._page_size : (index + 1) * self._page_size])
            self._last = hashlib.blake2b(self._last + page.tobytes(), digest_size=16).digest()
            self.keys.append(self._last)
        return self.keys[:pages]
