"""What /metrics tells, in the format of Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

NAME = "mini_llm_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of one server; and ASGI around the whole app, so that refused requests are counted too."""

    def __init__(self, batch):
        self.registry = CollectorRegistry()
        more = {"registry": self.registry}
        self.requests = Counter(NAME + "http_requests", "requests, by path and status", ["path", "status"], **more)
        self.seconds = Histogram(
            NAME + "http_request_seconds",
            "from the head of a request to the end of its answer",
            ["path"],
            buckets=SECONDS,
            **more,
        )
        self.first_token = Histogram(
            NAME + "first_token_seconds", "from a request to its first token", buckets=SECONDS, **more
        )
        self.answers = Counter(NAME + "answers", "answers, by how they ended", ["finish"], **more)
        self.written = Counter(NAME + "completion_tokens", "tokens written", **more)
        self.registry.register(BatchFigures(batch))

    def answered(self, requests):
        for request in requests:
            self.answers.labels(request.finish or "cancelled").inc()
            self.written.inc(len(request.tokens))

    def page(self):
        return generate_latest(self.registry)

    def around(self, app, paths):
        """ASGI: the app, each request counted. All that are none of `paths` share a label: anybody may invent one."""

        async def counted(scope, receive, send):
            if scope["type"] != "http":
                return await app(scope, receive, send)
            start, status = time.monotonic(), "none"  # none: the client left before there was an answer

            async def noting(message):
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            try:
                await app(scope, receive, noting)
            finally:
                path = scope["path"] if scope["path"] in paths else "other"
                self.requests.labels(path, status).inc()
                self.seconds.labels(path).observe(time.monotonic() - start)

        return counted


class BatchFigures:
    """Figures that the batch has itself, read when they are asked for."""

    def __init__(self, batch):
        self.batch = batch

    def collect(self):
        batch = self.batch
        yield GaugeMetricFamily(NAME + "running", "requests that are being answered", value=len(batch.running))
        yield GaugeMetricFamily(NAME + "waiting", "requests that wait for their turn", value=len(batch.waiting))
        yield GaugeMetricFamily(NAME + "slots", "requests that can be answered at once", value=len(batch.memories))
        yield CounterMetricFamily(NAME + "prompt_tokens", "tokens of prompts that were read", value=batch.read)
        yield CounterMetricFamily(
            NAME + "prompt_tokens_reused", "tokens of prompts that were known from a turn before", value=batch.reused
        )
        yield CounterMetricFamily(NAME + "steps", "steps of the batch", value=batch.steps)
