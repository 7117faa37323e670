"""Perplexity by strided windows, as Hugging Face's guide to it does ("Perplexity of fixed-length models")."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, RequestError
from ..types import SamplingParams

if TYPE_CHECKING:
    from ..llm import LLM

WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Perplexity:
    """exp(-mean natural log of the probability) over the scored tokens of a text."""

    perplexity: float
    mean_nll: float
    tokens: int  # of the text
    scored: int
    windows: int
    context: int
    stride: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        scored = f"{self.scored:,} of {self.tokens:,} tokens scored"
        windows = f"{self.windows:,} windows of {self.context}, stride {self.stride}"
        return f"perplexity {self.perplexity:.4f} ({scored}, {windows})"


def read_text(path: Path, limit_bytes: int | None = None) -> str:
    """A UTF-8 file, or its first `limit_bytes` bytes less a character cut there. RequestError where it is not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes if limit_bytes is not None else -1)
        return data.decode("utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        if (
            limit_bytes is not None
            and len(data) == limit_bytes
            and error.end == len(data)
            and error.start >= len(data) - 3
        ):
            return data[: error.start].decode("utf-8")
        raise RequestError(f"{path} is not UTF-8 at byte {error.start}; convert it first") from None


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, scored from) of each window: `context` tokens at most, `stride` apart, until the text's end.

    A token is scored at most once: in the first window that holds it, if there is a token before it in that window.
    """
    scored_to = 0
    for first in range(0, tokens, stride):
        end = min(first + context, tokens)
        yield first, end, max(first + 1, scored_to)
        scored_to = end
        if end == tokens:
            return


def measure(llm: LLM, text: str, context: int, stride: int, advance: Callable[[int, int], None]) -> Perplexity:
    """Perplexity of `text`, tokenized as a prompt is. `advance(done, all)` hears of progress, in windows."""
    if context < 2 or not 1 <= stride <= context:
        raise ConfigError(f"context must be at least 2 and stride from 1 to context, got {context} and {stride}")
    ids = llm.tokenizer.encode(text)
    if len(ids) < 2:
        raise RequestError(f"the text has {len(ids)} tokens; perplexity needs at least 2")
    every = list(windows(len(ids), context, stride))
    total, scored = 0.0, 0
    for index in range(0, len(every), WINDOWS_AT_ONCE):
        batch = [window for window in every[index : index + WINDOWS_AT_ONCE] if window[2] < window[1]]
        for (first, _, start), logprobs in zip(batch, _logprobs(llm, [ids[a:b] for a, b, _ in batch]), strict=True):
            kept = logprobs[start - first - 1 :]
            total -= math.fsum(kept)
            scored += len(kept)
        advance(min(index + WINDOWS_AT_ONCE, len(every)), len(every))
    return Perplexity(math.exp(total / scored), total / scored, len(ids), scored, len(every), context, stride)


def _logprobs(llm: LLM, prompts: list[list[int]]) -> list[list[float]]:
    """Natural log of the probability of each prompt's tokens 1.. given those before."""
    if not prompts:
        return []
    outputs = llm.generate(prompts, SamplingParams(prompt_logprobs=0), kind="score")
    return [[entry.logprob for entry in _scored(output)] for output in outputs]


def _scored(output: Any) -> list[Any]:
    expected, got = len(output.prompt_token_ids) - 1, len(output.prompt_logprobs or ())
    if got != expected:
        raise RequestError(output.samples[0].error or f"{got} log-probabilities came back for {expected} tokens")
    return output.prompt_logprobs
