"""Recording rules: our series under the names that vLLM's dashboards and KEDA's examples query.

Those dashboards choose by the label `model_name`, so each rule has it. Source: vLLM's
`examples/observability/prometheus_grafana/grafana.json`.
"""

from __future__ import annotations

SERIES = {
    "vllm:num_requests_running": "lab_running_sequences",
    "vllm:num_requests_waiting": "lab_waiting_sequences",
    "vllm:kv_cache_usage_perc": "lab_kv_cache_usage_ratio",
    "vllm:num_preemptions_total": "lab_preemptions_total",
    "vllm:prefix_cache_queries_total": "lab_prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total": "lab_prefix_cache_hits_total",
    "vllm:prompt_tokens_total": "lab_prompt_tokens_total",
    "vllm:generation_tokens_total": "lab_tokens_generated_total",
    "vllm:request_success_total": "lab_sequences_total",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": "lab_time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "lab_inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds": "lab_request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds": "lab_request_latency_seconds",
    "vllm:request_queue_time_seconds": "lab_request_queue_time_seconds",
    "vllm:request_prefill_time_seconds": "lab_request_prefill_time_seconds",
    "vllm:request_decode_time_seconds": "lab_request_decode_time_seconds",
    "vllm:request_prompt_tokens": "lab_request_prompt_tokens",
    "vllm:request_generation_tokens": "lab_request_generation_tokens",
}
HEAD = """\
# Written by `make dashboards` from tools/dashboards/field_names.py. docs/metrics.md shows the same table.
groups:
  - name: field-names
    interval: 5s
    rules:
"""


def field_names() -> str:
    """The text of docker/prometheus/field_names.yml."""
    renamed = dict(SERIES)
    for theirs, ours in HISTOGRAMS.items():
        renamed |= {f"{theirs}_{end}": f"{ours}_{end}" for end in ("bucket", "sum", "count")}
    return HEAD + "".join(_rule(theirs, ours) for theirs, ours in renamed.items())


def _rule(theirs: str, ours: str) -> str:
    expr = _labelled(ours, "model_name", "model")
    if theirs == "vllm:request_success_total":
        expr = _labelled(expr, "finished_reason", "finish_reason")
    return f"      - {{record: \"{theirs}\", expr: '{expr}'}}\n"


def _labelled(expr: str, new: str, old: str) -> str:
    return f'label_replace({expr}, "{new}", "$1", "{old}", "(.*)")'
