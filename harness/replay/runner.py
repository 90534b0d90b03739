"""Drives a `LoadGenerator` with the clock and the streaming client, undisturbed and stoppable.

Every replay goes this way: the warm-up, the measured one, the one of each worker process. Garbage collection
stands still meanwhile. SIGINT and SIGTERM end the replay instead of the process, with a row for every request
that was out.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from time import perf_counter

from adapters.base import LabError
from harness.client.answer import Answer, fail_all
from harness.client.stream import StreamClient
from harness.plan.load_generator import Decision, LoadGenerator, TimedRequest
from harness.plan.schedule import Schedule
from harness.replay.interrupts import INTERRUPTED, on_interrupt
from harness.replay.pacer import pace

OnComplete = Callable[[Answer], None]
"""May raise LabError, which ends the replay."""


@dataclass(frozen=True, slots=True)
class ReplayEnd:
    """How a replay went as a whole. Instants are seconds of `time.perf_counter`."""

    started_s: float
    ended_s: float
    hit_in_flight_cap: bool
    was_interrupted: bool


class Replay:
    """One contiguous run of a schedule against one service; completed answers go to `on_complete`."""

    def __init__(
        self,
        client: StreamClient,
        schedule: Schedule,
        on_complete: OnComplete,
        *,
        client_chunk: int = 1,
        max_in_flight: int = 1024,
        group_ids: Iterator[int] | None = None,
    ) -> None:
        self._client = client
        self._load = LoadGenerator(schedule, client_chunk=client_chunk, max_in_flight=max_in_flight)
        self._too_many = f"not sent: {max_in_flight} requests were already in flight"
        self._on_complete = on_complete
        self._group_ids = group_ids or count()
        self._requests: set[asyncio.Task[None]] = set()
        self._thinking: set[asyncio.Task[None]] = set()
        self._was_interrupted = False
        self._not_kept: LabError | None = None

    async def run(self, start_s: float | None = None) -> ReplayEnd:
        """Send the whole schedule, from `start_s` on if given, and wait for the last answer.

        Raises:
            LabError: `on_complete` raised it. No more was asked then; all that was out has been handed over.
        """
        loop = asyncio.get_running_loop()

        def interrupt_soon() -> None:
            loop.call_soon_threadsafe(self.interrupt, INTERRUPTED)

        with on_interrupt(interrupt_soon), _collector_off():
            started_s = perf_counter() if start_s is None else start_s
            await asyncio.sleep(max(0.0, started_s - perf_counter()))
            for decision in self._load.start(started_s):
                self._follow(decision)
            if self._load.is_open:
                await pace(self._load.offsets_s, started_s, self._arrive, lambda: self._was_interrupted)
            while waiting := self._requests | self._thinking:
                await asyncio.wait(waiting)
            # Completed answers are handed over by callbacks that the loop still has to call.
            await asyncio.sleep(0)
        if self._not_kept is not None:
            raise self._not_kept
        return ReplayEnd(started_s, perf_counter(), self._load.hit_in_flight_cap, self._was_interrupted)

    def interrupt(self, reason: str) -> None:
        """Ask no more and end what is in flight; its answers complete with `reason` as their error."""
        if self._was_interrupted:
            return
        self._was_interrupted = True
        self._drop(self._load.stop().drop, reason)
        for user in self._thinking:
            user.cancel()
        self._client.abort_all(reason)

    def _arrive(self) -> None:
        self._follow(self._load.arrive())

    def _ended(self, answer: Answer) -> None:
        assert answer.finish_s is not None
        self._follow(self._load.end(answer.finish_s))

    def _follow(self, decision: Decision) -> None:
        self._drop(decision.drop, self._too_many)
        if decision.send:
            self._send(decision.send)
        for request in decision.later:
            user = asyncio.get_running_loop().create_task(self._think(request))
            self._thinking.add(user)
            user.add_done_callback(self._thinking.discard)

    async def _think(self, request: TimedRequest) -> None:
        # Timers round to a millisecond, and may come early by it.
        while (remaining_s := request.scheduled_s - perf_counter()) > 0:  # noqa: ASYNC110 - a clock, no event
            await asyncio.sleep(remaining_s)
        self._follow(self._load.wake(request, perf_counter()))

    def _drop(self, requests: Sequence[TimedRequest], reason: str) -> None:
        for request in requests:
            answer = Answer(request.planned, request.scheduled_s, on_complete=self._completed)
            answer.fail(reason, perf_counter())

    def _send(self, requests: Sequence[TimedRequest]) -> None:
        answers = [
            Answer(request.planned, request.scheduled_s, on_ended=self._ended, on_complete=self._completed)
            for request in requests
        ]
        task = asyncio.get_running_loop().create_task(self._client.send(answers, next(self._group_ids)))
        self._requests.add(task)

        def on_done(done: asyncio.Task[None]) -> None:
            self._requests.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                fail_all(answers, f"the harness itself failed: {error!r}", perf_counter())

        task.add_done_callback(on_done)

    def _completed(self, answer: Answer) -> None:
        # Later in this turn of the loop: the user's next request goes out first.
        asyncio.get_running_loop().call_soon(self._hand_over, answer)

    def _hand_over(self, answer: Answer) -> None:
        try:
            self._on_complete(answer)
        except LabError as error:
            self._not_kept = error
            self.interrupt(f"not finished: {error}")


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
