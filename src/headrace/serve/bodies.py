"""Request bodies, and the Jobs that they become. Shapes and types are msgspec's to check, numbers are SamplingParams'
and Frontend's: each once."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec

from ..async_llm import AsyncLLM
from ..text.tokenizer import LONG_TEXT
from ..types import MAX_BIASES, Kind, SamplingParams
from .faults import Fault
from .parser import TextParser
from .structured import grammar_of
from .tools import as_messages, dialect_for, knows_tools, toolbox

MAX_PROMPTS = 256
MAX_CHOICES = 128
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_LOGPROB_ENTRIES = 1 << 20  # of a request: they are kept until it ends, at some 100 bytes each
MAX_STREAMED_ENTRIES = 1 << 14  # of an echoed prompt, which is one event
CHARACTERS_PER_TOKEN = 256  # more than any vocabulary needs: a longer text cannot fit, and is not encoded to find out
_TOKEN_ID = re.compile("-?[0-9]{1,20}")


# A text, token ids, or a list of either. msgspec checks the leaves, `_prompts` that they are not mixed.
Prompts = str | list[str | int | list[int]]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chats have in common. Fields that are not listed are ignored, as OpenAI's own are many."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    deadline_ms: float | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None


class CompletionBody(Body, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompts
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatBody(Body, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None


class ScoreBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/score: the log-probabilities of a prompt's own tokens."""

    prompt: Prompts
    model: str | None = None
    top_logprobs: int | None = None
    priority: int | None = None
    deadline_ms: float | None = None
    cache_salt: str | None = None


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings."""

    input: Prompts
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: of a text, or of a conversation as the model will see it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class LoadBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /admin/load and /admin/unload. `name` is what clients call the model."""

    model: str
    name: str | None = None


class ScaleBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /admin/scale: how many replicas a stage of a split model is to have."""

    stage: int
    replicas: int
    model: str | None = None


T = TypeVar("T")


def parse(kind: type[T], data: bytes) -> T:
    """A body of JSON. Fault 400 where it is not what it must be."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        _, _, where = str(error).partition(" - at `$.")
        param = where.rstrip("`").partition("[")[0] or None
        raise Fault(400, str(error).replace("`", "'"), param=param, code="invalid_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Fault(400, f"the body is not JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise Fault(400, "the body nests too deeply", code="invalid_json") from None


@dataclass
class Job:
    """A checked request: what to run, and how to show it. Prompt p's sample s is choice p * n + s."""

    prompts: list[list[int]]
    params: SamplingParams  # `n` samples of each prompt; of best_of samples, `choices` are shown
    choices: int
    chat: bool
    kind: Kind = "generate"
    options: dict[str, Any] = field(default_factory=dict)  # of AsyncLLM.submit
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    token_ids: bool = False  # show them
    top_logprobs: int | None = None  # show logprobs, with this many most likely tokens
    parser: Callable[[], TextParser] | None = None  # of the text of each choice

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.params.n


async def completion_job(body: CompletionBody, llm: AsyncLLM) -> Job:
    if body.suffix:
        raise Fault(400, "suffix is not supported: the models here do not fill in", param="suffix")
    prompts = await _prompts(llm, body.prompt)
    scores_only = body.echo and body.max_tokens == 0
    n, best_of = body.n or (1 if body.n is None else 0), body.best_of
    if best_of is not None and (best_of < n or best_of > MAX_CHOICES):
        raise Fault(400, f"best_of must be from n ({n}) to {MAX_CHOICES}, got {best_of}", param="best_of")
    if best_of is not None and best_of > n and body.stream:
        raise Fault(
            400, "best_of above n cannot be streamed: which samples are best is known at the end", param="best_of"
        )
    logprobs = body.logprobs
    own = {"max_tokens": 1 if scores_only else 16 if body.max_tokens is None else body.max_tokens}
    if logprobs is not None or (best_of or n) > n:
        own["logprobs"] = logprobs or 0
    if (body.echo and logprobs is not None) or scores_only:
        own["prompt_logprobs"] = logprobs or 0
    params = _params(body, n=best_of or n, **own)
    job = Job(prompts, params, n, chat=False, top_logprobs=logprobs, echo=bool(body.echo), **_common(body))
    job.kind = "score" if scores_only else "generate"
    _check_fit(job, llm, body.max_tokens or 0)
    return job


async def chat_job(body: ChatBody, llm: AsyncLLM, tool_parser: str = "auto") -> Job:
    """`tool_parser`: a name of tools.DIALECTS, or "auto"."""
    frontend = llm.ready()
    if body.audio is not None or (body.modalities and body.modalities != ["text"]):
        raise Fault(400, "only text can be generated here", param="modalities")
    for index, message in enumerate(body.messages):
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and part.get("type", "text") != "text":
                raise Fault(
                    400, f"message {index} has a part that is no text; only text is understood", param="messages"
                )
    box = toolbox(body.tools, body.tool_choice, body.parallel_tool_calls, dialect_for(tool_parser, llm.tokenizer))
    size = conversation_size(body.messages, box.tools if box else ())
    check_length(llm, size, CHARACTERS_PER_TOKEN, "messages")
    messages, tools = body.messages, box.tools if box else None
    if not knows_tools(llm.tokenizer):
        messages, tools = as_messages(messages, tools or ()), None
    prompt = await _encode(partial(frontend.chat_ids, tools=tools), messages, size)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    left = max(1, llm.config.max_context - len(prompt))
    own: dict[str, Any] = {"max_tokens": left if wanted is None else wanted}
    if body.top_logprobs is not None and not body.logprobs:
        raise Fault(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    if top is not None:
        own["logprobs"] = top
    if box is not None and box.forced:
        own["grammar"] = box.grammar(llm.tokenizer)
    if box is not None and box.special(llm.tokenizer):
        own["skip_special_tokens"] = False
    params = _params(body, n=1 if body.n is None else body.n, **own)
    job = Job([prompt], params, params.n, chat=True, top_logprobs=top, **_common(body))
    job.parser = box.parser if box else None
    _check_fit(job, llm, wanted or 0)
    return job


async def score_job(body: ScoreBody, llm: AsyncLLM) -> Job:
    prompts = await _prompts(llm, body.prompt)
    params = SamplingParams(max_tokens=1, prompt_logprobs=body.top_logprobs or 0)
    job = Job(prompts, params, 1, chat=False, kind="score", top_logprobs=body.top_logprobs or 0, options=_options(body))
    _check_fit(job, llm, 0)
    return job


_SAME = (
    "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "min_p", "typical_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens",
)  # fmt: skip


def _params(body: Body, **own: Any) -> SamplingParams:
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else body.top_k
    if body.include_stop_str_in_output is not None:
        given["include_stop"] = body.include_stop_str_in_output
    if body.stop:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.logit_bias:
        if len(body.logit_bias) > MAX_BIASES:
            raise Fault(400, f"logit_bias has {len(body.logit_bias)} entries; at most {MAX_BIASES} can be given",
                        param="logit_bias")  # fmt: skip
        if not all(_TOKEN_ID.fullmatch(token) for token in body.logit_bias):
            raise Fault(400, "logit_bias must map token ids to numbers", param="logit_bias")
        given["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return SamplingParams(**{**given, "grammar": grammar_of(body), **own})


def _options(body: Body | ScoreBody) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if body.priority is not None:
        options["priority"] = body.priority
    if body.deadline_ms is not None:
        if not 0 < body.deadline_ms <= MAX_DEADLINE_MS or not math.isfinite(body.deadline_ms):
            raise Fault(
                400, f"deadline_ms must be above 0 and at most {MAX_DEADLINE_MS}, got {body.deadline_ms}",
                param="deadline_ms",
            )  # fmt: skip
        options["deadline"] = body.deadline_ms / 1000
    if body.cache_salt is not None:
        options["salt"] = body.cache_salt
    return options


def _common(body: Body) -> dict[str, Any]:
    if body.stream_options is not None and not body.stream:
        raise Fault(400, "stream_options needs stream to be true", param="stream_options")
    shown = body.stream_options or StreamOptions()
    return {
        "options": _options(body),
        "stream": bool(body.stream),
        "include_usage": shown.include_usage,
        "continuous_usage": shown.continuous_usage_stats,
        "token_ids": bool(body.return_token_ids),
    }


async def _prompts(llm: AsyncLLM, given: Prompts) -> list[list[int]]:
    encode = llm.ready().prompt_ids
    kinds = {type(item) for item in given} if isinstance(given, list) else set()
    if len(kinds) > 1:
        raise Fault(400, "prompt must be a text, token ids, or a list of either; these are mixed", param="prompt")
    many: list[Any] = [given] if isinstance(given, str) or kinds == {int} else list(given)
    if not 1 <= len(many) <= MAX_PROMPTS:
        raise Fault(400, f"prompt must hold from 1 to {MAX_PROMPTS} prompts, got {len(many)}", param="prompt")
    for index, prompt in enumerate(many):
        if not prompt:
            raise Fault(400, f"prompt {index} is empty; give at least one token", param="prompt")
        check_length(llm, len(prompt), 1 if isinstance(prompt, list) else CHARACTERS_PER_TOKEN, "prompt")
    return [await _encode(encode, prompt, len(prompt)) for prompt in many]


def conversation_size(messages: Sequence[Any], tools: Sequence[Any] = ()) -> int:
    """Bytes of a conversation as JSON: all that a template could write."""
    return len(msgspec.json.encode([messages, tools]))


def check_length(llm: AsyncLLM, length: int, per_token: int, param: str) -> None:
    """Refuse what cannot fit before any work is done on it."""
    if length > (most := llm.config.max_context * per_token):
        unit = "tokens" if per_token == 1 else "characters"
        raise Fault(
            400,
            f"this model's context is {llm.config.max_context} tokens, at most {most} {unit}; the prompt has {length}",
            code="context_length_exceeded",
            param=param,
        )


async def _encode(encode: Callable[[Any], list[int]], what: Any, size: int) -> list[int]:
    """Long texts are encoded in a thread; for short ones the way there costs more than the work."""
    return encode(what) if size <= LONG_TEXT else await asyncio.to_thread(encode, what)


def _check_fit(job: Job, llm: AsyncLLM, asked: int) -> None:
    context = llm.config.max_context
    if len(job.prompts) * job.choices > MAX_PROMPTS:
        raise Fault(
            400, f"{len(job.prompts)} prompts times n = {job.choices} is more than {MAX_PROMPTS} choices", param="n"
        )
    for prompt in job.prompts:
        if len(prompt) + max(asked, int(job.kind == "generate")) > context:
            raise Fault(
                400,
                f"this model's context is {context} tokens; the prompt has {len(prompt)}, {asked} more are wanted",
                code="context_length_exceeded",
                param="messages" if job.chat else "prompt",
            )
    entries = logprob_entries(job)
    if entries > MAX_LOGPROB_ENTRIES:
        raise Fault(
            400,
            f"{entries} log-probabilities may come of this request, and {MAX_LOGPROB_ENTRIES} is the most; ask for "
            "fewer, for fewer tokens or for fewer samples",
            param="logprobs",
        )
    of_prompts = _prompt_entries(job)
    if job.stream and of_prompts > MAX_STREAMED_ENTRIES:
        raise Fault(
            400,
            f"the prompt's {of_prompts} log-probabilities are more than the {MAX_STREAMED_ENTRIES} that are streamed; "
            "ask for fewer, or for the answer as a whole",
            param="logprobs",
        )


def _prompt_entries(job: Job) -> int:
    params = job.params
    return 0 if params.prompt_logprobs is None else sum(map(len, job.prompts)) * (params.prompt_logprobs + 1)


def logprob_entries(job: Job) -> int:
    """The most (token, log-probability) pairs that a job can bring."""
    params, of_prompts = job.params, _prompt_entries(job)
    generated = job.sequences * params.max_tokens if job.kind == "generate" else 0
    return of_prompts + (0 if params.logprobs is None else generated * (params.logprobs + 1))
