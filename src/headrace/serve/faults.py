"""What goes wrong, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import msgspec

from ..errors import (
    CapacityError,
    EngineDeadError,
    HeadraceError,
    RequestError,
    StageLostError,
    TemplateError,
)


class Fault(Exception):
    """An answer that is an error. `message` is shown to the client: it names what the client sent, never internals."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def fault_of(error: BaseException) -> Fault:
    """What a client is told of an error. Unknown ones are told as such: their text may name internals."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, CapacityError):
        return Fault(400, str(error), code="context_length_exceeded")
    if isinstance(error, (RequestError, TemplateError)):
        return Fault(400, str(error), code="invalid_value")
    if isinstance(error, StageLostError):
        return stage_fault(str(error).partition(" has")[0])
    if isinstance(error, EngineDeadError):
        return Fault(503, "the model's engine is not running; try again later", code="engine_dead")
    if isinstance(error, RecursionError):
        return Fault(400, "the request nests too deeply", code="invalid_json")
    if isinstance(error, HeadraceError):
        return Fault(500, "the model cannot do this now", code=type(error).__name__)
    return Fault(500, "internal error; the server's log has it under this request's id", code="internal_error")


def left() -> Fault:
    return Fault(499, "the client has left", code="client_left")


def deadline_fault() -> Fault:
    return Fault(408, "the request's deadline passed before it was complete", code="deadline_exceeded")


def stage_fault(stage: str) -> Fault:
    message = f"{stage} of the model has no replica now; it is being started again, try again soon"
    return Fault(503, message, code="stage_lost", headers={"Retry-After": "2"})
