"""Pages against a plain model: who holds what, what is published, and that a refusal changes nothing."""

from __future__ import annotations

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.errors import ConfigError
from headrace.schedule.pages import TRASH, Pages, PageTable, Path, PrefixKeys

PAGE = 4


class PagesMachine(RuleBasedStateMachine):
    """Tables hold token lists; the plain model says which content each page must have."""

    def __init__(self) -> None:
        super().__init__()
        self.window = None
        self.pages = Pages(9, PAGE)
        self.tables: list[tuple[PageTable, list[int]]] = []
        self.content: dict[
            int, tuple[int, ...]
        ] = {}  # page -> tokens from position 0 to the page's end, as last written

    def _write(self, table: PageTable, tokens: list[int], start: int) -> None:
        for index in range(start // PAGE, len(table.pages)):
            self.content[table.pages[index]] = tuple(tokens[: (index + 1) * PAGE])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def open(self, tokens: list[int]) -> None:
        keys = PrefixKeys(PAGE, "").extend(tokens, (len(tokens) - 1) // PAGE)
        path = Path([self.pages])
        matched = path.match(keys)
        tables = path.open(keys[:matched])
        for index in range(matched):
            assert self.content[tables[0].pages[index]] == tuple(tokens[: (index + 1) * PAGE]), (
                "a hit has the prefix's content"
            )
        self.tables.append((tables[0], tokens[: matched * PAGE]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        table, tokens = data.draw(st.sampled_from(self.tables))
        before = copy.deepcopy((table.pages, self.pages.__dict__))
        new = self.pages.grow(table, len(tokens) + len(more))
        if new is None:
            assert (table.pages, self.pages.__dict__) == before, "a refusal changes nothing"
            assert self.pages.pages_for(len(tokens) + len(more)) - len(table.pages) > self.pages.available
            return
        assert TRASH not in new and not set(new) & {p for t, _ in self.tables if t is not table for p in t.pages}
        start = len(tokens)
        tokens.extend(more)
        self._write(table, tokens, start)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table, tokens = data.draw(st.sampled_from(self.tables))
        full = len(tokens) // PAGE
        for index, key in enumerate(PrefixKeys(PAGE, "").extend(tokens, full)):
            self.pages.publish(table, index, key)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent, tokens = data.draw(st.sampled_from(self.tables))
        if not tokens:
            return
        length = data.draw(st.integers(1, len(tokens)))
        if not self.pages.can_fork(parent, length, length):
            return
        table = PageTable()
        copied = self.pages.fork(parent, table, length)
        assert (copied is None) == (length % PAGE == 0)
        if copied:
            self.content[copied[1]] = self.content[copied[0]][:length]
        self.tables.append((table, tokens[:length]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pages.release(self.tables.pop(index)[0])

    @rule()
    def forget(self) -> None:
        self.pages.forget()

    @invariant()
    def sound(self) -> None:
        self.pages.check(table for table, _ in self.tables)


PagesMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestPages = PagesMachine.TestCase


def test_check_finds_a_leak() -> None:
    pages = Pages(4, PAGE)
    table = PageTable()
    pages.grow(table, 5)
    with pytest.raises(AssertionError):
        pages.check([])


def test_eviction_takes_the_least_recently_used_chain_from_its_end() -> None:
    pages = Pages(5, PAGE)
    chains = []
    for first in (0, 1):
        tokens = [first] * 8
        table = PageTable()
        pages.grow(table, 8)
        keys = PrefixKeys(PAGE, "").extend(tokens, 2)
        for index, key in enumerate(keys):
            pages.publish(table, index, key)
        pages.release(table)
        chains.append(keys)
    pages.grow(PageTable(), 4)
    assert [pages.match(keys) for keys in chains] == [[True, False], [True, True]]


def test_a_window_gives_pages_back_and_still_matches() -> None:
    pages = Pages(20, PAGE, window=6)
    tokens = list(range(24))
    table = PageTable()
    pages.grow(table, 24)
    keys = PrefixKeys(PAGE, "").extend(tokens, 6)
    for index, key in enumerate(keys):
        pages.publish(table, index, key)
    pages.slide(table, 20)  # position 20 sees 15..20: pages 0..2 have left
    assert table.pages[:3] == [TRASH] * 3 and TRASH not in table.pages[3:]
    pages.check([table])
    pages.grow(PageTable(), 4 * (pages.available - 3))  # evicts nothing that is published and needed
    path = Path([pages])
    matched = path.match(keys)
    tables = path.open(keys)
    assert matched == 6 and tables[0].pages[:4] == [TRASH] * 4 and tables[0].pages[4:] == table.pages[4:]


def test_a_path_grows_in_every_pool_or_in_none() -> None:
    path = Path([Pages(10, PAGE), Pages(3, PAGE)])
    tables = path.open([])
    assert path.grow(tables, 2 * PAGE) == ((1, 2), (1, 2))
    assert path.grow(tables, 3 * PAGE) is None and [len(table.pages) for table in tables] == [2, 2]
    assert path.capacity == 2 * PAGE
    with pytest.raises(ConfigError):
        Path([Pages(4, 4), Pages(4, 8)])


def test_keys_depend_on_everything_before_and_on_the_root() -> None:
    base = PrefixKeys(PAGE, "0:").extend([1, 2, 3, 4, 5, 6, 7, 8], 2)
    assert base == PrefixKeys(PAGE, "0:").extend([1, 2, 3, 4, 5, 6, 7, 8, 9], 2)
    assert base[1] != PrefixKeys(PAGE, "0:").extend([1, 2, 3, 0, 5, 6, 7, 8], 2)[1]
    assert base[0] != PrefixKeys(PAGE, "0:salt").extend([1, 2, 3, 4], 1)[0]
