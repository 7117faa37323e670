"""OpenTelemetry spans: what they say, where they go, and that nothing of it is there unless asked for."""

from __future__ import annotations

import asyncio
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.serve.harness import ServerProcess

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace.errors import ConfigError
from headrace.serve.app import Server
from headrace.serve.options import ServeOptions
from headrace.serve.spans import STANDARD, Spans, spans_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


async def status_of(app: Any, method: str, path: str, body: Any = None, traceparent: str = "") -> int:
    """Of one request, without a socket."""
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
    statuses: list[int] = []

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"traceparent", traceparent.encode("latin-1"))] if traceparent else []
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    await app(scope, incoming.get, send)
    return statuses[0]


async def test_one_span_a_request_with_its_phases(tiny_model: str) -> None:
    exporter = InMemorySpanExporter()
    server = Server(ServeOptions(models=(tiny_model,), engine={"threads": 1}))
    server.spans = Spans(SimpleSpanProcessor(exporter))
    await server.models.load(tiny_model, "tiny")
    try:
        app = server.app()
        assert await status_of(app, "POST", "/v1/completions", BODY, TRACEPARENT) == 200
        assert await status_of(app, "POST", "/v1/completions", {"prompt": ""}) == 400
        assert await status_of(app, "GET", "/v1/models/none", traceparent="00-junk-\xff-01") == 404
    finally:
        await server.models.close()
    spans: Any = exporter.get_finished_spans()
    *phases, request, refused, missing = spans
    assert request.name == "POST /v1/completions" and f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None and f"{request.parent.span_id:016x}" == PARENT
    told = request.attributes
    assert told["http.response.status_code"] == 200 and told["gen_ai.usage.input_tokens"] == 3
    assert told["gen_ai.usage.output_tokens"] == 4 and told["gen_ai.request.model"] == "tiny"
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    edges = [request.start_time, *(edge for phase in phases for edge in (phase.start_time, phase.end_time))]
    assert edges == sorted(edges), "one after another, inside the request"
    assert edges[-1] <= request.end_time and all(phase.parent.span_id == request.context.span_id for phase in phases)
    assert refused.attributes["http.response.status_code"] == 400 and refused.parent is None
    assert missing.name == "GET /v1/models/{name:path}" and missing.parent is None


class Collector(http.server.BaseHTTPRequestHandler):
    """Keeps the names of the spans that come."""

    names: list[str]

    def do_POST(self) -> None:
        message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/traces"
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                self.names += [span.name for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_spans_reach_a_collector(tiny_model: str, tmp_path: Path) -> None:
    names: list[str] = []
    handler = type("Kept", (Collector,), {"names": names})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{collector.server_address[1]}"
        with ServerProcess(tiny_model, "--threads", "1", "--otel-endpoint", url, log=tmp_path / "log") as server:
            assert server.post("/v1/completions", BODY)[0] == 200
        collector.shutdown()
    assert sorted(names) == ["POST /v1/completions", "decode", "prefill", "queue"]


def test_a_collector_that_is_not_there_stops_nothing(tiny_model: str, tmp_path: Path) -> None:
    flags = ["--threads", "1", "--otel-endpoint", "http://127.0.0.1:9"]
    with ServerProcess(tiny_model, *flags, log=tmp_path / "log") as server:
        assert server.post("/v1/completions", BODY)[0] == 200
        assert server.stop(seconds=10) == 0


def test_nothing_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STANDARD:
        monkeypatch.delenv(name, raising=False)
    assert spans_for(None) is None
    code = "import sys, headrace.serve.run; print([name for name in sys.modules if 'opentelemetry' in name])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"headrace\[otel\]"):
        spans_for("http://127.0.0.1:4318")
    with pytest.raises(ConfigError, match="otel-endpoint"):
        ServeOptions(otel_endpoint="collector:4318")
