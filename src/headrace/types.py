"""The data that travels through the house: Request, Chunk, Step, StepResult, Event. All of it is plain and can
cross a process boundary (msgspec); only `Sequence`, which the scheduler owns alone, is mutable and stays at
home."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec
import numpy as np

from .errors import RequestError

Kind = Literal["generate", "score", "embed"]
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]

LATE = -1  # a token not known yet when its chunk was planned: the one sampled by the sequence's previous chunk
NO_TOKEN = -1  # in StepResult.tokens: this chunk sampled nothing

MAX_SAMPLES = 128
MAX_LOGPROBS = 256
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_BIASES = 4096
MAX_GRAMMAR_CHARS = 1 << 17


GrammarKind = Literal["json_schema", "regex", "grammar"]


class GrammarSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a whole answer must look like: the text of a JSON schema, of a regular expression (in the syntax of Rust's
    regex crate, without look-around), or of a context-free grammar, in llguidance's Lark or in llama.cpp's GBNF. It is
    compiled later, for a tokenizer."""

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise RequestError(f"a grammar is one of {', '.join(get_args(GrammarKind))}, got {self.kind!r:.80}")
        if not isinstance(self.text, str) or not 1 <= len(self.text) <= MAX_GRAMMAR_CHARS:
            size = f"{len(self.text)} characters" if isinstance(self.text, str) else f"{self.text!r:.80}"
            raise RequestError(f"a {self.kind} must be text of 1 to {MAX_GRAMMAR_CHARS} characters, got {size}")

    @classmethod
    def choice(cls, choices: Sequence[str]) -> GrammarSpec:
        """One of these texts."""
        if not choices or not all(isinstance(one, str) and one for one in choices):
            raise RequestError(f"choices must be a list of texts that are not empty, got {choices!r:.80}")
        return cls("grammar", "start: " + " | ".join(msgspec.json.encode(one).decode() for one in choices))


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens. Checked once, here: a value out of range raises RequestError.

    `temperature=0` is greedy (ties go to the lowest id). `top_k=0`, `top_p=1`, `min_p=0`, `typical_p=1`,
    `repetition_penalty=1` and the two other penalties at 0 are off. Penalties and filters apply in this order: bias
    and bans, repetition (prompt and output), presence and frequency (output only), temperature, top-k, typical-p,
    top-p, min-p. Logprobs are of the model's own distribution, before all of that. An absent `seed` is drawn at
    admission and kept.

    With a `grammar`, tokens that would leave it are banned, and the model's end tokens are allowed exactly where it may
    end; where nothing can follow, they come whatever `ignore_eos` and `min_tokens` say.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    banned_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False  # keep the stop string or stop token's text in the output
    skip_special_tokens: bool = True
    logprobs: int | None = None  # of each sampled token, with this many most likely ones
    prompt_logprobs: int | None = None
    return_logits: bool = False  # float32 logits of every row that was computed for logits, as the model gave them
    seed: int | None = None
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        # A Struct is frozen after construction; a single stop string is accepted and kept as a tuple of one.
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "banned_tokens"):
            if not isinstance(getattr(self, name), tuple):
                msgspec.structs.force_setattr(self, name, tuple(getattr(self, name) or ()))
        if self.logit_bias is None:
            msgspec.structs.force_setattr(self, "logit_bias", {})
        for name in ("ignore_eos", "include_stop", "skip_special_tokens", "return_logits"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r:.80}")
        for name, low, high in _INTEGER_RANGES:
            _check_range(name, getattr(self, name), low, high, int)
        for name, low, high in _NUMBER_RANGES:
            _check_range(name, getattr(self, name), low, high, (int, float))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 0, MAX_LOGPROBS, int)
        if self.grammar is not None and not isinstance(self.grammar, GrammarSpec):
            raise RequestError(f"grammar must be a GrammarSpec, got {self.grammar!r:.80}")
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**64 - 1, int)
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if len(self.stop) > MAX_STOPS or len(self.stop_token_ids) > MAX_BIASES or len(self.banned_tokens) > MAX_BIASES:
            raise RequestError(
                f"at most {MAX_STOPS} stop strings and {MAX_BIASES} stop or banned token ids can be given"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise RequestError(f"a stop string must be text of 1 to {MAX_STOP_CHARS} characters, got {text!r:.80}")
        for token in (*self.stop_token_ids, *self.banned_tokens, *self.logit_bias):
            _check_range("token id", token, 0, 2**31 - 1, int)
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError(f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_BIASES} can be given")
        for token, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token}]", bias, -100.0, 100.0, (int, float))


_INTEGER_RANGES = (
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("n", 1, MAX_SAMPLES),
    ("top_k", 0, 2**31 - 1),
)
_NUMBER_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("typical_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
)


def _check_range(name: str, value: object, low: float, high: float, kind: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise RequestError(f"{name} must be a number, got {value!r:.80}")
    if not (low <= value <= high) or not math.isfinite(value):  # type: ignore[operator]
        raise RequestError(f"{name} must be from {low} to {high}, got {value}")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to run. A request for n samples is n of these, alike but for `sample_index`."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int  # resolved: never absent here
    stop_ids: tuple[int, ...] = ()  # every token id that ends the sequence
    sample_index: int = 0
    arrival: float = 0.0  # seconds, time.monotonic
    priority: int = 0  # higher runs first
    deadline: float | None = None  # seconds, time.monotonic
    kind: Kind = "generate"
    salt: str = ""  # sequences share cached prefixes only with the same salt
    resumed: tuple[
        int, ...
    ] = ()  # tokens that another engine had generated before it died; this one goes on behind them
    adapter: int = 0


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one sequence, computed in one step: positions `start` to `start + len(tokens) - 1`."""

    seq: int  # handle of the sequence's residence on the workers, never used twice
    start: int
    tokens: tuple[int, ...]  # only the last may be LATE
    new_pages: tuple[tuple[int, ...], ...]  # per pool of the path: page ids appended to the sequence's page list
    logit_rows: int  # how many of the last rows the head computes
    samples: bool  # the last row's logits choose a token
    late_step: int = -1  # the step that samples the LATE token


class Opened(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that starts (again, after a preemption) on the workers: what sampling needs to know of it."""

    seq: int
    request: Request
    tokens: tuple[int, ...]  # prompt, and what was generated before a preemption


class Transfer(msgspec.Struct, frozen=True, array_like=True):
    """Copy one page to another of the same pool, before the step's chunks run."""

    pool: int  # index in the path
    source: int
    target: int


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One batch, of sequences on one path. Workers apply it in this order: finished, opened, transfers, chunks.

    `finished` names residences on any path; `path` is the replica of each stage, () where the model is not split.
    """

    number: int
    chunks: tuple[Chunk, ...]
    opened: tuple[Opened, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    finished: tuple[int, ...] = ()
    path: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class TokenLogprob(msgspec.Struct, frozen=True):
    """Natural log of a token's probability and its rank (1 = most likely), with the most likely (token, logprob)
    pairs."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class ChunkExtras(msgspec.Struct, frozen=True):
    """What only some requests ask for, by chunk: `prompt_logprobs[i]` belongs to the token at position `start + i +
    1`."""

    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    logits: np.ndarray | None = None  # float32 [logit_rows, vocab]
    error: str | None = None


class StepResult(msgspec.Struct, frozen=True):
    """The answer to a Step. `tokens[i]` is what chunk i sampled, or NO_TOKEN; `extras` is keyed by chunk index;
    `expert_load` says for each layer of experts in turn how many rows chose each of them."""

    number: int
    tokens: tuple[int, ...]
    extras: dict[int, ChunkExtras] = {}
    started: float = 0.0  # seconds, time.monotonic, on the worker
    ended: float = 0.0
    expert_load: tuple[int, ...] = ()


class Timings(msgspec.Struct, frozen=True):
    """Where a sequence's time went, in seconds, and why."""

    queue: float = 0.0  # arrival to first scheduled
    prefill: float = 0.0  # first scheduled to first token
    decode: float = 0.0  # first token to last
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache on first admission
    preemptions: int = 0


class Event(msgspec.Struct, frozen=True, array_like=True):
    """What one applied step means for one sequence: new tokens, and its end."""

    request_id: str
    sample_index: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    logits: np.ndarray | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    timings: Timings | None = None  # on the last event
