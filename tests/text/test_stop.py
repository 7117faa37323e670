"""Stop strings against a plain model that sees the whole text at once."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.text.stop import StopMatcher

STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)
TEXT = st.text("abc", max_size=24)
CUTS = st.lists(st.integers(0, 24), max_size=8)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """The text up to the first position where some stop string is complete, less the longest that is."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end if include else end - max(map(len, complete))], True
    return text, False


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@settings(max_examples=500, deadline=None)
@given(text=TEXT, stops=STOPS, cuts=CUTS, include=st.booleans())
@example(text="aaab", stops=["aab"], cuts=[2, 3], include=False)
@example(text="abcab", stops=["bcx", "abcaa", "cab"], cuts=[1, 2, 3, 4], include=False)
def test_any_cut_shows_what_a_plain_model_shows(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    shown, seen, matched = "", "", False
    for piece in pieces(text, cuts):
        now, matched = matcher.push(piece)
        shown, seen = shown + now, seen + piece
        assert matched == naive(seen, stops, include)[1] == matcher.matched
        if not matched:  # held back is the longest end that may still become a stop string, and no more
            begun = [n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
            assert shown == seen[: len(seen) - max(begun, default=0)]
    assert (shown + matcher.finish(), matched) == naive(text, stops, include)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_mismatch_does_not_forget_what_still_fits(size: int) -> None:
    matcher = StopMatcher(["aab"])
    shown = "".join(matcher.push("aaab"[i : i + size])[0] for i in range(0, 4, size))
    assert shown == "a" and matcher.matched


def test_the_longest_of_those_complete_at_once() -> None:
    assert StopMatcher(["b", "aab", "ab"]).push("xaab!") == ("x", True)
    assert StopMatcher(["b", "aab", "ab"], include_stop=True).push("xaab!") == ("xaab", True)


def test_after_a_match_nothing_more_and_without_one_all() -> None:
    matcher = StopMatcher(["\n\n", "</s>"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two</") == ("\ntwo", False)
    assert matcher.finish() == "</"
    matcher = StopMatcher(["stop"])
    assert matcher.push("a stop here") == ("a ", True)
    assert matcher.push("more") == ("", True) and matcher.finish() == ""
    assert StopMatcher([]).push("anything") == ("anything", False)


def test_work_is_linear_in_the_text() -> None:
    """A stop string that almost matches everywhere; a matcher that starts over would take 10^10 comparisons."""
    matcher = StopMatcher(["a" * 50_000 + "b"])
    for _ in range(20):
        assert not matcher.push("a" * 10_000)[1]
    assert matcher.push("b")[1]
