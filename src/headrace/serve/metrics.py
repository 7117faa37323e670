"""What the server knows of itself: Prometheus metrics, and a feed of steps and requests for whoever watches live."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from ..workers.wire import Report, Status
from .outbox import Outbox
from .stages import Stages

if TYPE_CHECKING:
    from .exchange import Exchange
    from .logs import JsonHandler

log = logging.getLogger("headrace.serve")

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
MODEL = ("model_name",)

Watcher = Callable[[str, Any], None]


class Tally:
    """What happens once a token: counted in plain numbers, for Prometheus' own objects cost more than the rest of the
    way. Also a collector, in Prometheus' sense."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}  # generated, by model
        self.gaps: dict[str, list[int]] = {}  # by model: how many fell into each of SECONDS' buckets
        self.sums: dict[str, float] = {}
        self.deliveries: dict[str, list[int]] = {}  # as gaps
        self.delivery_sums: dict[str, float] = {}

    def add(self, model: str) -> None:
        self.tokens.setdefault(model, 0)
        self.gaps.setdefault(model, [0] * (len(SECONDS) + 1))
        self.sums.setdefault(model, 0.0)
        self.deliveries.setdefault(model, [0] * (len(SECONDS) + 1))
        self.delivery_sums.setdefault(model, 0.0)

    def gap(self, model: str, seconds: float) -> None:
        self.gaps[model][bisect_left(SECONDS, seconds)] += 1
        self.sums[model] += seconds

    def delivery(self, model: str, seconds: float) -> None:
        self.deliveries[model][bisect_left(SECONDS, seconds)] += 1
        self.delivery_sums[model] += seconds

    def collect(self) -> Iterator[Any]:
        tokens = CounterMetricFamily("headrace_generation_tokens", "Tokens generated.", labels=MODEL)
        gaps = HistogramMetricFamily(
            "headrace_inter_token_latency_seconds", "From one token of a request to its next.", labels=MODEL
        )
        deliveries = HistogramMetricFamily(
            "headrace_token_delivery_seconds",
            "From the end of the step that sampled a streamed token to the token in its connection's buffer.",
            labels=MODEL,
        )
        bounds = [*map(str, SECONDS), "+Inf"]
        for model, count in self.tokens.items():
            tokens.add_metric([model], count)
            for family, counts, sums in (
                (gaps, self.gaps, self.sums),
                (deliveries, self.deliveries, self.delivery_sums),
            ):
                family.add_metric([model], list(zip(bounds, accumulate(counts[model]), strict=True)), sums[model])
        yield from (tokens, gaps, deliveries)


class Metrics:
    """All metrics of a server. `feed` tells watchers of ("steps", (model, reports)), ("admitted" or "finished",
    exchange) and ("restarted", (model, reason, seconds)), in the event loop."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def gauge(name: str, text: str, labels: tuple[str, ...] = MODEL) -> Gauge:
            return Gauge(f"headrace_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = MODEL) -> Counter:
            return Counter(f"headrace_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"headrace_{name}", text, MODEL, buckets=buckets, registry=registry)

        self.running = gauge("num_requests_running", "Sequences in the running batch.")
        self.waiting = gauge("num_requests_waiting", "Sequences in the engine's queue.")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of KV pages held by sequences, 0 to 1.")
        self.ready = gauge("engine_ready", "1 while the model's engine is ready.")
        self.restarts = counter("engine_restarts", "Engine processes replaced.")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens taken from the prefix cache.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were admitted.")
        self.preemptions = counter("num_preemptions", "Sequences preempted for lack of KV pages.")
        self.steps = counter("engine_steps", "Steps that the engine has run.")
        self.success = counter("request_success", "Requests that ended, by reason.", ("model_name", "finished_reason"))
        self.answers = counter("http_requests", "HTTP answers.", ("method", "path", "status"))
        self.refused = counter("requests_refused", "Requests refused because the queue was full.")
        self.ttft = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self.tally = Tally()
        registry.register(self.tally)  # type: ignore[arg-type]
        self.stages = Stages()
        registry.register(self.stages)  # type: ignore[arg-type]
        self.e2e = histogram("e2e_request_latency_seconds", "From the request to its last token.")
        self.queue = histogram("request_queue_time_seconds", "From the request to its first step.")
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self.step_seconds = histogram("engine_step_seconds", "Time of a step on the worker.")
        self.step_rows = histogram("iteration_tokens_total", "Tokens computed in a step.", TOKENS)
        self.request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.request_generated = histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS)
        self._watchers: list[Watcher] = []

    def watch_log(self, handler: JsonHandler) -> None:
        dropped = Gauge("headrace_log_lines_dropped", "Lines that could not be logged.", registry=self.registry)
        dropped.set_function(lambda: handler.dropped)

    def collector(self, model: str) -> Collector:
        return Collector(self, model)

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Hear of everything from now on, until the returned function is called."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def feed(self, kind: str, what: Any) -> None:
        for watcher in list(self._watchers):
            watcher(kind, what)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class Collector:
    """One model's side of the metrics; hears its engine (AsyncLLM.observer) and its exchanges."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model = metrics, model
        m = metrics
        self._running, self._waiting, self._kv = (
            m.running.labels(model),
            m.waiting.labels(model),
            m.kv_usage.labels(model),
        )
        self._hits, self._queries = m.prefix_hits.labels(model), m.prefix_queries.labels(model)
        self._steps, self._step_seconds, self._rows = (
            m.steps.labels(model), m.step_seconds.labels(model), m.step_rows.labels(model),
        )  # fmt: skip
        self._tally = m.tally
        m.tally.add(model)
        self.outbox = Outbox()
        self.refused = m.refused.labels(model)
        self._ends: deque[float] = deque(maxlen=64)  # when requests ended of late

    # The engine

    def stepped(self, reports: list[Report]) -> None:
        self.outbox.flush()
        for report in reports:
            self._steps.inc()
            self._step_seconds.observe(report.ended - report.started)
            self._rows.observe(report.rows)
            for opened in report.opened:
                self._queries.inc(opened.length)
                self._hits.inc(opened.cached)
        last = reports[-1]
        self._running.set(last.running)
        self._waiting.set(last.waiting)
        self._kv.set(max((held / pages for held, pages in zip(last.pages_held, last.pages, strict=True)), default=0))
        self.metrics.feed("steps", (self.model, reports))

    def restarted(self, reason: str, pause: float) -> None:
        self.metrics.restarts.labels(self.model).inc()
        facts = {"model": self.model, "reason": reason, "seconds": round(pause, 3)}
        log.warning("engine restarted", extra={"facts": facts})
        self.metrics.feed("restarted", (self.model, reason, pause))

    def changed(self, status: Status) -> None:
        self.metrics.stages.changed(self.model, status)

    # Exchanges

    def pace(self) -> float:
        """Requests that ended, a second, of late; 0 where nothing is known."""
        return len(self._ends) / max(0.1, time.monotonic() - self._ends[0]) if len(self._ends) > 4 else 0.0

    def admitted(self, exchange: Exchange) -> None:
        self.metrics.prompt_tokens.labels(self.model).inc(sum(map(len, exchange.job.prompts)))
        self.metrics.feed("admitted", exchange)

    def embedded(self, texts: list[list[int]], seconds: float) -> None:
        """An encoder has answered a request."""
        tokens = sum(map(len, texts))
        self._ends.append(time.monotonic())
        self.metrics.prompt_tokens.labels(self.model).inc(tokens)
        self.metrics.success.labels(self.model, "stop").inc()
        self.metrics.e2e.labels(self.model).observe(seconds)
        self.metrics.request_prompt.labels(self.model).observe(tokens)

    def token(self, exchange: Exchange, now: float, count: int) -> None:
        self._tally.tokens[self.model] += count
        if exchange.first is None:
            self.metrics.ttft.labels(self.model).observe(now - exchange.began)
        elif exchange.single:
            self._tally.gap(self.model, now - exchange.last)

    def delivered(self, seconds: float) -> None:
        """A piece of a stream is in its connection's buffer, so long after it was sampled."""
        self._tally.delivery(self.model, seconds)

    def finished(self, exchange: Exchange) -> None:
        m, model = self.metrics, self.model
        self._ends.append(time.monotonic())
        samples = [sample for output in exchange.outputs for sample in output.samples]
        reason = exchange.fault.code if exchange.fault else samples[0].finish_reason if samples else None
        m.success.labels(model, reason or "none").inc()
        m.e2e.labels(model).observe(time.monotonic() - exchange.began)
        m.request_prompt.labels(model).observe(sum(map(len, exchange.job.prompts)))
        m.request_generated.labels(model).observe(exchange.tokens)
        for sample in samples:
            if sample.finish_reason is not None:
                m.queue.labels(model).observe(sample.timings.queue)
                m.prefill.labels(model).observe(sample.timings.prefill)
                m.decode.labels(model).observe(sample.timings.decode)
                m.preemptions.labels(model).inc(sample.timings.preemptions)
        m.feed("finished", exchange)
