"""Who asks when and what leaves together, drawn event by event, and what holds for any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.plan.corpus import Prompt
from harness.plan.load_generator import Decision, LoadGenerator, TimedRequest
from harness.plan.schedule import Arrivals, Load, make_schedule

PROMPTS = [Prompt(id="p", prompt="x", max_tokens=1)]


def closed(num_requests: int, users: int, client_chunk: int = 1) -> LoadGenerator:
    schedule = make_schedule(PROMPTS, num_requests, Load(Arrivals.CLOSED, users), seed=1)
    return LoadGenerator(schedule, client_chunk=client_chunk)


def opened(num_requests: int, client_chunk: int = 1, max_in_flight: int = 1024) -> LoadGenerator:
    """One arrival a second."""
    schedule = make_schedule(PROMPTS, num_requests, Load(Arrivals.CONSTANT, rate=1.0), seed=1)
    return LoadGenerator(schedule, client_chunk=client_chunk, max_in_flight=max_in_flight)


def drawn(decision: Decision) -> str:
    """`2@5` is request 2, whose user waits since 5 s; `-2@5` is never sent."""
    sent, dropped = (
        [f"{request.planned.index}@{request.scheduled_s:g}" for request in requests]
        for requests in (decision.send, decision.drop)
    )
    return " ".join([*sent, *(f"-{text}" for text in dropped)])


def events(load: LoadGenerator, script: str) -> list[str]:
    """`a` is an arrival, `stop` a stop, `7` an answer that ended at 7 s."""
    found = []
    for event in script.split():
        decided = (
            load.arrive() if event == "a" else load.stop() if event == "stop" else load.end(float(event))
        )
        found.append(drawn(decided))
    return found


@pytest.mark.parametrize(
    ("load", "at_start", "script", "leaving"),
    [
        pytest.param(
            closed(5, users=2), ["0@10", "1@10"], "11 12 13 14 15",
            ["2@11", "3@12", "4@13", "", ""], id="each user asks at the end of the own answer",
        ),
        pytest.param(
            closed(6, users=3, client_chunk=2), ["", "0@10 1@10", ""], "11 12 13 14 15 16",
            ["2@10 3@11", "", "4@12 5@13", "", "", ""], id="a chunk fills as answers end",
        ),
        pytest.param(
            closed(7, users=3, client_chunk=16), ["", "", "0@10 1@10 2@10"], "11 12 13 14 15 16 17",
            ["", "", "3@11 4@12 5@13", "6@14", "", "", ""], id="all users wait, then the schedule ends",
        ),
        pytest.param(
            closed(2, users=9, client_chunk=4), ["", "0@10 1@10"], "11 12", ["", ""], id="users without work",
        ),
        pytest.param(
            closed(9, users=2, client_chunk=4), ["", "0@10 1@10"], "11 stop 12",
            ["", "-2@11", ""], id="what waits at a stop is not sent",
        ),
        pytest.param(
            opened(3), [], "a a 11.5 a 12.5 13", ["0@10", "1@11", "", "2@12", "", ""],
            id="an open loop waits for no answer",
        ),
        pytest.param(
            opened(5, client_chunk=2), [], "a a a a a a", ["", "0@10 1@11", "", "2@12 3@13", "4@14", ""],
            id="an open loop's chunk waits for arrivals",
        ),
        pytest.param(
            opened(4, max_in_flight=2), [], "a a a 12.5 a", ["0@10", "1@11", "-2@12", "", "3@13"],
            id="one too many is dropped, the next finds room",
        ),
        pytest.param(
            opened(3, client_chunk=4, max_in_flight=2), [], "a a a", ["", "", "0@10 1@11 -2@12"],
            id="the last one is dropped: nobody can join those that wait",
        ),
        pytest.param(
            opened(3, client_chunk=2), [], "a stop a", ["", "-0@10", ""], id="no arrival after a stop",
        ),
    ],
)  # fmt: skip
def test_what_leaves(load: LoadGenerator, at_start: list[str], script: str, leaving: list[str]) -> None:
    assert [drawn(decision) for decision in load.start(10.0)] == at_start
    assert events(load, script) == leaving


def thinking(
    num_requests: int, users: int, client_chunk: int = 1, shard: tuple[int, int] = (0, 1), **how: float | str
) -> LoadGenerator:
    load = Load(Arrivals.CLOSED, users, **how)  # type: ignore[arg-type]
    schedule = make_schedule(PROMPTS, num_requests, load, seed=1)
    return LoadGenerator(schedule.part(*shard), client_chunk=client_chunk)


def ready(decision: Decision) -> list[float]:
    return [request.scheduled_s for request in decision.later]


def test_a_user_thinks_before_each_request_but_the_first() -> None:
    load = thinking(3, users=1, think_ms=500.0, think="fixed")
    assert [drawn(decision) for decision in load.start(10.0)] == ["0@10"]
    thinks = load.end(11.0)
    assert (drawn(thinks), ready(thinks)) == ("", [11.5])
    # Woken late, it has thought longer: its wait counts from then.
    assert drawn(load.wake(thinks.later[0], 11.6)) == "1@11.6"
    stopped = load.end(12.0)
    load.stop()
    assert drawn(load.wake(stopped.later[0], 12.5)) == ""


def test_a_chunk_waits_for_those_who_still_think_and_leaves_with_the_last() -> None:
    load = thinking(4, users=2, client_chunk=3, think_ms=1000.0, think="fixed")
    assert [drawn(decision) for decision in load.start(0.0)] == ["", "0@0 1@0"]
    first, second = load.end(1.0), load.end(1.5)
    assert drawn(load.wake(first.later[0], 2.0)) == "", "the other user may join"
    assert drawn(load.wake(second.later[0], 2.5)) == "2@2 3@2.5"


def test_users_begin_within_the_ramp_those_of_shards_between_each_other() -> None:
    begins = [ready(decision) for decision in thinking(8, users=4, ramp_s=2.0).start(10.0)]
    assert begins == [[], [10.5], [11.0], [11.5]]
    second = thinking(8, users=4, shard=(1, 2), ramp_s=2.0).start(10.0)
    assert [ready(decision) for decision in second] == [[10.5], [11.5]]


def test_a_cap_that_was_hit_shows() -> None:
    load = opened(3, max_in_flight=1)
    load.start(0.0)
    assert events(load, "a") == ["0@0"]
    assert not load.hit_in_flight_cap
    assert events(load, "a") == ["-1@1"]
    assert load.hit_in_flight_cap


class Traffic:
    """Drives a generator in an order that hypothesis draws, and checks each decision as it comes."""

    def __init__(self, load: LoadGenerator, client_chunk: int, limit: int) -> None:
        self.load, self._client_chunk, self._limit = load, client_chunk, limit
        self.sent: list[TimedRequest] = []
        self.dropped: list[TimedRequest] = []
        self.num_unanswered = 0
        self.short_chunks = 0

    def follow(self, decision: Decision) -> None:
        self.sent += decision.send
        self.dropped += decision.drop
        self.num_unanswered += len(decision.send)
        assert len(decision.send) <= self._client_chunk
        assert self.num_unanswered <= self._limit
        self.short_chunks += 0 < len(decision.send) < self._client_chunk

    def end(self, at_s: float) -> None:
        self.num_unanswered -= 1
        self.follow(self.load.end(at_s))


sizes = st.integers(1, 40)
few = st.integers(1, 9)


@given(num=sizes, users=few, client_chunk=few)
def test_a_closed_loop_sends_all_in_order_and_never_stands_still(
    num: int, users: int, client_chunk: int
) -> None:
    traffic = Traffic(closed(num, users, client_chunk), client_chunk, users)
    for decision in traffic.load.start(0.0):
        traffic.follow(decision)
    ends_s = [0.0] * min(users, num)
    for number in range(num):
        assert traffic.num_unanswered, "all wait for one another"
        traffic.end(number + 1.0)
        ends_s.append(number + 1.0)
    assert [request.planned.index for request in traffic.sent] == list(range(num))
    # Users wait from the start, or from the end of their last answer; the first to end is the first to ask.
    assert [request.scheduled_s for request in traffic.sent] == ends_s[:num]
    assert traffic.num_unanswered == 0
    assert traffic.dropped == []
    if users >= client_chunk:
        assert traffic.short_chunks <= 1  # the schedule's last


@settings(max_examples=200)
@given(num=sizes, client_chunk=few, cap=few, draws=st.lists(st.booleans()), stop_at=st.none() | sizes)
def test_an_open_loop_follows_its_offsets_up_to_the_cap(
    num: int, client_chunk: int, cap: int, draws: list[bool], stop_at: int | None
) -> None:
    traffic = Traffic(opened(num, client_chunk, cap), client_chunk, cap)
    assert traffic.load.start(100.0) == []
    ends = iter(draws)
    for number, offset_s in enumerate(traffic.load.offsets_s):
        if number == stop_at:
            traffic.follow(traffic.load.stop())
        traffic.follow(traffic.load.arrive())
        while traffic.num_unanswered and next(ends, False):
            traffic.end(100.0 + offset_s)
    came = range(num if stop_at is None else min(num, stop_at))
    assert [request.planned.index for request in traffic.sent] == sorted(
        {*came} - {request.planned.index for request in traffic.dropped}
    )
    for request in traffic.sent + traffic.dropped:
        assert request.scheduled_s == 100.0 + (request.planned.offset_s or 0.0)
    assert traffic.load.hit_in_flight_cap or stop_at is not None or traffic.dropped == []
