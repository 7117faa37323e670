"""Micro-batches follow what the stages are seen to take."""

from __future__ import annotations

from headrace.schedule.pages import Pages
from headrace.schedule.routes import Routes
from headrace.trace import StageSpan
from headrace.workers.pace import FEWEST_SPANS, Pace


def pace_of(seconds: float, host: float) -> tuple[Pace, Routes]:
    """Two stages that take `seconds` for 16 rows, 32 sequences on the only path, and answers that take host / 2."""
    routes = Routes([lambda: [Pages(9, 4)]] * 2, depth=3, parts=2, late=False)
    routes.join((0, 0))
    routes.join((1, 0))
    routes.paths[0].running = 32
    pace = Pace(routes, 2)
    for number in range(FEWEST_SPANS):
        start = float(number)
        for stage in range(2):
            end = start + seconds
            pace.add(StageSpan(number, 16, stage, 0, 0, start, start, start, end, end + 1e-5 if stage == 0 else 0.0))
        pace.answered(start, start + host / 2)
    return pace, routes


def test_a_slow_way_back_is_filled_with_more_micro_batches() -> None:
    chosen = []
    for host in (0.0, 0.002):
        pace, routes = pace_of(0.005, host)
        pace.look(100.0, (1, 1))
        chosen.append(routes.paths[0].parts)
        assert routes.paths[0].depth == chosen[-1] + 1
    assert chosen == [2, 3]


def test_nothing_is_chosen_before_enough_was_seen_or_for_one_sequence() -> None:
    pace, routes = pace_of(0.005, 0.002)
    routes.paths[0].running = 1
    pace.look(100.0, (1, 1))
    assert routes.paths[0].parts == 2
    fresh = Pace(routes, 2)
    routes.paths[0].running = 32
    fresh.look(100.0, (1, 1))
    assert routes.paths[0].parts == 2


def test_a_path_that_comes_later_has_the_same_pace() -> None:
    pace, routes = pace_of(0.005, 0.002)
    pace.look(100.0, (1, 1))
    routes.join((1, 1))
    assert {path.parts for path in routes.paths} == {3}
