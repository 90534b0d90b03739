"""Which request is asked for when, and which prompts leave together, as decisions of a pure object.

It has no clock, no socket and no event loop: whoever drives it says what happened and at which instant, and
does what it answers. The streaming client drives it in real time, a simulator may on a virtual clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.plan.schedule import PlannedRequest, Schedule


@dataclass(slots=True)  # not frozen, which takes three times as long: each request makes one
class TimedRequest:
    """`scheduled_s`: the instant from which its user waits, on the driver's clock."""

    planned: PlannedRequest
    scheduled_s: float


@dataclass(slots=True)  # not frozen, which takes three times as long: each request makes two
class Decision:
    """What follows from one event: prompts of one HTTP request, in order, and prompts that are never sent."""

    send: tuple[TimedRequest, ...] = ()
    drop: tuple[TimedRequest, ...] = ()
    later: tuple[TimedRequest, ...] = ()
    """Whose users are not ready yet: `wake` is due for each at its instant or later."""


_NOTHING = Decision()


class LoadGenerator:
    """Walks through a schedule once.

    Closed loop: each user asks at the start, or within the ramp, and after each own answer, once it has
    thought. Open loop: each request comes at its planned offset, whatever became of the others. Prompts wait
    until `client_chunk` of them leave as one request, or until no further prompt can join them.
    """

    def __init__(self, schedule: Schedule, *, client_chunk: int = 1, max_in_flight: int = 1024) -> None:
        self.is_open = schedule.load.is_open
        self.hit_in_flight_cap = False
        self._requests, self._num = schedule.requests, len(schedule.requests)
        self._num_users = 0 if self.is_open else min(schedule.num_users, len(schedule.requests))
        index, of = schedule.shard
        ramp_s = schedule.load.ramp_s or 0.0
        # Users of all shards begin evenly spread, each shard's among them.
        self._begins_s = [
            ramp_s * (index + of * user) / schedule.load.concurrency for user in range(self._num_users)
        ]
        self._num_later = 0
        self._client_chunk = client_chunk
        self._max_in_flight = max_in_flight
        self._start_s = 0.0
        self._next = 0
        self._num_in_flight = 0
        self._pending: list[TimedRequest] = []

    @property
    def offsets_s(self) -> list[float]:
        """When `arrive` is due, from the start; empty for a closed loop."""
        return [planned.offset_s or 0.0 for planned in self._requests] if self.is_open else []

    @property
    def next_arrival_s(self) -> float | None:
        """When `arrive` is due next; None behind the last request, and in a closed loop."""
        if not self.is_open or self._is_exhausted:
            return None
        return self._start_s + (self._requests[self._next].offset_s or 0.0)

    def start(self, start_s: float) -> list[Decision]:
        """The replay begins: all users of a closed loop ask, or will within the ramp."""
        self._start_s = start_s
        return [self._ask_after(start_s, begin_s) for begin_s in self._begins_s if not self._is_exhausted]

    def arrive(self) -> Decision:
        """The next request of an open loop is due. Above `max_in_flight` it is dropped."""
        if self._is_exhausted:
            return _NOTHING
        planned = self._take()
        scheduled_s = self._start_s + (planned.offset_s or 0.0)
        if self._num_in_flight < self._max_in_flight:
            return self._ask(planned, scheduled_s)
        self.hit_in_flight_cap = True
        return Decision(self._leaving(), (TimedRequest(planned, scheduled_s),))

    def end(self, ended_s: float) -> Decision:
        """An answer ended, or failed. In a closed loop its user asks again, once it has thought."""
        self._num_in_flight -= 1
        if self.is_open or self._is_exhausted:
            return _NOTHING
        return self._ask_after(ended_s, self._requests[self._next].think_s)

    def wake(self, request: TimedRequest, now_s: float) -> Decision:
        """A user is ready. It waits from `now_s` on: one that is woken late has thought longer."""
        if not self._num_later:
            return _NOTHING
        self._num_later -= 1
        return self._ask(request.planned, now_s)

    def stop(self) -> Decision:
        """No request is asked for any more, and none that waits is sent."""
        self._next = self._num
        dropped, self._pending = tuple(self._pending), []
        self._num_in_flight -= len(dropped)
        self._num_later = 0
        return Decision(drop=dropped)

    @property
    def _is_exhausted(self) -> bool:
        return self._next == self._num

    def _take(self) -> PlannedRequest:
        self._next += 1
        return self._requests[self._next - 1]

    def _ask_after(self, now_s: float, delay_s: float) -> Decision:
        planned = self._take()
        if not delay_s:
            return self._ask(planned, now_s)
        self._num_later += 1
        return Decision(later=(TimedRequest(planned, now_s + delay_s),))

    def _ask(self, planned: PlannedRequest, scheduled_s: float) -> Decision:
        self._num_in_flight += 1
        self._pending.append(TimedRequest(planned, scheduled_s))
        return Decision(self._leaving())

    def _leaving(self) -> tuple[TimedRequest, ...]:
        """All that wait, once they fill a chunk or nobody is left who could join them."""
        num_pending = len(self._pending)
        # When all users wait, none is left to fill the chunk. In an open loop the clock fills it.
        is_last = self._is_exhausted and not self._num_later
        nobody_can_join = is_last or (not self.is_open and num_pending == self._num_users)
        if num_pending < self._client_chunk and not nobody_can_join:
            return ()
        leaving, self._pending = tuple(self._pending), []
        return leaving
