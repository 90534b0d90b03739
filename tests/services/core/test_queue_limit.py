"""How much may wait, and the wait that a refusal advises."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from services.core.queue_limit import MAX_RETRY_AFTER_S, QueueLimit
from services.engine.messages import SequenceUpdate
from services.errors import ApiError
from tests.services.http.test_app import Background
from tests.services.scripted_engine import TIMINGS, ScriptedEngine, last
from tests.services.served import CLIENT, lab_serve, serving, until


def refused(
    limit: QueueLimit,
    num_waiting: int,
    waiting_tokens: int,
    now_s: float = 0.0,
    *,
    waiting_prompts: int = 0,
    num_prompts: int = 1,
) -> ApiError | None:
    try:
        with limit.enter(num_waiting, waiting_prompts, waiting_tokens, num_prompts, now_s):
            return None
    except ApiError as error:
        return error


def test_requests_and_tokens_are_bounded_apart() -> None:
    limit = QueueLimit(max_requests=3, max_tokens=100)
    assert refused(limit, 2, 99) is None
    full = refused(limit, 3, 0)
    assert full is not None
    assert (full.status, full.code, full.retry_after_s) == (429, "queue_full", 1)
    assert "3 requests wait" in full.message
    full = refused(limit, 1, 100)
    assert full is not None
    assert "100 prompt tokens may wait" in full.message


def test_prompts_are_bounded_as_requests_are() -> None:
    limit = QueueLimit(max_requests=8, max_tokens=100)
    assert refused(limit, 1, 0, waiting_prompts=5, num_prompts=3) is None
    full = refused(limit, 1, 0, waiting_prompts=5, num_prompts=4)
    assert full is not None
    assert (full.status, full.code) == (429, "queue_full")
    assert "8 prompts may wait" in full.message
    assert refused(limit, 0, 0, num_prompts=256) is None


def test_those_being_tokenized_have_their_places() -> None:
    limit = QueueLimit(max_requests=2, max_tokens=100)
    with limit.enter(0, 0, 0, 1, 0.0):
        with limit.enter(0, 0, 0, 1, 0.0):
            assert refused(limit, 0, 0) is not None
        assert refused(limit, 0, 0) is None
        assert refused(limit, 0, 0, num_prompts=2) is not None


def test_a_long_prompt_is_welcome_where_nothing_waits() -> None:
    limit = QueueLimit(max_requests=9, max_tokens=100)
    limit.check_tokens(0, 0, 5000, 0.0)
    with pytest.raises(ApiError):
        limit.check_tokens(1, 1, 100, 0.0)


@pytest.mark.parametrize(
    ("per_s", "num_waiting", "advised_s"), [(10.0, 40, 4), (10.0, 41, 5), (100.0, 3, 1), (0.5, 100, 60)]
)
def test_the_advice_is_what_waits_over_the_measured_rate(
    per_s: float, num_waiting: int, advised_s: int
) -> None:
    limit = QueueLimit(max_requests=3, max_tokens=100)
    for start in range(41):
        limit.started(1, num_waiting, start / per_s)
    assert limit.retry_after_s(num_waiting, 40 / per_s) == advised_s


def test_a_service_that_has_stalled_advises_longer_and_longer() -> None:
    limit = QueueLimit(max_requests=3, max_tokens=100)
    for start in range(11):
        limit.started(1, 5, start / 10)
    assert limit.retry_after_s(10, 1.0) == 1
    assert limit.retry_after_s(10, 9.0) == 9
    assert limit.retry_after_s(10, 1e6) == MAX_RETRY_AFTER_S


def test_idle_time_is_no_part_of_the_rate() -> None:
    limit = QueueLimit(max_requests=3, max_tokens=100)
    limit.started(1, 5, 0.0)
    limit.started(1, 0, 0.1)
    for start in range(11):
        limit.started(1, 5, 1000 + start / 10)
    assert limit.retry_after_s(20, 1001.0) == 2


def test_prompt_tokens_that_wait_fill_the_queue() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_QUEUE_TOKENS=100) as served:
        first = Background(served, prompt="a" * 300)
        until(lambda: len(engine.submitted) == 1)
        refused = served.post(prompt="a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "100 prompt tokens" in refused.json()["error"]["message"]
        served.call(lambda: engine.step(last(engine.submitted[0].seq_id, [97])))
        assert first.answer().status_code == 200
        second = Background(served, prompt="a")
        until(lambda: len(engine.submitted) == 2)
        served.call(lambda: engine.step(last(engine.submitted[1].seq_id, [97])))
        assert second.answer().status_code == 200


def test_a_request_of_many_prompts_makes_room_for_one() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_QUEUE=2) as served:
        many = Background(served, prompt=["a"] * 16)
        until(lambda: len(engine.submitted) == 16)
        seq_ids = [seq.seq_id for seq in engine.submitted]
        served.call(lambda: engine.step(num_running=16, prefilling_seq_ids=seq_ids))
        waiting = [Background(served, prompt="b") for _ in range(2)]
        until(lambda: len(engine.submitted) == 18)
        assert served.post(prompt="b").status_code == 429

        begun = SequenceUpdate(seq_ids[0], [97])
        served.call(lambda: engine.step(begun, num_running=16, prefilling_seq_ids=seq_ids[1:]))
        assert served.post(prompt="b").status_code == 429
        served.call(lambda: engine.step(*(last(seq.seq_id, [97]) for seq in engine.submitted)))
        assert [request.answer().status_code for request in (many, *waiting)] == [200] * 3


def test_requests_that_end_without_a_token_are_no_part_of_the_rate() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_QUEUE=6) as served:
        waiting = [Background(served, prompt="a") for _ in range(6)]
        until(lambda: len(engine.submitted) == 6)
        ids = [seq.seq_id for seq in engine.submitted]
        starts: list[tuple[int, int]] = []
        with patch.object(served.service._limit, "started", lambda *counts: starts.append(counts[:2])):
            aborted = SequenceUpdate(ids[0], [], "abort", TIMINGS)
            broken = SequenceUpdate(ids[1], [], "error", None, "broken")
            served.call(lambda: engine.step(aborted, broken))
            served.call(lambda: engine.step(SequenceUpdate(ids[2], [97])))
            served.call(lambda: engine.step(*(last(i, [97]) for i in ids[2:])))
        assert starts == [(0, 4), (1, 3), (3, 0)]
        assert sorted(request.answer().status_code for request in waiting) == [200] * 5 + [500]


def test_a_refusal_comes_before_the_headers_of_a_stream_and_is_counted() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_QUEUE=1) as served:
        waiting = Background(served, prompt="a")
        until(lambda: len(engine.submitted) == 1)
        refused = served.post(prompt="a", stream=True)
        assert (refused.status_code, refused.headers["content-type"]) == (429, "application/json")
        assert int(refused.headers["retry-after"]) >= 1
        assert 'reason="queue_full"' in served.get("/metrics").text
        served.call(lambda: engine.step(last(engine.submitted[0].seq_id, [97])))
        assert waiting.answer().status_code == 200


def test_the_server_bounds_how_long_a_request_takes() -> None:
    with lab_serve(NULL_STEP_MS=50, MAX_TIMEOUT_S=0.5) as lab:
        lab.wait_ready()
        fields = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True}
        for timeout in ({}, {"timeout_s": 3600}):
            answer = CLIENT.post(lab.url + "/generate", json=fields | timeout)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
            assert "0.5 s" in answer.json()["error"]["message"]


def test_a_few_requests_of_many_prompts_fill_the_queue() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_QUEUE=40) as served:
        first = Background(served, prompt=["a"] * 100)  # nothing waits before it
        until(lambda: len(engine.submitted) == 100)
        assert served.post(prompt="a").status_code == 429
        served.call(lambda: engine.step(num_running=70))
        assert served.post(prompt="a", n=11).status_code == 429
        second = Background(served, prompt="a", n=10)
        until(lambda: len(engine.submitted) == 110)
        served.call(lambda: engine.step(*(last(seq.seq_id, [97]) for seq in engine.submitted)))
        assert [request.answer().status_code for request in (first, second)] == [200, 200]


def test_who_left_takes_room_until_the_engine_says_so() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_QUEUE=10) as served:
        cancelled = Background(served, prompt=["a"] * 100, timeout_s=0.2)
        assert cancelled.answer().status_code == 504
        assert served.post(prompt="a").status_code == 429
        ends = [SequenceUpdate(seq_id, [], "abort", TIMINGS) for seq_id in engine.cancelled]
        assert len(ends) == 100
        served.call(lambda: engine.step(*ends))
        other = Background(served, prompt="a")
        until(lambda: len(engine.submitted) == 101)
        served.call(lambda: engine.step(last(engine.submitted[-1].seq_id, [97])))
        assert other.answer().status_code == 200
