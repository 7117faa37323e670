"""The routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from .. import __version__
from ..errors import ConfigError, HeadraceError
from . import page
from .bodies import (
    CHARACTERS_PER_TOKEN,
    MAX_STREAMED_ENTRIES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    Job,
    LoadBody,
    ScaleBody,
    ScoreBody,
    TokenizeBody,
    chat_job,
    check_length,
    completion_job,
    conversation_size,
    logprob_entries,
    parse,
    score_job,
)
from .embeddings import embedding_answer, embedding_texts
from .exchange import Exchange
from .faults import Fault, deadline_fault, left, stage_fault
from .gate import Call, Gate
from .keys import Keys
from .live import Live
from .metrics import Metrics
from .models import Models, Served
from .options import ServeOptions
from .replies import Replies, dumps
from .spans import Spans
from .stages import describe, outline
from .stream import EventStream

log = logging.getLogger("headrace.serve")

MAX_TIMELINE_SECONDS = 60
MAX_TIMELINE = 10_000  # steps and spans of a timeline
BODIES_AT_ONCE = 16  # of the largest size, that may be on their way together


class Streamed(Response):
    """A response that an EventStream sends."""

    def __init__(self, stream: EventStream) -> None:
        self.stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        call: Call = scope["headrace.call"]
        fault = await self.stream.send(receive, send)
        call.note(gone=self.stream.gone)
        if fault is not None:
            raise fault


class Server:
    """The application's state, and its handlers."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.models = Models(self.metrics, options.settings() | {"max_restarts": options.max_restarts})
        self.live = Live(self.metrics, self.models)
        self.streams: set[EventStream] = set()
        self.calls: set[Call] = set()
        self.keys = Keys(options.api_key_file) if options.api_key_file else None
        self.admin_keys = Keys(options.admin_key_file) if options.admin_key_file else None
        self.spans: Spans | None = None
        self.draining = False
        self._unread = 0  # bytes of bodies that are not whole yet
        self._key_trouble = ""  # told once
        self.started = time.time()

    def app(self) -> Gate:
        """The ASGI application."""
        routes = [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/score", self.score, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics_text),
            Route("/version", self.version),
            Route("/openapi.json", self.openapi),
            Route("/admin/load", self.load, methods=["POST"]),
            Route("/admin/unload", self.unload, methods=["POST"]),
            Route("/admin/scale", self.scale, methods=["POST"]),
            Route("/admin/timeline", self.timeline),
            *self.live.routes(),
            *page.routes(),
        ]
        return Gate(Router(routes, redirect_slashes=False), self)

    # Generation

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._body(request))
        served = self._taking(body.model)
        return await self._run(request, served, await chat_job(body, served.llm, self.options.tool_parser))

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._body(request))
        served = self._taking(body.model)
        return await self._run(request, served, await completion_job(body, served.llm))

    async def score(self, request: Request) -> Response:
        body = parse(ScoreBody, await self._body(request))
        served = self._taking(body.model)
        exchange = await self._whole(request, served, await score_job(body, served.llm))
        return await _written(exchange.job, exchange.scores)

    async def embeddings(self, request: Request) -> Response:
        body = parse(EmbeddingBody, await self._body(request))
        served = self._taking(body.model)
        encoder = served.encoder
        texts = await embedding_texts(body, encoder)
        call: Call = request.scope["headrace.call"]
        call.note(model=served.name, texts=len(texts), prompt_tokens=sum(map(len, texts)))
        self._check_room(served, 1)
        leaving = asyncio.create_task(_left(request))
        answering = asyncio.create_task(embedding_answer(body, encoder, texts, served.name))
        try:
            limit = self.options.request_timeout or None
            await asyncio.wait([leaving, answering], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answer = answering.result()
            elif leaving.done():
                call.note(gone="the client has left")
                raise left()
            else:
                raise deadline_fault()
        finally:
            answering.cancel()
            leaving.cancel()
        served.collector.embedded(texts, time.monotonic() - call.began)
        return _json(answer)

    async def _run(self, request: Request, served: Served, job: Job) -> Response:
        if not job.stream:
            exchange = await self._whole(request, served, job)
            return await _written(job, exchange.answer)
        exchange = self._exchange(request, served, job)
        call: Call = request.scope["headrace.call"]
        stream = EventStream(exchange, request.scope)
        call.at_end += [exchange.end, partial(self.streams.discard, stream)]
        exchange.start()
        self.streams.add(stream)
        return Streamed(stream)

    async def _whole(self, request: Request, served: Served, job: Job) -> Exchange:
        """Run a job to its end, unless the client leaves."""
        exchange = self._exchange(request, served, job)
        leaving = asyncio.create_task(_left(request))
        ending = asyncio.create_task(exchange.done.wait())
        try:
            exchange.start()
            await asyncio.wait([leaving, ending], return_when=asyncio.FIRST_COMPLETED)
            if not exchange.done.is_set():
                request.scope["headrace.call"].note(gone="the client has left")
                raise left()
            if exchange.fault is not None:
                raise exchange.fault
            return exchange
        finally:
            exchange.end()
            leaving.cancel()
            ending.cancel()

    def _exchange(self, request: Request, served: Served, job: Job) -> Exchange:
        """Admission: a place in the queue, or Fault 429."""
        self._check_room(served, job.sequences)
        if self.options.request_timeout:
            job.options.setdefault("deadline", self.options.request_timeout)
        call: Call = request.scope["headrace.call"]
        exchange = Exchange(job, served.llm, Replies(job, served.name, served.llm.tokenizer, call.id), served.collector)
        call.exchange = exchange
        return exchange

    def _check_room(self, served: Served, sequences: int) -> None:
        """Fault 429 where the queue has no place for them."""
        capacity, live = served.capacity(self.options.max_queue), served.engine.live
        if sequences > capacity:
            raise Fault(400, f"{sequences} sequences are more than this server ever holds ({capacity})", param="n")
        if sequences > capacity - live:
            served.collector.refused.inc()
            raise Fault(
                429, f"the queue is full ({live} sequences); try again later", code="queue_full",
                headers={"Retry-After": str(self._retry_after(served))},
            )  # fmt: skip

    def _retry_after(self, served: Served) -> int:
        """Seconds until a place in the queue should be free, at the pace of late."""
        pace = served.collector.pace()  # requests that ended, a second
        return min(60, max(1, round(self.options.max_queue / 4 / pace))) if pace else 5

    def _taking(self, name: str | None) -> Served:
        if self.draining:
            raise Fault(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        served = self.models.usable(name)
        if served.status is not None and served.status.lost_policy == "fail" and served.lost_stage is not None:
            raise stage_fault(served.lost_stage)
        return served

    async def _body(self, request: Request) -> bytes:
        """The whole body, of a bounded size, in a bounded time. After a Fault the rest of it is not read."""
        limit, seconds = self.options.max_body_bytes, self.options.body_timeout
        close = {"Connection": "close"}
        too_large = Fault(413, f"the body is larger than {limit} bytes", code="body_too_large", headers=close)
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        encoding = request.headers.get("content-encoding", "identity")
        framing = request.headers.get("transfer-encoding", "chunked")
        if encoding.lower() != "identity" or framing.lower() != "chunked":
            raise Fault(415, "bodies must not be compressed", code="unsupported_encoding", headers=close)
        data = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for piece in request.stream():
                    data += piece
                    self._unread += len(piece)
                    if len(data) > limit:
                        raise too_large
                    if self._unread > BODIES_AT_ONCE * limit:
                        raise Fault(503, "too many large bodies are on their way; try again later", code="busy",
                                    headers=close | {"Retry-After": "2"})  # fmt: skip
        except TimeoutError:
            raise Fault(
                408, f"the body did not come within {seconds:g} s", code="request_timeout", headers=close
            ) from None
        except ClientDisconnect:
            raise left() from None
        finally:
            self._unread -= len(data)
        return bytes(data)

    # Tokens

    async def tokenize(self, request: Request) -> Response:
        body = parse(TokenizeBody, await self._body(request))
        llm = self.models.usable(body.model).llm
        if (body.prompt is None) == (body.messages is None):
            raise Fault(400, "give either prompt or messages", param="prompt")
        size = conversation_size(body.messages) if body.messages is not None else len(body.prompt or "")
        check_length(llm, size, CHARACTERS_PER_TOKEN, "messages" if body.messages is not None else "prompt")
        if body.messages is not None:
            ids = await asyncio.to_thread(llm.ready().chat_ids, body.messages)
        else:
            text, tokenizer = body.prompt or "", llm.tokenizer
            special = tokenizer.token_id(text) in tokenizer.special_ids  # a prompt that is nothing but its name
            ids = await asyncio.to_thread(
                tokenizer.encode, text, add_special=body.add_special_tokens, parse_special=special
            )
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": llm.config.max_context, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [llm.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids]
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        body = parse(DetokenizeBody, await self._body(request))
        llm = self.models.usable(body.model).llm
        for token in body.tokens:
            if not 0 <= token < llm.spec.vocab_size:
                raise Fault(400, f"token ids go from 0 to {llm.spec.vocab_size - 1}, got {token}", param="tokens")
        return _json({"prompt": await asyncio.to_thread(llm.tokenizer.decode, body.tokens, False)})

    async def tokenizer_info(self, request: Request) -> Response:
        llm = self.models.usable(request.query_params.get("model")).llm
        tokenizer = llm.tokenizer

        def name(token: int | None) -> str | None:
            return None if token is None else tokenizer.token_bytes(token).decode("utf-8", "replace")

        return _json(
            {
                "vocab_size": llm.spec.vocab_size,
                "model_max_length": llm.config.max_context,
                "bos_token": name(tokenizer.bos_id),
                "bos_token_id": tokenizer.bos_id,
                "eos_token": name(next(iter(tokenizer.eos_ids), None)),
                "eos_token_ids": list(tokenizer.eos_ids),
                "add_bos_token": tokenizer.add_bos,
                "chat_template": tokenizer.chat_template,
                "special_tokens": {name(token): token for token in sorted(tokenizer.special_ids)},
            }
        )

    # Operation

    def reload_keys(self) -> None:
        """Read key files that have changed. Where one is not usable, the keys of before stay in force."""
        for keys in (self.keys, self.admin_keys):
            try:
                if keys is not None and keys.reload():
                    log.info("keys reloaded")
            except ConfigError as error:
                if str(error) != self._key_trouble:
                    self._key_trouble = str(error)
                    log.error("keys not reloaded", extra={"facts": {"error": str(error)}})

    async def list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card(served) for served in self.models.served.values()]})

    async def one_model(self, request: Request) -> Response:
        return _json(self._card(self.models.find(request.path_params["name"])))

    def _card(self, served: Served) -> dict[str, Any]:
        card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "headrace"}
        if served.state == "ready":
            card["max_model_len"] = served.max_model_len
        return {**card, "state": served.condition}

    async def health(self, request: Request) -> Response:
        """200 while every model's engine makes progress and every stage has a replica; what is wrong otherwise. Open to
        all, so it names no model."""
        every = list(self.models.served.values())
        states = [served.state for served in every]
        worst = next((s for s in ("dead", "closed", "stalled", "restarting", "loading", "new") if s in states), "ok")
        if worst == "ok":
            worst = next((served.condition for served in every if served.lost_stage), "ok")
        answer: dict[str, Any] = {"status": worst}
        for served in every:
            if served.status is not None:
                for name, entries in outline(served.status).items():
                    answer.setdefault(name, []).extend(entries)
        return _json(answer, 200 if worst == "ok" and states else 503)

    async def ready(self, request: Request) -> Response:
        states = {served.name: served.condition for served in self.models.served.values()}
        fine = bool(states) and not self.draining and all(state == "ready" for state in states.values())
        status = "draining" if self.draining else "ready" if fine else "not ready"
        return _json({"status": status, "models": states}, 200 if fine else 503)

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def openapi(self, request: Request) -> Response:
        from .openapi import document

        return _json(document())

    async def load(self, request: Request) -> Response:
        body = parse(LoadBody, await self._body(request))
        try:
            served = await self.models.load(body.model, body.name)
        except HeadraceError as error:
            raise Fault(400, str(error), code="model_not_loaded", param="model") from None
        return _json(self._card(served))

    async def unload(self, request: Request) -> Response:
        body = parse(LoadBody, await self._body(request))
        await self.models.unload(body.name or body.model)
        return _json({"unloaded": body.name or body.model})

    async def scale(self, request: Request) -> Response:
        """Answers with how the stages stand: replicas that are to come are starting, those that are to go leaving."""
        body = parse(ScaleBody, await self._body(request))
        served = self.models.usable(body.model)
        try:
            status = await served.llm.scale(body.stage, body.replicas)
        except ConfigError as error:
            raise Fault(400, str(error), code="invalid_value") from None
        return _json({"model": served.name, "stages": describe(status)})

    async def timeline(self, request: Request) -> Response:
        """A trace of the last seconds in Chrome's format, written beside the event loop."""
        seconds = _seconds(request.query_params.get("seconds", "10"))
        served = self.models.usable(request.query_params.get("model"))
        recent = await served.llm.recent(seconds, MAX_TIMELINE)
        plan = served.llm.config.plan

        def written() -> bytes:
            from ..plan.plan import Plan
            from ..workers.timeline import timeline

            return dumps(timeline(recent.steps, recent.spans, recent.marks, Plan.parse(plan) if plan else None))

        headers = {"content-disposition": 'attachment; filename="timeline.json"', "cache-control": "no-store"}
        return Response(await asyncio.to_thread(written), headers=headers, media_type="application/json")


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _seconds(text: str) -> float:
    try:
        seconds = float(text[:20])
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMELINE_SECONDS:
        raise Fault(400, f"seconds must be a number above 0 and up to {MAX_TIMELINE_SECONDS}", param="seconds")
    return seconds


async def _written(job: Job, answer: Callable[[], dict[str, Any]]) -> Response:
    """A whole answer; one of many log-probabilities is written in a thread, so that nobody waits for it."""
    if logprob_entries(job) <= MAX_STREAMED_ENTRIES:
        return _json(answer())
    return Response(await asyncio.to_thread(lambda: dumps(answer())), media_type="application/json")


def _json(content: Any, status: int = 200) -> Response:
    return Response(dumps(content), status, media_type="application/json")
