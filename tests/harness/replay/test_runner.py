"""Who asks when, and which prompts leave together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from harness.client.answer import Answer
from harness.client.connection import Origin
from harness.client.stream import StreamClient
from harness.client.target import Target
from harness.plan.corpus import Prompt
from harness.plan.schedule import Arrivals, Load, make_schedule
from harness.plan.warmup import make_warmup
from harness.replay.runner import Replay, ReplayEnd
from harness.results.formulas import send_lag_s
from harness.results.record import ReplayLabels, make_row, make_table, to_frame
from tests.harness.fake_server import (
    Answering,
    FakeServer,
    answer_all,
    as_list,
    json_response,
    slowly,
    wait_until,
)

PROMPTS = [Prompt(id=f"p{i:02d}", prompt=f"prompt {i}", max_tokens=1 + i % 5) for i in range(30)]
LABELS = ReplayLabels("r", "v", "v", "b", "m", 0)


def play(
    num_requests: int,
    *,
    answer: Answering = answer_all,
    concurrency: int = 4,
    rate: float | None = None,
    think_ms: float | None = None,
    ramp_s: float | None = None,
    client_chunk: int = 1,
    max_in_flight: int = 1024,
    answers: list[Answer] | None = None,
    interrupt_when: Callable[[FakeServer], bool] | None = None,
) -> tuple[list[Answer], ReplayEnd, FakeServer]:
    arrivals = Arrivals.CLOSED if rate is None else Arrivals.CONSTANT
    load = Load(arrivals, concurrency, rate, think_ms=think_ms, ramp_s=ramp_s)
    schedule = make_schedule(PROMPTS, num_requests, load, seed=1)
    answers = [] if answers is None else answers

    async def main() -> ReplayEnd:
        client = StreamClient(Target(Origin("127.0.0.1", server.port), "/generate"), timeout_s=10)
        replay = Replay(
            client, schedule, answers.append, client_chunk=client_chunk, max_in_flight=max_in_flight
        )
        running = asyncio.create_task(replay.run())
        if interrupt_when is not None:
            await wait_until(lambda: interrupt_when(server))
            replay.interrupt("told to stop")
        end = await running
        client.close()
        return end

    with FakeServer(answer) as server:
        return answers, asyncio.run(main()), server


def sizes(server: FakeServer) -> list[int]:
    return [len(as_list(json.loads(body)["prompt"])) for body in server.bodies]


def test_every_planned_request_is_answered_once() -> None:
    answers, end, server = play(30)
    assert sorted(answer.planned.index for answer in answers) == list(range(30))
    assert [answer.error for answer in answers] == [None] * 30
    assert sizes(server) == [1] * 30
    assert not end.was_interrupted


def test_a_user_asks_again_the_moment_its_answer_ended() -> None:
    answers, end, _ = play(12, concurrency=3, answer=slowly(0.002))
    ends = {answer.finish_s for answer in answers}
    for answer in answers:
        assert answer.sent_s is not None
        assert answer.scheduled_s == end.started_s or answer.scheduled_s in ends
        assert answer.sent_s >= answer.scheduled_s
    assert sum(answer.scheduled_s == end.started_s for answer in answers) == 3


def test_users_who_think_and_ramp_are_all_answered_and_none_asks_early() -> None:
    answers, end, _ = play(12, concurrency=3, think_ms=20.0, ramp_s=0.06)
    assert sorted(answer.planned.index for answer in answers) == list(range(12))
    assert [answer.error for answer in answers] == [None] * 12
    ends = sorted(answer.finish_s or 0.0 for answer in answers)
    for answer in answers:
        begins = [end.started_s + user * 0.02 for user in range(3)] if answer.planned.index < 3 else []
        since = begins or [ended + answer.planned.think_s for ended in ends]
        assert answer.scheduled_s >= min(since)


def test_an_interrupt_ends_those_who_think() -> None:
    answers, end, _ = play(
        9, concurrency=2, think_ms=60_000.0, interrupt_when=lambda server: len(server.bodies) == 2
    )
    assert end.was_interrupted
    assert len(answers) == 2


def test_no_more_users_ask_than_there_are() -> None:
    running = 0
    most = 0

    async def counting(body: dict[str, Any]) -> AsyncIterator[bytes]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        async for piece in answer_all(body, 0.005):
            if b'finish_reason": "length' in piece:
                running -= 1
            yield piece

    play(20, concurrency=5, answer=counting)
    assert most == 5


@pytest.mark.parametrize(
    ("num_requests", "concurrency", "client_chunk", "expected"),
    [
        pytest.param(12, 4, 4, [4, 4, 4], id="chunk is the concurrency"),
        pytest.param(12, 6, 4, [4, 4, 4], id="more users than a chunk"),
        pytest.param(10, 4, 4, [4, 4, 2], id="the schedule ends within a chunk"),
        pytest.param(9, 3, 16, [3, 3, 3], id="all users wait"),
        pytest.param(5, 16, 16, [5], id="fewer requests than users"),
        pytest.param(11, 3, 2, [2, 2, 2, 2, 2, 1], id="one user over"),
    ],
)
def test_static_chunks(num_requests: int, concurrency: int, client_chunk: int, expected: list[int]) -> None:
    answers, _, server = play(num_requests, concurrency=concurrency, client_chunk=client_chunk)
    # In the order of sending: two requests that leave together may arrive either way round.
    groups = sorted({(answer.group_id, answer.group_size) for answer in answers})
    assert [size for _, size in groups] == expected
    assert sorted(sizes(server)) == sorted(expected)
    assert len(answers) == num_requests
    for group_id, size in enumerate(expected):
        group = [answer for answer in answers if answer.group_id == group_id]
        assert {answer.group_size for answer in group} == {size}
        assert len({answer.sent_s for answer in group}) == 1


def test_chunks_are_slices_of_the_schedule_whatever_the_timing() -> None:
    # Two connections may reach the server in either order; what they carry is the same.
    plays = [play(26, concurrency=8, client_chunk=4, answer=slowly(s))[2] for s in (0.0, 0.003)]
    assert sorted(plays[0].bodies) == sorted(plays[1].bodies)


def test_a_user_of_a_chunk_goes_on_at_its_own_finishing_entry() -> None:
    answers, _, _ = play(8, concurrency=4, client_chunk=4, answer=slowly(0.01))
    second = [answer for answer in answers if answer.group_id == 1]
    first_ends = sorted(answer.finish_s or 0.0 for answer in answers if answer.group_id == 0)
    assert sorted(answer.scheduled_s for answer in second) == first_ends
    assert first_ends[0] < first_ends[-1]
    # The wait for the chunk to fill counts from the schedule: the last user's end lets it go.
    assert all((answer.sent_s or 0.0) >= first_ends[-1] for answer in second)


def held(until: Callable[[], bool]) -> Answering:
    """Answers once a condition holds."""

    async def answer(body: dict[str, Any]) -> AsyncIterator[bytes]:
        await wait_until(until)
        async for piece in answer_all(body):
            yield piece

    return answer


def test_open_loop_follows_the_clock_and_not_the_answers() -> None:
    arrived: set[int] = set()

    async def answer_when_all_came(body: dict[str, Any]) -> AsyncIterator[bytes]:
        arrived.add(body["seed"])
        async for piece in held(lambda: len(arrived) == 10)(body):
            yield piece

    answers, end, _ = play(10, rate=100.0, answer=answer_when_all_came)
    for answer in answers:
        assert answer.error is None
        assert answer.scheduled_s == pytest.approx(end.started_s + answer.planned.index / 100, abs=1e-6)
        assert answer.sent_s is not None
        assert answer.sent_s >= answer.scheduled_s


def test_open_loop_chunks_wait_for_arrivals() -> None:
    answers, _, server = play(10, rate=200.0, client_chunk=4)
    assert sizes(server) == [4, 4, 2]
    lags = send_lag_s(to_frame(make_table([make_row(LABELS, answer) for answer in answers])))
    # A chunk leaves with its last prompt: its lag does not contain the wait of the first (15 ms).
    assert len(lags) == 3
    assert min(lags) >= 0
    waits = [answer.sent_s - answer.scheduled_s for answer in answers if answer.sent_s is not None]
    assert max(waits) >= 0.015


def test_too_many_in_flight_are_not_sent_and_show() -> None:
    answers: list[Answer] = []
    held_back = held(lambda: len(answers) >= 7)
    _, end, server = play(10, rate=1000.0, max_in_flight=3, answer=held_back, answers=answers)
    assert end.hit_in_flight_cap
    unsent = [answer for answer in answers if answer.sent_s is None]
    assert len(unsent) == 7
    assert {answer.error for answer in unsent} == {"not sent: 3 requests were already in flight"}
    assert len(server.bodies) == 3


def test_failed_requests_do_not_stop_the_others() -> None:
    async def every_third_fails(body: dict[str, Any]) -> AsyncIterator[bytes]:
        if body["seed"] % 3 == 0:
            yield json_response(500, {"error": {"message": "broken"}})
            return
        async for piece in answer_all(body):
            yield piece

    answers, _, _ = play(30, answer=every_third_fails)
    assert len(answers) == 30
    for answer in answers:
        assert answer.error == ("http 500: broken" if answer.planned.seed % 3 == 0 else None)


@pytest.mark.parametrize("rate", [None, 50.0])
def test_interrupt_leaves_a_row_for_every_request_that_was_out(rate: float | None) -> None:
    def is_short(body: dict[str, Any]) -> bool:
        return bool(body["max_tokens"] < 4)

    async def short_ones_only(body: dict[str, Any]) -> AsyncIterator[bytes]:
        async for piece in held(lambda: is_short(body))(body):
            yield piece

    def four_hang(server: FakeServer) -> bool:
        return sum(not is_short(json.loads(body)) for body in server.bodies) == 4

    answers, end, server = play(30, rate=rate, answer=short_ones_only, interrupt_when=four_hang)
    assert end.was_interrupted
    assert len(answers) == len(server.bodies) < 30
    for answer in answers:
        # A short one may have been on its way when the run was stopped.
        assert answer.error == "told to stop" or (answer.error is None and answer.planned.max_tokens < 4)
    assert sum(answer.planned.max_tokens >= 4 for answer in answers) == 4


def test_warm_up_shows_every_batch_size_and_no_measured_prompt() -> None:
    warmup = make_warmup(16)
    assert [request.max_tokens for request in warmup.requests] == list(range(2, 18))
    assert len({request.prompt for request in warmup.requests}) == 16
    measured = make_schedule(PROMPTS, 30, Load(Arrivals.CLOSED, 4), 1).requests
    assert not {r.prompt for r in measured} & {r.prompt for r in warmup.requests}
    assert not {r.seed for r in measured} & {r.seed for r in warmup.requests}
