"""The series: their names and labels, and that they count what happened."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from services import errors
from services.contract.timings import StepRecord
from services.core.exposition import page_of
from services.core.metrics import LABELS, Metrics
from services.core.service import Service
from services.engine.messages import SequenceUpdate, StepReport
from services.errors import REASONS
from services.http.app import create_app
from services.read_settings import read_settings
from tests.services.http.test_app import Background
from tests.services.scripted_engine import TIMINGS, ScriptedEngine, last
from tests.services.served import CLIENT, Served, serving, until

NAMES = {
    "lab_requests_total",
    "lab_sequences_total",
    "lab_tokens_generated_total",
    "lab_prompt_tokens_total",
    "lab_wasted_tokens_total",
    "lab_request_latency_seconds",
    "lab_time_to_first_token_seconds",
    "lab_inter_token_latency_seconds",
    "lab_inter_chunk_latency_seconds",
    "lab_request_time_per_output_token_seconds",
    "lab_request_queue_time_seconds",
    "lab_request_prefill_time_seconds",
    "lab_request_decode_time_seconds",
    "lab_request_prompt_tokens",
    "lab_request_generation_tokens",
    "lab_batch_size",
    "lab_step_duration_seconds",
    "lab_step_tokens",
    "lab_ready",
    "lab_engine_state",
    "lab_active_requests",
    "lab_queue_depth",
    "lab_running_sequences",
    "lab_waiting_sequences",
    "lab_max_queue_requests",
    "lab_max_batch_size",
    "lab_kv_cache_usage_ratio",
    "lab_kv_cache_capacity_tokens",
    "lab_padded_row_steps_total",
    "lab_preemptions_total",
    "lab_prefix_cache_queries_total",
    "lab_prefix_cache_hits_total",
    "lab_requests_rejected_total",
    "lab_requests_cancelled_total",
    "lab_worker_restarts_total",
    "lab_build_info",
    "lab_engine_preemptions",
    "lab_engine_kv_usage_ratio",
    "lab_engine_kv_usage_peak_ratio",
    "lab_engine_requests",
    "lab_engine_scheduled_requests",
}
PROCESS_NAMES = {
    *("virtual_memory_bytes", "resident_memory_bytes", "start_time_seconds", "cpu_seconds_total"),
    *("open_fds", "max_fds"),
}


def values(served: Served) -> dict[str, float]:
    """Sample name, with a reason or a bucket where it has one, to value."""
    found = {}
    for family in text_string_to_metric_families(served.get("/metrics").text):
        for sample in family.samples:
            assert set(LABELS) <= set(sample.labels)
            assert ":" not in sample.name
            extra = "".join(f"/{value}" for name, value in sample.labels.items() if name not in LABELS)
            assert sample.name + extra not in found
            found[sample.name + extra] = sample.value
    return found


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(engine, MAX_BATCH=4, MAX_MODEL_LEN=64, VARIANT="dynamic") as served:
        yield served


def test_names_and_help(served: Served) -> None:
    served.post(prompt=5)
    families = list(text_string_to_metric_families(served.get("/metrics").text))
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    processes = {f"{prefix}_{name}" for prefix in ("process", "lab_engine_process") for name in PROCESS_NAMES}
    gpu = {name for name in names if name.startswith("lab_gpu_")}
    assert names - gpu == NAMES | processes
    assert all(family.documentation.endswith(".") for family in families)
    labels = {
        tuple(sample.labels[name] for name in LABELS) for family in families for sample in family.samples
    }
    assert labels == {("dynamic", "null", "null")}


def test_an_answered_request(served: Served, engine: ScriptedEngine) -> None:
    waiting = Background(served, prompt="z")
    until(lambda: len(engine.submitted) == 1)
    request = Background(served, prompt="abcde", max_tokens=3)
    until(lambda: len(engine.submitted) == 2)
    other, seq = engine.submitted
    engine.start_s, engine.step_s = seq.arrival_s, 0.5
    served.call(lambda: engine.step(SequenceUpdate(seq.seq_id, [97]), num_running=1))
    during = values(served)
    served.call(lambda: engine.step(last(seq.seq_id, [98, 99]), num_running=0))
    assert request.answer().status_code == 200
    until(lambda: values(served)["lab_active_requests"] == 1)
    after = values(served)
    served.call(lambda: engine.step(last(other.seq_id, [97])))
    assert waiting.answer().status_code == 200

    assert (during["lab_active_requests"], during["lab_queue_depth"]) == (2, 1)
    assert during["lab_kv_cache_usage_ratio"] == pytest.approx(64 / 256)
    assert after["lab_requests_total"] == 1
    assert after["lab_tokens_generated_total"] == 3
    assert after["lab_prompt_tokens_total"] == 10
    assert after["lab_padded_row_steps_total"] == 4
    assert (after["lab_batch_size_count"], after["lab_batch_size_sum"]) == (2, 2)
    assert after["lab_time_to_first_token_seconds_sum"] == pytest.approx(0.5)
    assert after["lab_request_latency_seconds_sum"] == pytest.approx(1.0)
    assert after["lab_inter_token_latency_seconds_count"] == 2
    assert after["lab_inter_token_latency_seconds_sum"] == pytest.approx(0.5)
    assert after["lab_request_queue_time_seconds_sum"] == pytest.approx(
        TIMINGS.queue_s + TIMINGS.batch_wait_s
    )


def test_refusals_by_reason(served: Served) -> None:
    served.post(prompt=5)
    served.post(prompt="a" * 65)
    served.post(prompt="a", timeout_s=0.01)
    served.get("/nothing")
    found = values(served)
    reasons = {name: value for name, value in found.items() if name.startswith("lab_requests_rejected_total")}
    assert {name: value for name, value in reasons.items() if value} == {
        "lab_requests_rejected_total/invalid_value": 1,
        "lab_requests_rejected_total/context_length_exceeded": 1,
        "lab_requests_rejected_total/timeout": 1,
    }
    assert set(reasons) == {f"lab_requests_rejected_total/{reason}" for reason in REASONS}
    assert (found["lab_requests_total"], found["lab_requests_cancelled_total"]) == (0, 0)


def test_a_client_that_left(served: Served, engine: ScriptedEngine) -> None:
    body = b'{"prompt": "a"}'
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: len(engine.submitted) == 1)
    until(lambda: values(served)["lab_requests_cancelled_total"] == 1)
    assert values(served)["lab_requests_total"] == 0


def test_buckets_are_fine_below_ten_milliseconds() -> None:
    metrics = Metrics("a", "b", "c", 1)
    metrics.next_tokens(0.001, 1)
    buckets = [
        float(sample.labels["le"])
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if sample.name == "lab_inter_token_latency_seconds_bucket"
    ]
    assert sum(bucket < 0.01 for bucket in buckets) >= 8


def test_a_report_without_a_step_moves_the_gauge_alone() -> None:
    metrics = Metrics("a", "b", "c", 100)
    metrics.step(StepReport([], None, 0, 7, 50))
    text = metrics.text().decode()
    assert 'lab_kv_cache_usage_ratio{backend="b",model="c",strategy="a"} 0.5' in text
    assert 'lab_batch_size_count{backend="b",model="c",strategy="a"} 0.0' in text


def test_the_figures_of_an_engine_are_those_of_its_last_step() -> None:
    metrics = Metrics("a", "b", "c", 100)
    record = StepRecord(3, 1.5, 0.25, 3, 4, 2, 1, 9)
    metrics.step(StepReport([], record, figures={"preemptions": 2, "kv_usage_ratio": 0.5}))
    metrics.step(StepReport([], record, figures={"preemptions": 3}))
    metrics.step(StepReport())
    text = metrics.text().decode()
    assert 'lab_engine_preemptions{backend="b",model="c",strategy="a"} 3.0' in text
    assert 'lab_engine_kv_usage_ratio{backend="b",model="c",strategy="a"} 0.5' in text
    metrics.worker_restarted()
    assert 'lab_engine_preemptions{backend="b",model="c",strategy="a"} 0.0' in metrics.text().decode()


def test_every_code_of_an_error_is_a_reason_from_the_start() -> None:
    """The codes as the sources write them; `_FIELD_CODES` holds the others."""
    package = Path(errors.__file__).parent
    written = {
        code
        for source in package.rglob("*.py")
        for code in re.findall(r'code="([a-z_]+)"', source.read_text(encoding="utf-8"))
    }
    assert written <= set(REASONS)
    assert len(REASONS) == len(set(REASONS))


def test_all_series_are_there_before_the_model_is() -> None:
    with serving(load=False, VARIANT="static", MODEL="lab-26m") as served:
        before = values(served)
        assert (before["lab_ready"], before["lab_engine_state/starting"]) == (0, 1)
        served.post(prompt="a")
        assert values(served)["lab_requests_rejected_total/starting"] == 1
    with serving(VARIANT="static", MODEL="lab-26m") as served:
        after = values(served)
        assert (after["lab_ready"], after["lab_engine_state/running"], after["lab_max_batch_size"]) == (
            1,
            1,
            16,
        )
    assert set(before) == set(after)


def test_an_engine_that_restarts_is_not_ready(served: Served, engine: ScriptedEngine) -> None:
    asked = Background(served, prompt="ab", max_tokens=9)
    until(lambda: len(engine.submitted) == 1)
    (seq,) = engine.submitted
    served.call(lambda: engine.step(SequenceUpdate(seq.seq_id, [97, 98]), num_running=1))
    served.call(lambda: engine.on_lost("it is gone"))
    during = values(served)
    assert (during["lab_ready"], during["lab_engine_state/restarting"]) == (0, 1)
    assert asked.answer().status_code == 503
    until(lambda: values(served)["lab_ready"] == 1)
    after = values(served)
    assert after["lab_worker_restarts_total"] == 1
    assert after["lab_requests_rejected_total/engine_lost"] == 1
    assert (after["lab_sequences_total/error"], after["lab_wasted_tokens_total/failed"]) == (1, 2)


def test_sequences_are_counted_by_how_they_ended(served: Served, engine: ScriptedEngine) -> None:
    """One request of three prompts; a second one is cancelled with tokens on the way."""
    asked = Background(served, prompt=["a", "b", "c"], max_tokens=3)
    until(lambda: len(engine.submitted) == 3)
    first, second, third = engine.submitted
    served.call(
        lambda: engine.step(
            last(first.seq_id, [97, 98, 99]),
            SequenceUpdate(second.seq_id, [97], "stop", TIMINGS),
            SequenceUpdate(third.seq_id, [97], "abort", TIMINGS),
            num_running=3,
        )
    )
    asked.answer()
    leaving = Background(served, prompt="d", max_tokens=9, timeout_s=0.3)
    until(lambda: len(engine.submitted) == 4)
    seq_id = engine.submitted[3].seq_id
    served.call(lambda: engine.step(SequenceUpdate(seq_id, [97, 98]), num_running=1))
    assert values(served)["lab_running_sequences"] == 1
    assert leaving.answer().status_code == 504
    served.call(lambda: engine.step(SequenceUpdate(seq_id, [99])))
    served.call(lambda: engine.step(SequenceUpdate(seq_id, [], "abort", TIMINGS)))
    found = values(served)
    by_reason = {name.partition("/")[2]: v for name, v in found.items() if "lab_sequences_total/" in name}
    assert by_reason == {"length": 1, "stop": 1, "abort": 2, "error": 0}
    assert found["lab_wasted_tokens_total/cancelled"] == 1 + 3
    assert found["lab_wasted_tokens_total/dead_rows"] == found["lab_padded_row_steps_total"] == 2 * 4
    assert found["lab_request_time_per_output_token_seconds_count"] == 1
    assert found["lab_request_time_per_output_token_seconds_sum"] == pytest.approx(TIMINGS.decode_s / 2)
    assert found["lab_request_generation_tokens_sum"] == 3 + 1 + 1
    assert found["lab_request_prefill_time_seconds_count"] == 3
    assert found["lab_step_tokens_sum/prompt"] == 4 * 5
    assert found["lab_step_duration_seconds_sum"] == pytest.approx(4 * engine.step_s)
    assert (found["lab_waiting_sequences"], found["lab_queue_depth"]) == (0, 0)


def test_a_frame_of_several_tokens_shows_its_whole_gap() -> None:
    engine = ScriptedEngine()
    with serving(engine) as served:
        asked = Background(served, prompt="a", max_tokens=6, stream=True)
        until(lambda: len(engine.submitted) == 1)
        (seq,) = engine.submitted
        served.call(lambda: engine.step(SequenceUpdate(seq.seq_id, [97]), num_running=1))
        time.sleep(0.1)
        served.call(lambda: engine.step(last(seq.seq_id, [98, 99, 100, 101, 102])))
        asked.answer()
        found = values(served)
    assert found["lab_inter_chunk_latency_seconds_count"] == 1
    assert found["lab_inter_chunk_latency_seconds_sum"] >= 0.1
    assert found["lab_inter_token_latency_seconds_count"] == 5
    assert found["lab_inter_token_latency_seconds_sum"] == pytest.approx(engine.step_s)


def test_openmetrics_comes_where_it_is_asked_for_with_the_id_of_a_request(served: Served) -> None:
    engine_id = "slow-" + "x" * 123
    with serving() as other:
        other.post(prompt="a", max_tokens=3, request_id=engine_id)
        page = CLIENT.get(other.url + "/metrics", headers={"accept": "application/openmetrics-text"})
        plain = other.get("/metrics")
    assert page.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert " # {" not in plain.text
    exemplars = {
        sample.name: sample.exemplar.labels["request_id"]
        for family in openmetrics_families(page.text)
        for sample in family.samples
        if sample.exemplar
    }
    assert set(exemplars.values()) == {engine_id[:118]}
    assert {name.removesuffix("_bucket") for name in exemplars} == {
        "lab_time_to_first_token_seconds",
        "lab_request_latency_seconds",
        "lab_request_queue_time_seconds",
        "lab_request_prefill_time_seconds",
        "lab_request_decode_time_seconds",
        "lab_request_time_per_output_token_seconds",
    }


def test_a_page_says_what_the_client_library_would_write() -> None:
    metrics = Metrics('a "quoted" one', "back\\slash", "two\nlines", 100)
    metrics.starting("1.0", 128, lambda: None)
    metrics.first_token("id-1", 0.25)
    metrics.request_rejected("timeout")
    families = list(metrics.collect())
    registry = CollectorRegistry()
    registry.collect = lambda: iter(families)  # type: ignore[method-assign]
    for write, read, accept in (
        (generate_latest, text_string_to_metric_families, ""),
        (generate_openmetrics, openmetrics_families, "text/plain;q=0.1, application/openmetrics-text;q=0.9"),
    ):
        ours = page_of(families, accept)[0].decode()
        theirs = write(registry).decode()  # type: ignore[operator]
        assert [(f.name, f.type, f.documentation, f.samples) for f in read(ours)] == [
            (f.name, f.type, f.documentation, f.samples) for f in read(theirs)
        ]


def test_refusals_before_any_route_are_counted() -> None:
    with serving(API_KEY="secret-key") as served:
        served.get("/model")
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(b"no HTTP at all\r\n\r\n")
            connection.recv(4096)
        page = CLIENT.get(served.url + "/metrics", headers={"authorization": "Bearer secret-key"}).text
    for reason in ("invalid_api_key", "invalid_http"):
        (line,) = [line for line in page.splitlines() if f'reason="{reason}"' in line]
        assert line.endswith(" 1.0")


def test_a_crash_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(read_settings({"BACKEND": "null"}, env_file=None))
    monkeypatch.setattr(service, "model_card", lambda: 1 / 0)
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        assert client.get("/model").status_code == 500
    assert b'reason="internal_error"} 1.0' in service.metrics.text()


def test_prefix_hits_are_counted_in_tokens() -> None:
    with serving(BACKEND="null", KV_POLICY="paged", PREFIX_CACHE=1) as served:
        answers = [served.post(prompt="x" * 50, max_tokens=2).json() for _ in range(2)]
        found = values(served)
    assert [answer["choices"][0]["timings"]["num_cached_tokens"] for answer in answers] == [0, 48]
    assert (found["lab_prefix_cache_queries_total"], found["lab_prefix_cache_hits_total"]) == (100, 48)
