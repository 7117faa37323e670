"""Stop strings in text that arrives in pieces (Aho and Corasick, 1975, "Efficient string matching")."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Finds the stop string that is complete first; of several complete at the same character, the longest.

    Text that may still become part of a stop string is held back, and no more than that. The result does not depend on
    how the text is cut. A character costs about one dictionary look-up, and a text without a stop's first letter less.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`stops`: non-empty strings. With `include_stop` the matched stop string is shown too."""
        self._include_stop = include_stop
        self._first = frozenset(stop[0] for stop in stops)
        self._next: list[dict[str, int]] = [{}]  # state 0 is the root; a state is a prefix of some stop string
        self._depth = [0]  # its length
        self._found = [0]  # length of the longest stop string that ends here, or 0
        for stop in stops:
            self._add(stop)
        self._fail = self._suffix_links()
        self._state = 0
        self._held = ""
        self.matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string was found). After a match nothing more is shown."""
        if self.matched:
            return "", True
        if self._state == 0 and self._first.isdisjoint(text):
            return text, False
        follow, fail, found = self._next, self._fail, self._found
        state = self._state
        for position, character in enumerate(text, start=1):
            while state and character not in follow[state]:
                state = fail[state]
            state = follow[state].get(character, 0)
            if found[state]:
                self.matched = True
                seen = self._held + text[:position]
                self._held = ""
                return (seen if self._include_stop else seen[: len(seen) - found[state]]), True
        self._state = state
        seen = self._held + text
        shown = len(seen) - self._depth[state]
        self._held = seen[shown:]
        return seen[:shown], False

    def finish(self) -> str:
        """The end of the text: what was held back, which became no stop string."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(0)
            state = following
        self._found[state] = len(stop)

    def _suffix_links(self) -> list[int]:
        """For each state the longest proper suffix that is a state too; `_found` is completed along the way."""
        fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self._next[state].items():
                suffix = fail[state]
                while suffix and character not in self._next[suffix]:
                    suffix = fail[suffix]
                fail[following] = self._next[suffix].get(character, 0)
                self._found[following] = self._found[following] or self._found[fail[following]]
                queue.append(following)
        return fail
