"""From events to what a user gets: text as it becomes final, stop strings, and the finished Output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from .errors import RequestError
from .text.detokenizer import Detokenizer
from .text.stop import StopMatcher
from .text.tokenizer import Tokenizer
from .types import Event, FinishReason, SamplingParams, Timings, TokenLogprob


class Delta(msgspec.Struct, frozen=True):
    """What one event adds to a sample. `text` is final: never half a character, never part of a stop string."""

    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    timings: Timings | None = None  # on the last delta
    error: str | None = None  # with finish_reason "error"


@dataclass
class Sample:
    """One finished answer. `token_ids` hold the stop token, if one ended it; `text` does not, unless asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    logits: np.ndarray | None = None  # float32 [rows, vocab], if asked for
    timings: Timings = field(default_factory=Timings)
    error: str | None = None


@dataclass
class Output:
    """All samples of one prompt; the short names are the first sample's."""

    prompt_token_ids: list[int]
    samples: list[Sample]
    prompt_logprobs: list[TokenLogprob] | None = None  # of tokens 1.. of the prompt

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.samples[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return self.samples[0].logprobs

    @property
    def logits(self) -> np.ndarray | None:
        return self.samples[0].logits

    @property
    def timings(self) -> Timings:
        return self.samples[0].timings


class Completion:
    """One request on its way: takes events, gives deltas, ends as an Output.

    `stop(sample_index)` is called when a stop string ends a sample: it must end the sequence in the engine and
    return the sample's last event, or None where that event comes later by itself.
    """

    def __init__(
        self, prompt_ids: list[int], params: SamplingParams, tokenizer: Tokenizer, stop: Callable[[int], Event | None]
    ) -> None:
        self.output = Output(
            prompt_ids, [Sample() for _ in range(params.n)], [] if params.prompt_logprobs is not None else None
        )
        self._params, self._stop = params, stop
        self._text = [Detokenizer(tokenizer, params.skip_special_tokens, prompt_ids) for _ in range(params.n)]
        self._matchers = [
            StopMatcher(params.stop, params.include_stop) if params.stop else None for _ in range(params.n)
        ]
        self._stop_ids = frozenset(stop_ids(params, tokenizer))
        self._logits: list[list[np.ndarray]] = [[] for _ in range(params.n)]
        self.stopped = [False] * params.n  # by a stop string; the last event may be still to come
        self._open = params.n

    @property
    def done(self) -> bool:
        return self._open == 0

    def push(self, event: Event, shown: bool = True) -> Delta | None:
        """Take in an event of this request; what it adds, or None where it adds nothing that may be shown.

        Where nobody is shown any of a sample (`shown` false), its text is made at its end, all at once."""
        index = event.sample_index
        sample = self.output.samples[index]
        if sample.finish_reason is not None:
            return None
        if self.stopped[index]:
            return self._end(index, "stop", "", event) if event.finish_reason else None
        if event.prompt_logprobs and self.output.prompt_logprobs is not None and index == 0:
            self.output.prompt_logprobs.extend(event.prompt_logprobs)
        if event.logits is not None:
            self._logits[index].append(event.logits)
        sample.token_ids.extend(event.tokens)
        sample.logprobs.extend(event.logprobs)
        tokens = event.tokens
        if not shown and self._matchers[index] is None:
            if not event.finish_reason:
                return None
            tokens = sample.token_ids
        text, matched = self._show(index, tokens, ends=event.finish_reason is not None)
        sample.text += text
        if matched:
            self.stopped[index] = True
            last = event if event.finish_reason else self._stop(index)
            if last is None:
                return Delta(index, text, event.tokens, event.logprobs)
            return self._end(index, "stop", text, last, event)
        if event.finish_reason:
            return self._end(index, event.finish_reason, text, event, event)
        if not event.tokens:
            return None
        return Delta(index, text, event.tokens, event.logprobs)

    def rewind(self, index: int) -> None:
        """Forget what was told of a sample's prompt: the sample starts again, without a token so far."""
        self._logits[index].clear()
        if index == 0 and self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs.clear()

    def _show(self, index: int, tokens: Sequence[int], ends: bool) -> tuple[str, bool]:
        """Text that is final with these tokens, and whether a stop string has ended it."""
        if ends and tokens and tokens[-1] in self._stop_ids and not self._params.include_stop:
            tokens = tokens[:-1]
        text = self._text[index].push(tokens)
        if ends:
            text += self._text[index].finish()
        matcher = self._matchers[index]
        if matcher is None:
            return text, False
        text, matched = matcher.push(text)
        if ends and not matched:
            text += matcher.finish()
        return text, matched

    def _end(self, index: int, reason: FinishReason, text: str, last: Event, news: Event | None = None) -> Delta:
        sample = self.output.samples[index]
        sample.finish_reason, sample.error = reason, last.error if reason == "error" else None
        sample.timings = last.timings or Timings()
        if self._logits[index]:
            sample.logits = np.concatenate(self._logits[index])
        self._open -= 1
        return Delta(
            index,
            text,
            news.tokens if news else (),
            news.logprobs if news else (),
            reason,
            sample.timings,
            sample.error,
        )


SCORE = SamplingParams(max_tokens=1, return_logits=True)  # of a request of kind "score": the prompt's logits


def scored_logits(sample: Sample) -> np.ndarray:
    """The logits of a request made with SCORE; RequestError where it ended early."""
    if sample.logits is None:
        raise RequestError(sample.error or f"the request ended early: {sample.finish_reason}")
    return sample.logits


def stop_ids(params: SamplingParams, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token id that ends a sequence: the model's own, unless ignored, and the request's. A grammar's end is the
    model's own even then."""
    ignored = params.ignore_eos and params.grammar is None
    return tuple(sorted({*params.stop_token_ids, *(() if ignored else tokenizer.eos_ids)}))
