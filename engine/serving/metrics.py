"""Prometheus metrics of the server (/metrics)."""

import time
from collections.abc import Collection, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.inference.request import Request
from engine.inference.scheduler import Scheduler

PREFIX = "mini_llm_"
SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            PREFIX + "http_requests", "requests, by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            PREFIX + "http_request_seconds",
            "from the head of a request to the end of its response",
            ["path"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            PREFIX + "first_token_seconds",
            "from a request to its first token",
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.answers = Counter(PREFIX + "answers", "choices, by finish reason", ["finish"], registry=self.registry)
        self.completion_tokens = Counter(PREFIX + "completion_tokens", "tokens generated", registry=self.registry)
        self.registry.register(SchedulerCollector(scheduler))

    def count_finished(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.answers.labels(request.finish or "cancelled").inc()
            self.completion_tokens.inc(len(request.tokens))

    def render(self) -> bytes:
        """The page of /metrics."""
        return generate_latest(self.registry)


class MetricsMiddleware:
    """Counts and times every request, refused ones too.

    Unknown paths share one label, to bound cardinality.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        status = "none"  # the client disconnected before the response

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - start)


class SchedulerCollector(Collector):
    """Reads the scheduler's own counters when Prometheus asks."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        scheduler = self.scheduler
        yield GaugeMetricFamily(PREFIX + "running", "requests that are running", value=len(scheduler.running))
        yield GaugeMetricFamily(PREFIX + "waiting", "requests in the queue", value=len(scheduler.waiting))
        yield GaugeMetricFamily(PREFIX + "slots", "requests that can run at once", value=len(scheduler.slots))
        yield CounterMetricFamily(PREFIX + "prompt_tokens", "prompt tokens prefilled", value=scheduler.prefilled_tokens)
        yield CounterMetricFamily(
            PREFIX + "prompt_tokens_reused", "prompt tokens taken from cached prefixes", value=scheduler.cached_tokens
        )
        yield CounterMetricFamily(PREFIX + "steps", "scheduler steps", value=scheduler.steps)
