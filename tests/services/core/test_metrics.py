"""The series: their names and labels, and that they count what happened."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.contract.timings import StepRecord
from services.core.metrics import LABELS, Metrics
from services.core.step_log import StepLog
from services.engine.messages import SequenceUpdate, StepReport
from tests.services.http.test_app import Background
from tests.services.scripted_engine import TIMINGS, ScriptedEngine, last
from tests.services.served import Served, serving, until

NAMES = {
    "lab_requests_total",
    "lab_tokens_generated_total",
    "lab_prompt_tokens_total",
    "lab_request_latency_seconds",
    "lab_time_to_first_token_seconds",
    "lab_inter_token_latency_seconds",
    "lab_request_queue_time_seconds",
    "lab_batch_size",
    "lab_active_requests",
    "lab_queue_depth",
    "lab_kv_cache_usage_ratio",
    "lab_padded_row_steps_total",
    "lab_requests_rejected_total",
    "lab_requests_cancelled_total",
    "lab_worker_restarts_total",
}


def values(served: Served) -> dict[str, float]:
    """Sample name, with a reason or a bucket where it has one, to value."""
    found = {}
    for family in text_string_to_metric_families(served.get("/metrics").text):
        for sample in family.samples:
            assert set(LABELS) <= set(sample.labels)
            assert ":" not in sample.name
            extra = "".join(f"/{value}" for name, value in sample.labels.items() if name not in LABELS)
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
    assert names == NAMES
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
    assert reasons == {
        "lab_requests_rejected_total/invalid_value": 1,
        "lab_requests_rejected_total/context_length_exceeded": 1,
        "lab_requests_rejected_total/timeout": 1,
    }
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


def test_the_step_log_counts_what_it_dropped() -> None:
    log = StepLog(max_steps=3)
    for _ in range(5):
        log.add(StepRecord(0, 1.0, 0.5, 1, 0, 1, 0, 0))
    assert log.page(0).startswith(b'{"steps":[{"step":2,')
    assert log.page(0).endswith(b'"next":5,"num_dropped":2}')
    assert log.page(1).endswith(b'"num_dropped":1}')
    assert log.page(4).count(b'"step":') == 1
    assert log.page(9) == b'{"steps":[],"next":5,"num_dropped":0}'


def test_the_step_log_comes_in_pages_that_lose_nothing() -> None:
    log = StepLog(max_steps=10, page_steps=4)
    records = [StepRecord(i, 0.1 * i, 1 / (i + 3), i, 2 * i, 3 * i, 4 * i, 5 * i) for i in range(13)]
    for record in records:
        log.add(record)
    seen, after = [], 0
    while (page := json.loads(log.page(after)))["steps"]:
        assert page["num_dropped"] == (3 if after == 0 else 0)
        seen += page["steps"]
        after = page["next"]
    assert seen == [asdict(record) for record in records[3:]]
    assert page["next"] == 13
