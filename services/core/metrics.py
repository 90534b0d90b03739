"""The Prometheus series of the service.

All of them carry the labels `strategy`, `backend` and `model`, and are there with every value of their other
labels before the model is loaded. Dashboards, alerts and `docs/metrics.md` rely on the names, the labels and
the buckets. Times come with the reports: no clock is read here. The labels are put on when a page is written,
since only the loaded model knows its own name.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client.metrics_core import Metric

from adapters.base import BackendInfo, EngineFigure, FinishReason
from services.contract.timings import SequenceTimings
from services.core.exposition import page_of
from services.core.machine_series import MachineSeries
from services.core.series import Series
from services.engine.messages import StepReport
from services.engine_client.supervisor import WorkerState
from services.errors import REASONS

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
_TOKEN_BUCKETS = (0, *(2**power for power in range(18)))
_FIGURES: dict[EngineFigure, str] = {
    "preemptions": "Requests that the engine itself preempted since it was started; the lab's are not in it.",
    "kv_usage_ratio": "Share of its KV blocks that the engine itself says are in use.",
    "kv_usage_peak_ratio": "The largest share since it was started.",
    "requests": "Requests that the engine itself holds.",
    "scheduled_requests": "Those of them that its last step computed.",
}
"""0 where the engine does not say."""


class Metrics:
    """What one service counts. `labels` are the values of `LABELS`."""

    def __init__(self, strategy: str, backend: str, model: str, kv_capacity_tokens: int = 0) -> None:
        self._labels = {"backend": backend, "model": model, "strategy": strategy}
        self._series = Series()
        self._machine = MachineSeries()
        self._build = {"version": "unknown", "python": platform.python_version()}
        self._count_work()
        self._time_requests()
        self._look_at_steps()
        self._look_at_load()
        self._kv_capacity.value = kv_capacity_tokens

    def _count_work(self) -> None:
        self._requests = self._series.counter("lab_requests", "HTTP requests answered to the end.")
        self._sequences = self._series.counter_by(
            "lab_sequences", "Prompts whose answer ended, by how.", "finish_reason", get_args(FinishReason)
        )
        self._tokens = self._series.counter("lab_tokens_generated", "Tokens generated.")
        self._prompt_tokens = self._series.counter("lab_prompt_tokens", "Prompt tokens computed.")
        self._cancelled = self._series.counter("lab_requests_cancelled", "Requests whose client went away.")
        self._restarts = self._series.counter("lab_worker_restarts", "Restarts of the engine after a loss.")
        self._padded = self._series.counter("lab_padded_row_steps", "Row-steps spent on finished rows.")
        self._wasted = self._series.counter_by(
            "lab_wasted_tokens",
            "Work that reached nobody: one for each dead row of a step, and the tokens of answers that were "
            "cancelled (their client left, their time was over) or failed.",
            "reason",
            ("dead_rows", "cancelled", "failed"),
        )
        self._preemptions = self._series.counter(
            "lab_preemptions",
            "Sequences whose KV memory was taken for others; they compute their tokens again.",
        )
        self._prefix_queries = self._series.counter(
            "lab_prefix_cache_queries", "With PREFIX_CACHE=1: tokens of the prompts that joined."
        )
        self._prefix_hits = self._series.counter(
            "lab_prefix_cache_hits", "Those of them whose keys and values were there, and were not computed."
        )
        self._rejected = self._series.counter_by(
            "lab_requests_rejected",
            "Requests that got an error instead of an answer, by the code of the error.",
            "reason",
            REASONS,
        )

    def _time_requests(self) -> None:
        self._latency = self._series.histogram(
            "lab_request_latency_seconds",
            "From receipt of a request by the server to its last token; the way to the server is not in it.",
            _REQUEST_BUCKETS_S,
        )
        self._first_token = self._series.histogram(
            "lab_time_to_first_token_seconds",
            "From receipt of a request by the server to the step that made its first token; connecting, "
            "sending and writing are not in it, so a client measures more.",
            _REQUEST_BUCKETS_S,
        )
        self._inter_token = self._series.histogram(
            "lab_inter_token_latency_seconds",
            "Between two tokens of one answer, as the engine makes them; tokens that come together share "
            "their gap equally.",
            _STEP_BUCKETS_S,
        )
        self._inter_chunk = self._series.histogram(
            "lab_inter_chunk_latency_seconds",
            "Between two frames of one stream, whole: what a stalled reader or several tokens in a frame "
            "hide from the time of a token is seen here.",
            _STEP_BUCKETS_S,
        )
        self._per_token = self._series.histogram(
            "lab_request_time_per_output_token_seconds",
            "Time per output token after the first, one value an answer.",
            _STEP_BUCKETS_S,
        )
        self._queue_time = self._series.histogram(
            "lab_request_queue_time_seconds",
            "From receipt of a prompt until it joined the batch, the strategy's own waiting included.",
            _REQUEST_BUCKETS_S,
        )
        self._prefill_time = self._series.histogram(
            "lab_request_prefill_time_seconds",
            "From joining the batch to the first token.",
            _REQUEST_BUCKETS_S,
        )
        self._decode_time = self._series.histogram(
            "lab_request_decode_time_seconds", "From the first token to the last.", _REQUEST_BUCKETS_S
        )
        self._prompt_lengths = self._series.histogram(
            "lab_request_prompt_tokens", "Length of a prompt.", _TOKEN_BUCKETS
        )
        self._answer_lengths = self._series.histogram(
            "lab_request_generation_tokens", "Length of an answer.", _TOKEN_BUCKETS
        )

    def _look_at_steps(self) -> None:
        self._batch_size = self._series.histogram(
            "lab_batch_size", "Rows computed in a step, finished ones left out.", _BATCH_BUCKETS
        )
        self._step_duration = self._series.histogram(
            "lab_step_duration_seconds", "Duration of an engine step.", _STEP_BUCKETS_S
        )
        step_tokens = self._series.histogram_by(
            "lab_step_tokens",
            "Tokens computed in a step, by kind: of prompts, or decoded.",
            _TOKEN_BUCKETS,
            "kind",
            ("prompt", "decode"),
        )
        self._step_prompt_tokens = step_tokens["prompt"]
        self._step_decode_tokens = step_tokens["decode"]

    def _look_at_load(self) -> None:
        self._ready = self._series.gauge("lab_ready", "1 while requests are accepted, else 0.")
        self._state = self._series.gauge_by(
            "lab_engine_state", "1 at the state that the engine is in.", "state", get_args(WorkerState)
        )
        self._active = self._series.gauge(
            "lab_active_requests", "Requests accepted and not yet answered, queued ones included."
        )
        self._queue_depth = self._series.gauge("lab_queue_depth", "Prompts without a place in the batch.")
        self._running = self._series.gauge("lab_running_sequences", "Prompts that have a place in the batch.")
        self._waiting = self._series.gauge(
            "lab_waiting_sequences",
            "The same as lab_queue_depth, under the field's name.",
        )
        self._max_queue = self._series.gauge(
            "lab_max_queue_requests", "Requests, and prompts, that may wait before one is refused."
        )
        self._max_batch = self._series.gauge(
            "lab_max_batch_size", "Places of the batch; 0 until it is known."
        )
        self._kv_usage = self._series.gauge(
            "lab_kv_cache_usage_ratio",
            "Share of the KV cache that sequences hold. With KV_POLICY=reserve each holds its prompt and all "
            "that it may generate from the start, so this is more than what is filled.",
        )
        self._kv_capacity = self._series.gauge(
            "lab_kv_cache_capacity_tokens",
            "Tokens that the KV cache holds, KV_CAPACITY_TOKENS at most; 0 before the model loads.",
        )
        self._figures = {
            name: self._series.gauge(f"lab_engine_{name}", help_text) for name, help_text in _FIGURES.items()
        }

    @property
    def gpu_utilization(self) -> float | None:
        """None without a GPU."""
        return self._machine.gpu.utilization()

    def starting(self, version: str, max_queue: int, engine_pid: Callable[[], int | None]) -> None:
        """What is known before the model is loaded."""
        self._build["version"] = version
        self._max_queue.value = max_queue
        self._machine.watch_engine(engine_pid)

    def loaded(self, info: BackendInfo, kv_capacity_tokens: int) -> None:
        self._labels |= {"backend": info.backend, "model": info.model}
        self._max_batch.value = info.max_batch_size
        self._kv_capacity.value = kv_capacity_tokens

    def step(self, report: StepReport) -> None:
        """Book one report, but for the times of its tokens."""
        self._kv_usage.value = report.kv_used_tokens / (self._kv_capacity.value or 1)
        num_tokens = 0
        for update in report.updates:
            num_tokens += len(update.token_ids)
        self._tokens.value += num_tokens
        record = report.record
        if record is None:
            return
        for name, value in (report.figures or {}).items():
            self._figures[name].value = value
        self._batch_size.observe(record.num_rows)
        self._step_duration.observe(record.duration_s)
        self._step_prompt_tokens.observe(record.num_prompt_tokens)
        self._step_decode_tokens.observe(record.num_decode_tokens)
        self._prompt_tokens.value += record.num_prompt_tokens
        self._padded.value += record.num_dead_rows
        self._wasted.values["dead_rows"] += record.num_dead_rows
        self._preemptions.value += record.num_preempted
        self._prefix_queries.value += record.num_looked_up_tokens
        self._prefix_hits.value += record.num_cached_tokens

    def first_token(self, request_id: str, seconds: float) -> None:
        self._first_token.observe_of(request_id, seconds)

    def next_tokens(self, gap_s: float, num_tokens: int) -> None:
        """`num_tokens` of one choice came together, `gap_s` after the token before them."""
        self._inter_token.observe(gap_s / num_tokens, num_tokens)

    def next_frame(self, gap_s: float) -> None:
        """A stream's frame with tokens, `gap_s` after the one before it."""
        self._inter_chunk.observe(gap_s)

    def choice_finished(
        self,
        request_id: str,
        reason: FinishReason,
        num_prompt_tokens: int,
        num_tokens: int,
        timings: SequenceTimings,
    ) -> None:
        self._sequences.values[reason] += 1
        self._queue_time.observe_of(request_id, timings.queue_s + timings.batch_wait_s)
        self._prompt_lengths.observe(num_prompt_tokens)
        self._answer_lengths.observe(num_tokens)
        if num_tokens:
            self._prefill_time.observe_of(request_id, timings.prefill_s)
            self._decode_time.observe_of(request_id, timings.decode_s)
        if num_tokens > 1:
            self._per_token.observe_of(request_id, timings.decode_s / (num_tokens - 1))
        if reason in ("abort", "error"):
            self.wasted("cancelled" if reason == "abort" else "failed", num_tokens)

    def sequences_ended(self, reason: FinishReason, num_sequences: int = 1) -> None:
        """Nobody waited for these any more, or the engine was lost with them."""
        self._sequences.values[reason] += num_sequences

    def wasted(self, reason: str, num_tokens: int) -> None:
        self._wasted.values[reason] += num_tokens

    def request_finished(self, request_id: str, seconds: float) -> None:
        self._requests.value += 1
        self._latency.observe_of(request_id, seconds)

    def request_cancelled(self) -> None:
        self._cancelled.value += 1

    def request_rejected(self, reason: str) -> None:
        """`reason` is the code of an error, one of `REASONS`."""
        self._rejected.values[reason] += 1

    def worker_restarted(self) -> None:
        self._restarts.value += 1
        for figure in self._figures.values():
            figure.value = 0.0

    def load(self, num_active_requests: int, queue_depth: int, num_running: int) -> None:
        self._active.value = num_active_requests
        self._queue_depth.value = self._waiting.value = queue_depth
        self._running.value = num_running

    def state(self, state: WorkerState, *, is_ready: bool) -> None:
        self._ready.value = float(is_ready)
        for name in self._state.values:
            self._state.values[name] = float(name == state)

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The page for a scraper that accepts `accept`, and its media type."""
        return page_of(self.collect(), accept)

    def text(self) -> bytes:
        return self.page()[0]

    def collect(self) -> Iterator[Metric]:
        labels = self._labels
        yield from self._series.collect(labels)
        build = Metric("lab_build_info", "1; its labels say what runs.", "gauge")
        build.add_sample("lab_build_info", {**labels, **self._build}, 1.0)
        yield build
        yield from self._machine.collect(labels)
