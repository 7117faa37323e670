"""The offline door: a language model in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .assemble import EncoderModel, build_embedder, open_any
from .build import build
from .completion import SCORE, Completion, Delta, Output, scored_logits
from .config import Resolved, Settings
from .errors import EngineDeadError, RequestError
from .formats.hub import DEFAULT_MODEL
from .frontend import Frontend, Message, Prompt, Tool
from .grammar.compiled import Grammars
from .processes import uninterrupted
from .types import Event, Kind, SamplingParams

if TYPE_CHECKING:
    from .engine import Engine
    from .text.tokenizer import Tokenizer
    from .workers.embedder import Embedder


class LLM:
    """A model, its tokenizer and an engine. `settings` are the fields of `config.Settings`.

    An encoder has no engine: it has `embed`, and `logits` or `classify` where its head is for that; a model that
    generates has all the others. RequestError says so where they are mixed up.

    Calls from one thread only; streams may be interleaved with other calls. For asyncio, and for an engine in its
    own process, see AsyncLLM. Raises ModelNotFoundError, ModelFileError, UnsupportedModelError, ConfigError or
    CapacityError.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        opened = open_any(str(model))
        self.spec = opened.spec
        made: list[Tokenizer] = []  # instead of `self`: a cycle would keep all weights until garbage is collected
        self._grammars = Grammars(lambda: made[0], opened.spec.vocab_size)
        self._running: tuple[Engine, Resolved] | Embedder
        if isinstance(opened, EncoderModel):
            self._running = build_embedder(opened, Settings(**settings))
        else:
            self._running = build(opened, Settings(**settings), self._grammars)
        self.tokenizer = opened.tokenizer()  # while native threads still pack the weights
        made.append(self.tokenizer)
        self._frontend = Frontend(self.tokenizer, self.spec.vocab_size)
        self._live: dict[str, Completion] = {}
        self._deltas: dict[str, list[Delta]] = {}
        self._closed = False

    @property
    def engine(self) -> Engine:
        """The engine of a model that generates."""
        return self._decoder()[0]

    @property
    def config(self) -> Resolved:
        """What it really runs with."""
        return self._decoder()[1]

    # Doors

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Output]:
        """Complete each prompt (text, or token ids); one Output per prompt, in order. `options`: priority,
        deadline, salt.

        A request that fails alone ends with finish_reason "error" and its sample's `error`; a malformed one raises
        RequestError.
        """
        many = _prompts(prompts)
        each = (
            [params or SamplingParams()] * len(many)
            if params is None or isinstance(params, SamplingParams)
            else list(params)
        )
        if len(each) != len(many):
            raise RequestError(f"{len(each)} sampling params for {len(many)} prompts; give one, or one for each")
        ids = [self._frontend.prompt_ids(prompt) for prompt in many]
        started: list[str] = []
        try:
            for prompt_ids, one in zip(ids, each, strict=True):
                started.append(self._start(prompt_ids, one, **options))
        except BaseException:
            for request_id in started:
                self._cancel(request_id)
            raise
        return self._run(started)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Output:
        """The assistant's answer to a conversation: messages of {"role", "content"}, and "tool_calls" where it called.

        `tools`: what the model may call, [{"type": "function", "function": {"name", "description", "parameters"}}];
        `template_variables`: switches of the model's own chat template, such as {"enable_thinking": False}.
        """
        self._decoder()
        ids = self._frontend.chat_ids(messages, tools, template_variables)
        return self._run([self._start(ids, params or SamplingParams(), **options)])[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[Delta]:
        """Complete one prompt, piece by piece. Leaving the iterator cancels what is left."""
        return self._stream(self._frontend.prompt_ids(prompt), params or SamplingParams(), options)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """`chat`, piece by piece."""
        self._decoder()
        ids = self._frontend.chat_ids(messages, tools, template_variables)
        return self._stream(ids, params or SamplingParams(), options)

    def logits(self, prompt: Prompt) -> np.ndarray:
        """float32 [tokens, vocab]: what the model gives at each position of the prompt.

        An encoder for masked tokens gives what belongs there; give token ids to have masks among them.
        """
        if not isinstance(self._running, tuple):
            return self._encoder("masked").logits(self._whole_texts([prompt], truncate=False))[0]
        ids = self._frontend.prompt_ids(prompt)
        return scored_logits(self._run([self._start(ids, SCORE, kind="score")])[0].samples[0])

    def embed(self, texts: Prompt | Sequence[Prompt], normalize: bool = True, truncate: bool = True) -> np.ndarray:
        """float32 [texts, dim]: what an encoder makes of each text (or token ids), of length 1 if `normalize`.

        Texts of mixed lengths share steps without padding, and each gives the same bytes alone. One of more tokens than
        the model's `spec.context_length` is cut off there, or raises RequestError unless `truncate`.
        """
        embedder = self._encoder()
        return embedder.embed(self._whole_texts(_prompts(texts), truncate), normalize)

    def classify(self, texts: Prompt | Sequence[Prompt], truncate: bool = True) -> np.ndarray:
        """float32 [texts, labels]: logits of each text's class, by an encoder that has such a head; the labels are
        `spec.head.labels`."""
        embedder = self._encoder("classify")
        many = self._whole_texts(_prompts(texts), truncate)
        labels = len(embedder.encoder.spec.head.labels) if embedder.encoder.spec.head else 0
        return np.concatenate([np.empty((0, labels), np.float32), *embedder.logits(many)])

    def close(self) -> None:
        """Cancel what runs and stop the workers."""
        self._closed = True
        for request_id in list(self._live):
            self._cancel(request_id)
        self._grammars.close()
        if isinstance(self._running, tuple):
            self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # How

    def _start(self, prompt_ids: list[int], params: SamplingParams, *, kind: Kind = "generate", **options: Any) -> str:
        if self._closed:
            raise EngineDeadError("this LLM was closed; make a new one")
        engine = self.engine
        requests = self._frontend.requests(prompt_ids, params, kind=kind, **options)
        if params.grammar is not None:
            self._grammars.compile(params.grammar)
        request_id = requests[0].id
        self._live[request_id] = Completion(
            prompt_ids, params, self.tokenizer, lambda index: self._stop(request_id, index)
        )
        try:
            for request in requests:
                engine.add(request)
        except BaseException:
            self._cancel(request_id)
            raise
        return request_id

    def _encoder(self, task: Literal["masked", "classify"] | None = None) -> Embedder:
        """What runs the encoder, if the model is one and has a head for the task."""
        if self._closed:
            raise EngineDeadError("this LLM was closed; make a new one")
        if isinstance(self._running, tuple):
            raise RequestError(f"{self.spec.name} generates text and embeds none; take an encoder, such as minilm")
        head = self._running.encoder.spec.head
        if task is not None and (head is None or head.task != task):
            has = "no head" if head is None else f"a head for {_TASKS[head.task]}"
            raise RequestError(f"{self.spec.name} has {has}; this needs one for {_TASKS[task]}")
        return self._running

    def _decoder(self) -> tuple[Engine, Resolved]:
        if not isinstance(self._running, tuple):
            raise RequestError(f"{self.spec.name} is an encoder: it embeds texts (embed) and generates none")
        return self._running

    def _whole_texts(self, texts: Sequence[Prompt], truncate: bool) -> list[list[int]]:
        """Token ids of texts that an encoder takes whole. What is cut off stands before the token that ends a text."""
        limit, many = self.spec.context_length, [self._frontend.prompt_ids(text) for text in texts]
        ends = len(self.tokenizer.encode("")) // 2  # as many as the tokenizer puts before a text it puts behind it
        for index, (ids, text) in enumerate(zip(many, texts, strict=True)):
            if not ids or min(ids) < 0 or max(ids) >= self.spec.vocab_size:
                last = self.spec.vocab_size - 1
                raise RequestError(f"text {index} has no tokens, or ids that are not from 0 to {last}")
            if len(ids) > limit and not (truncate and isinstance(text, str)):
                raise RequestError(f"text {index} has {len(ids)} tokens, and the model takes {limit}; shorten it")
            if len(ids) > limit:
                many[index] = ids[: limit - ends] + ids[len(ids) - ends :]
        return many

    def _run(self, request_ids: list[str]) -> list[Output]:
        live = [self._live[request_id] for request_id in request_ids]
        try:
            with uninterrupted() as deliver:  # once: it costs as much as a tenth of a step's host work
                while not all(completion.done for completion in live):
                    self._step()
                    deliver()
        finally:
            for request_id in request_ids:
                self._cancel(request_id)
        return [completion.output for completion in live]

    def _stream(self, prompt_ids: list[int], params: SamplingParams, options: dict[str, Any]) -> Iterator[Delta]:
        request_id = self._start(prompt_ids, params, **options)
        completion = self._live[request_id]
        deltas = self._deltas[request_id] = []
        try:
            while deltas or not completion.done:
                if deltas:
                    yield deltas.pop(0)
                else:
                    with uninterrupted():
                        self._step()
            if errors := [sample.error for sample in completion.output.samples if sample.error is not None]:
                raise RequestError(errors[0])
        finally:
            del self._deltas[request_id]
            self._cancel(request_id)

    def _step(self) -> None:
        """One step of the engine; its events go to whom they belong. Ctrl-C must wait until both is done: a step that
        is taken from the queue and not applied would be lost to everyone."""
        if self._closed or not self.engine.busy:
            raise EngineDeadError("the engine was closed, or has nothing left to do, before the request ended")
        for event in self.engine.step():
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        completion = self._live.get(event.request_id)
        if completion is None:
            return
        deltas = self._deltas.get(event.request_id)
        delta = completion.push(event, shown=deltas is not None)
        if delta is not None and deltas is not None:
            deltas.append(delta)

    def _stop(self, request_id: str, sample_index: int) -> Event | None:
        """End a sample whose stop string has appeared. Its sequence may have ended by itself in the same step."""
        events = self.engine.finish(request_id, sample_index, "stop")
        return events[0] if events else None

    def _cancel(self, request_id: str) -> None:
        if self._live.pop(request_id, None):
            self.engine.finish(request_id)


_TASKS = {"masked": "masked tokens", "classify": "classes"}


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, also where one was given."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and all(isinstance(item, (int, np.integer)) for item in many) else many
