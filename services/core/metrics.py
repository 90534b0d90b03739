"""The Prometheus series of the service.

All of them carry the labels `strategy`, `backend` and `model`. Dashboards rely on the names, the labels and
the buckets. Times come with the reports: no clock is read here.
"""

from __future__ import annotations

from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

from services.contract.timings import SequenceTimings
from services.engine.messages import StepReport

LABELS = ("strategy", "backend", "model")

_STEP_BUCKETS_S = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025),
    *(0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
_REQUEST_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0),
)
_BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, without use

MetricT = TypeVar("MetricT", bound=MetricWrapperBase)


class Metrics:
    """One registry of its own, so that several services can live in one process."""

    def __init__(self, strategy: str, backend: str, model: str, kv_capacity_tokens: int) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"strategy": strategy, "backend": backend, "model": model}
        self._kv_capacity_tokens = kv_capacity_tokens

        self._requests = self._counter("lab_requests", "Requests answered to the end.")
        self._tokens = self._counter("lab_tokens_generated", "Tokens generated.")
        self._prompt_tokens = self._counter("lab_prompt_tokens", "Prompt tokens computed.")
        self._cancelled = self._counter("lab_requests_cancelled", "Requests whose client went away.")
        self._restarts = self._counter("lab_worker_restarts", "Restarts of the engine after a loss.")
        self._padded = self._counter("lab_padded_row_steps", "Row-steps spent on finished rows.")
        self._rejected = Counter(
            "lab_requests_rejected",
            "Requests that got an error instead of an answer, by the code of the error.",
            (*LABELS, "reason"),
            registry=self._registry,
        )
        self._latency = self._histogram(
            "lab_request_latency_seconds", "From receipt of a request to its last token.", _REQUEST_BUCKETS_S
        )
        self._first_token = self._histogram(
            "lab_time_to_first_token_seconds", "From receipt to the first token.", _REQUEST_BUCKETS_S
        )
        self._inter_token = self._histogram(
            "lab_inter_token_latency_seconds", "Between two tokens of one answer.", _STEP_BUCKETS_S
        )
        self._queue_time = self._histogram(
            "lab_request_queue_time_seconds",
            "From receipt of a prompt until it joined the batch, the strategy's own waiting included.",
            _REQUEST_BUCKETS_S,
        )
        self._batch_size = self._histogram(
            "lab_batch_size", "Rows computed in a step, finished ones left out.", _BATCH_BUCKETS
        )
        self._active = self._gauge("lab_active_requests", "Requests accepted and not yet answered.")
        self._queue_depth = self._gauge("lab_queue_depth", "Prompts without a place in the batch.")
        self._kv_usage = self._gauge("lab_kv_cache_usage_ratio", "Share of the KV cache that is reserved.")

    def step(self, report: StepReport) -> None:
        """Book one report, but for the times of its tokens."""
        self._kv_usage.set(report.kv_used_tokens / self._kv_capacity_tokens)
        num_tokens = 0
        for update in report.updates:
            num_tokens += len(update.token_ids)
        if num_tokens:
            self._tokens.inc(num_tokens)
        record = report.record
        if record is None:
            return
        self._batch_size.observe(record.num_rows)
        if record.num_prompt_tokens:
            self._prompt_tokens.inc(record.num_prompt_tokens)
        if record.num_dead_rows:
            self._padded.inc(record.num_dead_rows)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_tokens(self, gap_s: float, num_tokens: int) -> None:
        """`num_tokens` of one choice came together, `gap_s` after the token before them."""
        for _ in range(num_tokens):
            self._inter_token.observe(gap_s / num_tokens)

    def choice_finished(self, timings: SequenceTimings) -> None:
        self._queue_time.observe(timings.queue_s + timings.batch_wait_s)

    def request_finished(self, seconds: float) -> None:
        self._requests.inc()
        self._latency.observe(seconds)

    def request_cancelled(self) -> None:
        self._cancelled.inc()

    def request_rejected(self, reason: str) -> None:
        self._rejected.labels(**self._labels, reason=reason).inc()

    def worker_restarted(self) -> None:
        self._restarts.inc()

    def load(self, num_active_requests: int, queue_depth: int) -> None:
        self._active.set(num_active_requests)
        self._queue_depth.set(queue_depth)

    def text(self) -> bytes:
        """The page for a scraper, in the Prometheus text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help_text: str) -> Counter:
        return self._labelled(Counter(name, help_text, LABELS, registry=self._registry))

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return self._labelled(Gauge(name, help_text, LABELS, registry=self._registry))

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._labelled(Histogram(name, help_text, LABELS, registry=self._registry, buckets=buckets))

    def _labelled(self, metric: MetricT) -> MetricT:
        """The series itself, looked up once instead of at each observation."""
        return metric.labels(**self._labels)
