"""*Live*: what services do now, strategies laid over one another by their label."""

from __future__ import annotations

from collections.abc import Sequence

from tools.dashboards.panels import Json, dashboard, heatmap, lines, stat, target, variable

_CHOSEN = 'strategy=~"$strategy",model=~"$model"'
_BY = "strategy, model"
_OF_GPUS = "Of replicas the largest value, since several may share a GPU. Empty without one."
_QUANTILES = {50: "0.5", 95: "0.95", 99: "0.99"}


def _rate(series: str, legend: str = "{{strategy}}", by: str = _BY) -> Json:
    return target(f"sum by ({by}) (rate({series}{{{_CHOSEN}}}[$__rate_interval]))", legend)


def _gauge(series: str, legend: str = "{{strategy}}", by: str = _BY, how: str = "sum") -> Json:
    return target(f"{how} by ({by}) ({series}{{{_CHOSEN}}})", legend)


def _quantiles(series: str) -> list[Json]:
    buckets = f"sum by ({_BY}, le) (rate({series}_bucket{{{_CHOSEN}}}[$__rate_interval]))"
    return [
        target(f"histogram_quantile({q}, {buckets})", f"{{{{strategy}}}} p{percent}", exemplar=True)
        for percent, q in _QUANTILES.items()
    ]


def _latency(title: str, series: str, words: str) -> Json:
    return lines(title, f"p50, p95 and p99 in the rate interval. {words}", "s", _quantiles(series))


def _mean(series: str, legend: str = "{{strategy}}", by: str = _BY) -> Json:
    total, count = (
        f"sum by ({by}) (rate({series}_{e}{{{_CHOSEN}}}[$__rate_interval]))" for e in ("sum", "count")
    )
    return target(f"{total} / {count}", legend)


def _bands(series: str) -> str:
    return f"sum by (le) (increase({series}_bucket{{{_CHOSEN}}}[$__rate_interval]))"


def _state() -> Sequence[Json]:
    return (
        stat(
            "Ready",
            "1 while all replicas accept requests; 0 while one of them loads, restarts its engine or drains. "
            "One that does not answer Prometheus is not in it: LabNotReady tells of that.",
            "none",
            [_gauge("lab_ready", how="min")],
            {0: "red", 1: "green"},
        ),
        lines(
            "Engine state",
            "1 at the state the engine is in.",
            "none",
            [_gauge("lab_engine_state", "{{strategy}} {{state}}", f"{_BY}, state")],
        ),
        lines(
            "Restarts",
            "Restarts of the engine in the last hour.",
            "short",
            [
                target(
                    f"sum by ({_BY}) (increase(lab_worker_restarts_total{{{_CHOSEN}}}[1h]))", "{{strategy}}"
                )
            ],
        ),
    )


def _load() -> Sequence[Json]:
    reasons = _rate("lab_requests_rejected_total", "{{strategy}} {{reason}}", f"{_BY}, reason")
    return (
        lines(
            "Requests",
            "HTTP requests answered to the end. A request of a static client carries many prompts.",
            "reqps",
            [_rate("lab_requests_total"), _rate("lab_requests_cancelled_total", "{{strategy}} cancelled")],
        ),
        lines(
            "Sequences",
            "Prompts whose answer ended, by how; this is what compares strategies, not requests.",
            "ops",
            [_rate("lab_sequences_total", "{{strategy}} {{finish_reason}}", f"{_BY}, finish_reason")],
        ),
        lines(
            "Tokens",
            "Tokens generated, and prompt tokens computed, a second.",
            "ops",
            [
                _rate("lab_tokens_generated_total"),
                _rate("lab_prompt_tokens_total", "{{strategy}} prompt"),
            ],
        ),
        lines(
            "Queue and batch",
            "Prompts that run and that wait, and the requests that are in flight.",
            "short",
            [
                _gauge("lab_running_sequences", "{{strategy}} running"),
                _gauge("lab_waiting_sequences", "{{strategy}} waiting"),
                _gauge("lab_queue_depth", "{{strategy}} queue depth"),
                _gauge("lab_active_requests", "{{strategy}} requests in flight"),
            ],
        ),
        lines(
            "Limits",
            "Places of the batch, and requests that may wait.",
            "short",
            [
                _gauge("lab_max_batch_size", "{{strategy}} batch"),
                _gauge("lab_max_queue_requests", "{{strategy}} queue"),
            ],
        ),
        lines("Refusals", "Requests that got an error, by its code.", "reqps", [reasons]),
    )


def _latencies() -> Sequence[Json]:
    return (
        _latency(
            "Time to first token",
            "lab_time_to_first_token_seconds",
            "From receipt by the server, so a client sees more.",
        ),
        _latency(
            "Time per output token",
            "lab_request_time_per_output_token_seconds",
            "One value an answer, the first token left out.",
        ),
        _latency(
            "Inter-token latency",
            "lab_inter_token_latency_seconds",
            "Tokens that come together share their gap.",
        ),
        _latency(
            "Gap between frames",
            "lab_inter_chunk_latency_seconds",
            "Whole gaps: stalls show here. One of more than 2.5 s is drawn as 2.5 s.",
        ),
        _latency("Total", "lab_request_latency_seconds", "From receipt by the server to the last token."),
        _latency("In the queue", "lab_request_queue_time_seconds", "The strategy's own waiting is in it."),
        lines(
            "Prefill and decode",
            "Mean time of an answer from joining the batch to its first token, and from there to its last.",
            "s",
            [
                _mean("lab_request_prefill_time_seconds", "{{strategy}} prefill"),
                _mean("lab_request_decode_time_seconds", "{{strategy}} decode"),
            ],
        ),
        lines(
            "Lengths",
            "Mean tokens of a prompt and of an answer.",
            "short",
            [
                _mean("lab_request_prompt_tokens", "{{strategy}} prompt"),
                _mean("lab_request_generation_tokens", "{{strategy}} answer"),
            ],
        ),
    )


def _steps() -> Sequence[Json]:
    return (
        heatmap(
            "Batch size",
            "Steps by the rows they computed, finished rows left out.",
            "short",
            _bands("lab_batch_size"),
        ),
        _latency("Step duration", "lab_step_duration_seconds", "How long one engine step takes."),
        lines(
            "Tokens a step",
            "Mean prompt tokens and decoded tokens of a step.",
            "short",
            [_mean("lab_step_tokens", "{{strategy}} {{kind}}", f"{_BY}, kind")],
        ),
        lines(
            "Wasted tokens",
            "Dead rows, and tokens of answers that were cancelled or failed, a second.",
            "ops",
            [
                _rate("lab_wasted_tokens_total", "{{strategy}} {{reason}}", f"{_BY}, reason"),
                _rate("lab_padded_row_steps_total", "{{strategy}} dead row-steps"),
            ],
        ),
        lines(
            "KV cache reserved",
            "Share of the cache that is reserved for prompts and all they may generate; more than is filled.",
            "percentunit",
            [_gauge("lab_kv_cache_usage_ratio", how="max")],
        ),
        lines("KV cache size", "Tokens that it holds.", "short", [_gauge("lab_kv_cache_capacity_tokens")]),
        lines(
            "Preemptions",
            "Sequences a second whose KV memory was taken (KV_POLICY=paged); they compute again.",
            "ops",
            [_rate("lab_preemptions_total", "{{strategy}}")],
        ),
        lines(
            "Engine's own KV cache",
            "Share of its blocks in use, and the most since its start, as vLLM and OpenVINO tell it.",
            "percentunit",
            [
                _gauge("lab_engine_kv_usage_ratio", how="max"),
                _gauge("lab_engine_kv_usage_peak_ratio", "{{strategy}} peak", how="max"),
            ],
        ),
        lines(
            "Engine's own requests",
            "Held, computed in the last step, and preempted since its start, as vLLM and OpenVINO tell it.",
            "short",
            [
                _gauge("lab_engine_requests", "{{strategy}} held"),
                _gauge("lab_engine_scheduled_requests", "{{strategy}} in the last step"),
                _gauge("lab_engine_preemptions", "{{strategy}} preempted"),
            ],
        ),
        lines(
            "Prefix cache",
            "Prompt tokens a second that were looked up, and that were found (PREFIX_CACHE=1).",
            "short",
            [
                _rate("lab_prefix_cache_queries_total", "{{strategy}} looked up"),
                _rate("lab_prefix_cache_hits_total", "{{strategy}} found"),
            ],
        ),
    )


def _machine() -> Sequence[Json]:
    return (
        lines(
            "CPU",
            "Cores in use by the API's process and by the engine's.",
            "short",
            [
                _rate("process_cpu_seconds_total", "{{strategy}} API"),
                _rate("lab_engine_process_cpu_seconds_total", "{{strategy}} engine"),
            ],
        ),
        lines(
            "Memory",
            "Resident memory of the API's process and of the engine's.",
            "bytes",
            [
                _gauge("process_resident_memory_bytes", "{{strategy}} API"),
                _gauge("lab_engine_process_resident_memory_bytes", "{{strategy}} engine"),
            ],
        ),
        lines(
            "Open files",
            "Descriptors of the API's process, connections among them, and their limit.",
            "short",
            [_gauge("process_open_fds"), _gauge("process_max_fds", "{{strategy}} limit")],
        ),
        lines(
            "GPU",
            f"Share of time in which a kernel ran. {_OF_GPUS}",
            "percentunit",
            [_gauge("lab_gpu_utilization_ratio", how="max")],
        ),
        lines(
            "GPU memory",
            f"In use, that of other processes included. {_OF_GPUS}",
            "bytes",
            [
                _gauge("lab_gpu_memory_used_bytes", "{{strategy}} used", how="max"),
                _gauge("lab_gpu_memory_total_bytes", "{{strategy}} of", how="max"),
            ],
        ),
        lines("GPU power", f"Power drawn. {_OF_GPUS}", "watt", [_gauge("lab_gpu_power_watts", how="max")]),
        lines(
            "GPU energy a token",
            "Where each replica has a GPU of its own; what others use of it is counted. Empty without a GPU.",
            "joule",
            [
                target(
                    f"sum by ({_BY}) (rate(lab_gpu_energy_joules_total{{{_CHOSEN}}}[$__rate_interval])) "
                    f"/ sum by ({_BY}) (rate(lab_tokens_generated_total{{{_CHOSEN}}}[$__rate_interval]))",
                    "{{strategy}}",
                )
            ],
        ),
    )


def _build() -> Sequence[Json]:
    started = f"time() - max by ({_BY}) (process_start_time_seconds{{{_CHOSEN}}})"
    build = f"max by ({_BY}, backend, version, python) (lab_build_info{{{_CHOSEN}}})"
    return (
        lines("Uptime", "Since the API's process began.", "s", [target(started, "{{strategy}}")]),
        stat("Version", "What runs.", "none", [target(build, "{{strategy}} {{version}} {{backend}}")]),
    )


LIVE = dashboard(
    "batching-lab-live",
    "Batching lab: live",
    "What the services do now, with the strategies laid over one another.",
    {
        "State": _state(),
        "Load": _load(),
        "Latency": _latencies(),
        "Engine steps": _steps(),
        "Machine": _machine(),
        "Build": _build(),
    },
    [
        variable("strategy", "Strategy", "label_values(lab_ready, strategy)"),
        variable("model", "Model", "label_values(lab_ready, model)"),
    ],
)
