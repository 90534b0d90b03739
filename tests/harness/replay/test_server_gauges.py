"""Gauges of foreign servers, in the text that each of them writes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from harness.client.control import Control
from harness.replay import server_gauges
from harness.replay.server_gauges import GaugeWatch, parse_metrics
from harness.results.facts import ServerGauges
from tests.harness.fake_server import FakeServer

# Each `%g` is: running, waiting, share of KV in use, and totals of a growing run.
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/m"} %g
vllm:num_requests_waiting{engine="0",model_name="org/m"} %g
vllm:num_requests_waiting_by_reason{engine="0",model_name="org/m",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="org/m"} %g
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="org/m"} 3.0
vllm:request_queue_time_seconds_count{engine="0",model_name="org/m"} %g
vllm:request_queue_time_seconds_sum{engine="0",model_name="org/m"} %g
vllm:request_prefill_time_seconds_count{engine="0",model_name="org/m"} %g
vllm:request_prefill_time_seconds_sum{engine="0",model_name="org/m"} %g
"""
SGLANG = """\
# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} %g
sglang:num_queue_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} %g
sglang:token_usage{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} %g
sglang:queue_time_seconds_sum{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} %g
sglang:queue_time_seconds_count{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} %g
"""
LLAMA = """\
# HELP llamacpp:prompt_seconds_total Prompt process time
# TYPE llamacpp:prompt_seconds_total counter
llamacpp:prompt_seconds_total %g
# HELP llamacpp:n_decode_total Total number of llama_decode() calls
# TYPE llamacpp:n_decode_total counter
llamacpp:n_decode_total %g
# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing %g
llamacpp:requests_deferred %g
llamacpp:n_busy_slots_per_decode %g
"""


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_gauges, "PERIOD_S", 0.001)


def told(read: Callable[[], str], num_requests: int = 10) -> ServerGauges:
    """What a watch tells of a replay that took a second by its stamps, whatever the clock does meanwhile."""
    with GaugeWatch(read) as watch:
        while watch._problem is None:
            time.sleep(0.001)
    first_s = watch._samples[0].at_s
    return watch.gauges(first_s, first_s + 3600, num_requests)


class Grows:
    """These, then nothing that can be read."""

    def __init__(self, *texts: str) -> None:
        self._left = list(texts)

    def __call__(self) -> str:
        if not self._left:
            raise LookupError("its /metrics answers 500")
        return self._left.pop(0)


def test_vllm() -> None:
    found = told(Grows(VLLM % (4, 0, 0.25, 100, 50, 100, 10), VLLM % (8, 6, 0.75, 110, 55, 110, 12)))
    assert found == ServerGauges(
        server="vLLM", num_samples=2, mean_batch_size=6, mean_waiting=3, max_waiting=6, mean_kv_usage=0.5,
        max_kv_usage=0.75, queue_s=0.5, prefill_s=0.2,
    )  # fmt: skip


def test_sglang_gives_no_prefill_time() -> None:
    found = told(Grows(SGLANG % (3, 1, 0.28, 7.0, 70), SGLANG % (5, 1, 0.30, 8.0, 80)))
    assert (found.server, found.mean_batch_size, found.mean_waiting) == ("SGLang", 4, 1)
    assert (found.queue_s, found.prefill_s) == (pytest.approx(0.1), None)


def test_llama_server_tells_its_batch_since_its_start_and_no_kv() -> None:
    found = told(Grows(LLAMA % (3.0, 10, 1, 0, 1.5), LLAMA % (5.0, 30, 4, 2, 2.5)))
    assert found.mean_batch_size == pytest.approx(3.0)  # 60 busy slots in 20 decodes
    assert (found.mean_waiting, found.max_waiting, found.mean_kv_usage) == (1, 2, None)
    assert found.prefill_s == pytest.approx(0.2)
    assert found.queue_s == pytest.approx(1 * 3600 / 10)  # Little's law


def test_engines_add_up_and_ranks_of_one_do_not() -> None:
    lines = [
        f'sglang:num_running_reqs{{dp_rank="{dp}",model_name="a}} b",tp_rank="{tp}"}} {4 + dp}'
        for dp in (0, 1)
        for tp in (0, 1)
    ]
    sample = parse_metrics("\n".join(lines), 0.0)
    assert sample is not None
    assert sample.total("num_running_reqs") == 9


def test_names_without_colons_and_the_older_name_of_kv_usage() -> None:
    text = 'vllm_num_requests_running{engine="0"} 2.0\nvllm_gpu_cache_usage_perc{engine="0"} 0.5\n'
    found = told(Grows(text, text))
    assert (found.mean_batch_size, found.mean_kv_usage, found.mean_waiting) == (2, 0.5, None)


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        (None, "its /metrics answers 404"),
        ("lab_ready 1\n", "its /metrics is not that of vLLM, SGLang or llama.cpp"),
    ],
)
def test_a_server_without_figures_says_why(metrics: str | None, problem: str) -> None:
    with (
        FakeServer(metrics=None if metrics is None else lambda: metrics) as server,
        Control(f"{server.url}/v1") as control,
    ):
        with GaugeWatch(control.metrics_text) as watch:
            assert watch._thread is None
        found = watch.gauges(0.0, time.perf_counter(), 1)
    assert (found.server, found.problem) == (None, problem)


def test_metrics_stand_beside_v1() -> None:
    asked: list[str] = []
    with FakeServer(metrics=lambda: asked.append("x") or "text") as server:
        for path in ("", "/v1", "/v1/", "/v1/chat/completions"):
            with Control(f"{server.url}{path}") as control:
                control.metrics_text()
    assert len(asked) == 4
