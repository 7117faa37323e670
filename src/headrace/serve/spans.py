"""OpenTelemetry spans, where they are asked for: one a request, with its queueing, prefill and decoding inside."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

    from .gate import Call

STANDARD = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_SECONDS = 2.0  # for which spans may leave when the server ends


def spans_for(endpoint: str | None) -> Spans | None:
    """Send spans to a collector by OTLP over HTTP, where an endpoint is given here or by OpenTelemetry's own
    variables, which also say the rest (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and others). Nothing of it is imported
    otherwise. ConfigError where its packages are missing."""
    if endpoint is None and not any(os.environ.get(name) for name in STANDARD):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"spans are asked for (--otel-endpoint or {' or '.join(STANDARD)}), and {error.name} is not installed; "
            "pip install 'headrace[otel]'"
        ) from None
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces") if endpoint else OTLPSpanExporter()
    return Spans(BatchSpanProcessor(exporter))


class Spans:
    """Makes spans of requests that have ended, under the caller's own where it names one (W3C traceparent)."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "headrace"}
        resource = Resource.create({**named, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("headrace", __version__)
        self._extract = TraceContextTextMapPropagator().extract

    def note(self, call: Call, route: str, headers: list[tuple[bytes, bytes]]) -> None:
        """A request is over. Times of several sequences are those of the slowest."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name in _CARRIED}
        zero = time.time_ns() - time.monotonic_ns()  # of the clock that calls are timed by

        def at(seconds: float) -> int:
            return zero + int(seconds * 1e9)

        span = self._tracer.start_span(
            f"{call.method} {route}", self._extract(carrier), SpanKind.SERVER, _attributes(call, route),
            start_time=at(call.began),
        )  # fmt: skip
        if call.status >= 500:
            span.set_status(StatusCode.ERROR, call.exchange.why if call.exchange else "")
        if call.exchange is not None and call.exchange.running and span.is_recording():
            timings, start = call.exchange.timings(), call.exchange.began
            inside = set_span_in_context(span)
            for phase in ("queue", "prefill", "decode"):
                end = start + timings[f"{phase}_ms"] / 1000
                self._tracer.start_span(phase, inside, start_time=at(start)).end(at(end))
                start = end
        span.end(time.time_ns())

    def close(self) -> None:
        """Send what is left, in bounded time."""
        sending = threading.Thread(target=self._provider.shutdown, name="headrace-spans", daemon=True)
        sending.start()
        sending.join(FLUSH_SECONDS)


_CARRIED = (b"traceparent", b"tracestate")


def _attributes(call: Call, route: str) -> dict[str, Any]:
    """By OpenTelemetry's semantic conventions for HTTP and generative models, where those have a name."""
    attributes: dict[str, Any] = {
        "http.request.method": call.method,
        "http.route": route,
        "http.response.status_code": call.status,
        "headrace.request_id": call.id,
    }
    if (exchange := call.exchange) is not None:
        attributes |= {
            "gen_ai.request.model": exchange.replies.model,
            "gen_ai.usage.input_tokens": sum(map(len, exchange.job.prompts)),
            "gen_ai.usage.output_tokens": exchange.tokens,
            "headrace.sequences": exchange.job.sequences,
        }
        if exchange.running:
            timings = exchange.timings()
            attributes |= {f"headrace.{name}": timings[name] for name in _TOLD if timings[name] is not None}
    return attributes


_TOLD = ("first_token_ms", "cached_tokens", "preemptions", "engine_restarts", "waited_for")
