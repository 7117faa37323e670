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
ADMIN = "/admin/"


class Call:
    """One HTTP request, for the log."""

    def __init__(self, scope: Scope) -> None:
        self.id, self.began = new_request_id(), time.monotonic()
        self.method, self.path = scope["method"], scope["path"]
        self.status = 0
        self.exchange: Exchange | None = None
        self.at_end: list[Callable[[], None]] = []
        self._notes: dict[str, Any] = {}

    def note(self, **notes: Any) -> None:
        """Add to the log's line what is not None."""
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
            if exchange.fault is not None:
                facts["fault"] = exchange.why
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
        extra = [(b"x-request-id", call.id.encode())]

        async def start(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            try:
                await send(message)
            except RuntimeError:  # of a transport that was closed while this was on its way: the client has left
                if not scope.get("headrace.lost", bool)():
                    raise

        self._server.calls.add(call)
        try:
            preflight = self._admit(scope, extra)
            await (preflight or self._app)(scope, receive, start)
        except Exception as error:
            if call.status:  # the answer has begun: nothing more can be said
                log.exception("failed after the answer began", extra={"facts": call.facts()})
                if abort := scope.get("headrace.abort"):
                    abort()
                return
            await self._answer(call, error)(scope, receive, start)
        finally:
            scope.get("headrace.lost", bool)()  # what was cut off meanwhile is no answer that we owe
            self._server.calls.discard(call)
            for action in call.at_end:
                action()
            route = known_path(scope)
            self._server.metrics.answers.labels(call.method, route, str(call.status)).inc()
            log.info("request", extra={"facts": call.facts()})
            if self._server.spans is not None:
                self._server.spans.note(call, route, scope["headers"])

    def _answer(self, call: Call, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            message = f"{call.method} {call.path[:200]}: {error.detail.lower()}"
            error = Fault(error.status_code, message, headers=dict(error.headers or {}))
        fault = fault_of(error)
        if fault.status == 500 and not isinstance(error, Fault):
            log.error("failed", extra={"facts": call.facts()}, exc_info=error)
        return Response(fault.body(), fault.status, fault.headers, "application/json")

    def _admit(self, scope: Scope, extra: list[tuple[bytes, bytes]]) -> Response | None:
        """Raise a Fault for who may not come in; the answer to a browser's preflight, which carries no key. The path
        is the scope's: what the routes will see."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and (preflight := self._cross_origin(scope, headers, origin, extra)):
            return preflight
        path = scope["path"]
        keys = self._server.admin_keys if path.startswith(ADMIN) else self._server.keys
        if path.startswith(ADMIN) and keys is None:
            raise Fault(403, "admin routes are off; start the server with --admin-key-file", code="admin_off")
        if keys is not None and path not in OPEN and not keys.admits(headers.get(b"authorization", b"")):
            challenge = "Basic" if path == "/" else "Bearer"
            raise Fault(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                        headers={"WWW-Authenticate": f'{challenge} realm="headrace"'})  # fmt: skip
        return None

    def _cross_origin(
        self, scope: Scope, headers: dict[bytes, bytes], origin: bytes, extra: list[tuple[bytes, bytes]]
    ) -> Response | None:
        """Pages of other origins get in only where they were named: a browser would otherwise let any page spend this
        machine's time, whoever may read the answer."""
        allowed = self._server.options.cors_origins
        if origin.decode("latin-1") in allowed or "*" in allowed:
            extra += [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                allow = {
                    "access-control-allow-methods": "GET, POST",
                    "access-control-allow-headers": "authorization, content-type",
                    "access-control-max-age": "600",
                }
                return Response(b"", 204, allow)
            return None
        if origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower():
            return None
        raise Fault(403, "pages of another origin are not let in; see --cors-origin", code="cross_origin")


def known_path(scope: Scope) -> str:
    """The route's path, so that the paths that strangers try do not become metrics."""
    route = scope.get("route")
    return getattr(route, "path", None) or "other"
