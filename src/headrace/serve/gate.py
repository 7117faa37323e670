"""What every request passes: an id of the server's own, the key, errors in OpenAI's shape, and a line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import Fault, fault_of
from .replies import new_request_id

if TYPE_CHECKING:
    from .app import Server
    from .exchange import Exchange

log = logging.getLogger("headrace.serve")
OPEN = frozenset({"/health"})  # what needs no key


class Call:
    """One HTTP request, for the log."""

    def __init__(self, scope: Scope) -> None:
        self.id, self.began = new_request_id(), time.monotonic()
        self.method, self.path = scope["method"], scope["path"]
        self.status = 0
        self.exchange: Exchange | None = None
        self.at_end: list[Callable[[], None]] = []
        self._notes: dict[str, Any] = {}

    def headers(self) -> dict[str, str]:
        return {"x-request-id": self.id}

    def note(self, **notes: Any) -> None:
        self._notes |= {name: value for name, value in notes.items() if value is not None}

    def facts(self) -> dict[str, Any]:
        facts = {"id": self.id, "method": self.method, "path": self.path[:200], "status": self.status}
        facts |= {"seconds": round(time.monotonic() - self.began, 4), **self._notes}
        if (exchange := self.exchange) is not None:
            facts |= {
                "model": exchange.replies.model,
                "sequences": exchange.job.sequences,
                "prompt_tokens": sum(map(len, exchange.job.prompts)),
                "generated": exchange.tokens,
            }
            if exchange.running:
                facts |= {"engine_ids": [running.id for running in exchange.running[:8]], **exchange.timings()}
        return facts


class Gate:
    """ASGI around the application."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        call = scope["headrace.call"] = Call(scope)
        scope["app"] = self  # the router raises for what it has not, and does not answer by itself

        async def start(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, start)
        except Exception as error:
            if call.status:  # the answer has begun: nothing more can be said
                log.exception("failed after the answer began", extra={"facts": call.facts()})
                raise
            fault = error if isinstance(error, Fault) else fault_of(error)
            if isinstance(error, HTTPException):
                fault = Fault(error.status_code, error.detail)
            if fault.status == 500:
                log.error("failed", extra={"facts": call.facts()}, exc_info=error)
            await Response(fault.body(), fault.status, fault.headers, "application/json")(scope, receive, start)
        finally:
            for action in call.at_end:
                action()
            self._server.metrics.answers.labels(call.method, known_path(scope), str(call.status)).inc()
            log.info("request", extra={"facts": call.facts()})


def known_path(scope: Scope) -> str:
    """The route's path, so that the paths that strangers try do not become metrics."""
    route = scope.get("route")
    return getattr(route, "path", None) or "other"
