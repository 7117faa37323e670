"""Grammars, compiled for one model's tokens, and how far a sequence is in one."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from ..errors import HeadraceError, RequestError
from ..text.tokenizer import Tokenizer
from ..types import GrammarSpec, Request
from .check import Checker, limits, problem_of

MAX_CACHED = 256
MAX_CACHED_BYTES = 256 << 20
MARK = "\x02"  # a character that no vocabulary joins with others


@dataclass(frozen=True)
class _Entry:
    matcher: Any  # at the grammar's beginning; None where it was refused
    size: int
    problem: str = ""


class Grammars:
    """Compiles grammars for a tokenizer, and keeps those used last. Thread-safe.

    `tokenizer` is called when the first grammar comes: most engines never see one. `vocab_size` is the model's, which
    may be larger than the tokenizer's.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int) -> None:
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self._checker = Checker()
        self._compiling = threading.Lock()
        self._lock = threading.Lock()  # guards what follows
        self._cache: OrderedDict[GrammarSpec, _Entry] = OrderedDict()
        self._vocabulary: Any = None
        self.eos_ids: tuple[int, ...] = ()

    def known(self, spec: GrammarSpec) -> bool:
        """Whether `compile` answers at once."""
        with self._lock:
            return spec in self._cache

    def compile(self, spec: GrammarSpec) -> None:
        """Make a grammar ready. Bounded in time and memory; RequestError where it is malformed, or too much."""
        self._entry(spec)

    def open(self, spec: GrammarSpec) -> Any:
        """A matcher at the grammar's beginning; RequestError as for `compile`."""
        entry = self._entry(spec)
        with self._lock:
            return entry.matcher.deep_copy()

    def matcher(self, request: Request) -> Matcher | None:
        """What follows a request's tokens through its grammar; None where it has none."""
        return None if request.params.grammar is None else Matcher(self, request)

    def close(self) -> None:
        self._checker.close()

    def _entry(self, spec: GrammarSpec) -> _Entry:
        entry = self._cached(spec)
        if entry is None:
            with self._compiling:
                entry = self._cached(spec) or self._keep(spec, self._compiled(spec))
        if entry.matcher is None:
            raise RequestError(entry.problem)
        return entry

    def _cached(self, spec: GrammarSpec) -> _Entry | None:
        with self._lock:
            if entry := self._cache.get(spec):
                self._cache.move_to_end(spec)
            return entry

    def _compiled(self, spec: GrammarSpec) -> _Entry:
        from llguidance import LLMatcher

        cost = 8 * len(spec.text) + 4096
        try:
            checked = self._checker.check(spec)
        except RequestError as error:
            return _Entry(None, cost, str(error))
        matcher = LLMatcher(self._for_tokenizer(), checked.grammar, log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # copies begin with what this has worked out
        problem = problem_of(matcher)
        if problem is not None:
            return _Entry(None, cost, f"the {spec.kind} cannot be used: {problem}")
        return _Entry(matcher, cost + checked.size)

    def _keep(self, spec: GrammarSpec, entry: _Entry) -> _Entry:
        with self._lock:
            self._cache[spec] = entry
            total = sum(one.size for one in self._cache.values())
            while len(self._cache) > 1 and (len(self._cache) > MAX_CACHED or total > MAX_CACHED_BYTES):
                total -= self._cache.popitem(last=False)[1].size
        return entry

    def _for_tokenizer(self) -> Any:
        """The vocabulary, as llguidance wants it."""
        if self._vocabulary is None:
            from llguidance import LLTokenizer

            tokenizer = self._tokenizer()
            self.eos_ids = tokenizer.eos_ids
            vocabulary: Any = _Vocabulary(tokenizer)
            self._vocabulary = LLTokenizer(vocabulary, eos_token=list(tokenizer.eos_ids))
        return self._vocabulary


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.eos_token_id, self.bos_token_id = tokenizer.eos_ids[0], tokenizer.bos_id
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        """Token ids of a text in the middle of others: without the space that some tokenizers put before."""
        text = text.decode() if isinstance(text, bytes) else text
        if not self._tokenizer.strips_first_space:
            return self._tokenizer.encode(text, add_special=False)
        ids = self._tokenizer.encode(MARK + text, add_special=False)
        after = next(index for index, token in enumerate(ids) if self.tokens[token].endswith(MARK.encode()))
        return ids[after + 1 :]


class Matcher:
    """How far a sequence is in its grammar: a function of the tokens that it has put out, so a sequence that starts
    again anywhere finds its place again."""

    __slots__ = ("_grammars", "_mask", "_request", "_seen", "_state")

    def __init__(self, grammars: Grammars, request: Request) -> None:
        self._grammars, self._request = grammars, request
        self._state: Any = None
        self._seen = 0  # tokens of the output that the state has taken in
        self._mask: np.ndarray | None = None

    def prepare(self, output_ids: Sequence[int]) -> None:
        """Work out `allowed` ahead of time. What goes wrong will show there."""
        try:
            self.allowed(output_ids)
        except HeadraceError:
            pass

    def allowed(self, output_ids: Sequence[int]) -> np.ndarray:
        """bool [vocab]: the tokens that may follow these. From call to call they only grow. RequestError where the
        grammar takes too much work here, or cannot be compiled."""
        if self._state is None:
            assert self._request.params.grammar is not None
            self._state = self._grammars.open(self._request.params.grammar)
        if self._mask is None or len(output_ids) != self._seen:
            self._mask = None
            self._state.consume_tokens(list(output_ids[self._seen :]))
            self._seen = len(output_ids)
            self._mask = self._compute()
        return self._mask

    def _compute(self) -> np.ndarray:
        packed = b"" if self._state.is_error() else self._state.compute_bitmask()
        if problem := problem_of(self._state):
            raise RequestError(f"the grammar cannot be followed after {self._seen} tokens: {problem}")
        mask = np.zeros(self._grammars.vocab_size, bool)
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[: len(mask)]
        mask[: len(bits)] = bits
        ends, accepting = list(self._grammars.eos_ids), self._state.is_accepting()
        mask[[token for token in self._request.stop_ids if token < len(mask)]] |= accepting
        if self._request.params.ignore_eos and np.count_nonzero(mask) > np.count_nonzero(mask[ends]):
            mask[ends] = False
        return mask


class Compiler:
    """Compiles in a thread of its own, a grammar at a time, for a loop that must not wait."""

    def __init__(self, grammars: Grammars, wake: Callable[[], None]) -> None:
        """`wake` is called in that thread when there is something to `take`."""
        self._grammars, self._wake = grammars, wake
        self._work: SimpleQueue[tuple[str, GrammarSpec]] = SimpleQueue()
        self._done: deque[tuple[str, str | None]] = deque()
        self._thread: threading.Thread | None = None

    def start(self, key: str, spec: GrammarSpec) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
            self._thread.start()
        self._work.put((key, spec))

    def take(self) -> list[tuple[str, str | None]]:
        """(key, problem, or None where the grammar is ready) of all that are done."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def _run(self) -> None:
        while True:
            key, spec = self._work.get()
            problem: str | None = None
            try:
                self._grammars.compile(spec)
            except Exception as error:  # the thread goes on whatever a grammar does
                problem = str(error) if isinstance(error, HeadraceError) else f"the {spec.kind} cannot be compiled"
            self._done.append((key, problem))
            self._wake()
