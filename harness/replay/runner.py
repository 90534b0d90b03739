"""Replays a schedule: who asks when, and which prompts leave together.

What enters are a `Schedule`, a client and the number of prompts that the service wants in one request;
what leaves are completed `Answer`s, handed to a callback one by one. A closed loop keeps `concurrency`
users asking, an open loop follows the clock and waits for no answer. Knows no files and no percentiles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from harness.client.answer import Answer, fail_all
from harness.client.stream import StreamClient
from harness.plan.schedule import PlannedRequest, Schedule
from harness.replay.pacer import pace

OnComplete = Callable[[Answer], None]


@dataclass(frozen=True, slots=True)
class ReplayEnd:
    """How a replay went as a whole. Instants are seconds of `time.perf_counter`."""

    started_s: float
    ended_s: float
    hit_in_flight_cap: bool
    was_interrupted: bool


class Replay:
    """One contiguous run of a schedule against one service."""

    def __init__(
        self,
        client: StreamClient,
        schedule: Schedule,
        on_complete: OnComplete,
        *,
        client_chunk: int = 1,
        max_in_flight: int = 1024,
    ) -> None:
        self._client = client
        self._schedule = schedule
        self._on_complete = on_complete
        self._client_chunk = client_chunk
        self._max_in_flight = max_in_flight
        self._next = 0
        self._num_groups = 0
        self._num_open = 0
        self._num_users = 0
        self._pending: list[Answer] = []
        self._requests: set[asyncio.Task[None]] = set()
        self._started_s = 0.0
        self._hit_cap = False
        self._interrupted: str | None = None

    async def run(self, start_s: float | None = None) -> ReplayEnd:
        """Play the whole schedule, from `start_s` on if given, and wait for the last answer."""
        self._started_s = perf_counter() if start_s is None else start_s
        await asyncio.sleep(max(0.0, self._started_s - perf_counter()))
        if self._schedule.load.is_open:
            await pace(self._offsets(), self._started_s, self._arrive, lambda: self._interrupted is not None)
        else:
            self._num_users = min(self._schedule.num_users, len(self._schedule.requests))
            await asyncio.gather(*(self._user() for _ in range(self._num_users)))
        while self._requests:
            await asyncio.wait(tuple(self._requests))
        # Completed answers are handed over by callbacks that the loop still has to call.
        await asyncio.sleep(0)
        return ReplayEnd(self._started_s, perf_counter(), self._hit_cap, self._interrupted is not None)

    def interrupt(self, reason: str) -> None:
        """Ask no more and end what is in flight; its answers complete with `reason` as their error."""
        if self._interrupted is not None:
            return
        self._interrupted = reason
        self._next = len(self._schedule.requests)
        pending, self._pending = self._pending, []
        now_s = perf_counter()
        for answer in pending:
            answer.fail(reason, now_s)
        self._client.abort_all(reason)

    @property
    def _is_exhausted(self) -> bool:
        return self._next >= len(self._schedule.requests)

    def _take(self) -> PlannedRequest | None:
        if self._is_exhausted:
            return None
        planned = self._schedule.requests[self._next]
        self._next += 1
        return planned

    # Closed loop

    async def _user(self) -> None:
        """Ask, wait for the end of the own answer, ask again."""
        loop = asyncio.get_running_loop()
        scheduled_s = self._started_s
        while (planned := self._take()) is not None:
            ended: asyncio.Future[float] = loop.create_future()
            self._ask(planned, scheduled_s, ended)
            scheduled_s = await ended

    # Open loop

    def _offsets(self) -> list[float]:
        return [planned.offset_s or 0.0 for planned in self._schedule.requests]

    def _arrive(self) -> None:
        planned = self._take()
        if planned is None:
            return
        scheduled_s = self._started_s + (planned.offset_s or 0.0)
        if self._num_open >= self._max_in_flight:
            self._hit_cap = True
            answer = Answer(planned, scheduled_s, on_complete=self._completed)
            answer.fail(f"not sent: {self._max_in_flight} requests were already in flight", perf_counter())
            self._send_pending_if_due()
            return
        self._ask(planned, scheduled_s, None)

    # Both

    def _ask(self, planned: PlannedRequest, scheduled_s: float, ended: asyncio.Future[float] | None) -> None:
        def on_ended(answer: Answer) -> None:
            self._num_open -= 1
            if ended is not None and not ended.done():
                assert answer.finish_s is not None
                ended.set_result(answer.finish_s)

        self._num_open += 1
        self._pending.append(Answer(planned, scheduled_s, on_ended=on_ended, on_complete=self._completed))
        self._send_pending_if_due()

    def _send_pending_if_due(self) -> None:
        """Send what waits once it fills a chunk, or once no further prompt can join it."""
        pending = self._pending
        if not pending:
            return
        everyone_waits = not self._schedule.load.is_open and len(pending) == self._num_users
        if len(pending) < self._client_chunk and not everyone_waits and not self._is_exhausted:
            return
        self._pending = []
        task = asyncio.get_running_loop().create_task(self._client.send(pending, self._num_groups))
        self._num_groups += 1
        self._requests.add(task)

        def on_done(done: asyncio.Task[None]) -> None:
            self._requests.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                fail_all(pending, f"the harness itself failed: {error!r}", perf_counter())

        task.add_done_callback(on_done)

    def _completed(self, answer: Answer) -> None:
        # Later in this turn of the loop: the user's next request goes out first.
        asyncio.get_running_loop().call_soon(self._on_complete, answer)
