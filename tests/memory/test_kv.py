"""How memory is split between pools of different windows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.memory.kv import PoolShape, split_pages
from headrace.schedule.pages import UNBOUNDED, Pages, Path, most_pages

LIMITS = {"sequences": 4, "batch_tokens": 64, "steps": 2}


def test_a_window_takes_what_it_needs_and_the_rest_is_for_whole_sequences() -> None:
    pools = [PoolShape(32, 1000), PoolShape(None, 3000)]
    windowed, whole = split_pages(pools, 3_000_000, 16, most=UNBOUNDED, **LIMITS)
    assert windowed == 4 * most_pages(16, 32, 2) + 2 * 64 // 16 + 1 == 25
    assert whole == (3_000_000 - 25 * 1000) // 3000
    assert split_pages(pools, 3_000_000, 16, most=100, **LIMITS) == (25, 101)
    assert split_pages(pools, 40_000, 16, most=100, **LIMITS) == (10, 10), "short of memory, both hold the same"
    assert split_pages(pools, 7_999, 16, most=100, **LIMITS) == (1, 1)


@given(
    windows=st.lists(st.none() | st.integers(1, 200), min_size=1, max_size=3, unique=True),
    memory=st.integers(0, 10**6),
    page=st.sampled_from([16, 32]),
    most=st.integers(1, 500),
    sequences=st.integers(1, 20),
    batch=st.integers(1, 100),
    steps=st.integers(1, 3),
)
def test_splits(windows, memory, page, most, sequences, batch, steps) -> None:
    """Within memory, one page more would not fit, and a windowed pool lets a sequence of any length through wherever it
    is not short of memory."""
    pools = [PoolShape(window, 100 * (i + 1)) for i, window in enumerate(windows)]
    options = {"sequences": sequences, "batch_tokens": batch, "steps": steps}
    counts = split_pages(pools, memory, page, most=most, **options)
    used = sum(count * pool.page_bytes for count, pool in zip(counts, pools))
    bare = sum(pool.page_bytes for pool in pools)
    assert used <= memory or counts == (1,) * len(pools)
    more = split_pages(pools, 10**9, page, most=max(counts), **options)
    if max(counts) <= most and more != counts:
        assert sum(count * pool.page_bytes for count, pool in zip(more, pools)) > memory or used == bare
    if min(counts) < 2:
        return
    whole = max(counts) - 1
    path = Path([Pages(count, page, pool.window, steps * batch) for count, pool in zip(counts, pools)])
    assert path.capacity >= min(whole, most) * page or path.capacity == UNBOUNDED
