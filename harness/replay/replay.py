"""One replay from its warm-up to its last answer, on an event loop of its own.

What enters are a server, a schedule and two callbacks; what leaves is how it went, what the machine did
meanwhile and the service's steps. Ctrl-C and SIGTERM end it cleanly, with a row for every request that
was out. Garbage collection stands still while answers are measured. Writes no files.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter, time

from adapters.base import LabError
from harness.client.answer import Answer
from harness.client.control import Control
from harness.client.event_loop import loop_factory
from harness.client.server import Server
from harness.client.stream import StreamClient
from harness.plan.schedule import Schedule
from harness.plan.warmup import make_warmup
from harness.replay.machine import MachineSample
from harness.replay.play import play, stops
from harness.replay.processes import Part, play_in_processes
from harness.replay.runner import OnComplete, Replay, ReplayEnd
from harness.results.manifest import MachineUse
from harness.settings import HarnessSettings
from services.contract import StepLine


@dataclass(frozen=True, slots=True)
class ReplayResult:
    end: ReplayEnd
    use: MachineUse
    steps: list[StepLine]
    num_dropped_steps: int
    round_trip_s: float | None
    """Of the idle server, before the replay."""


def replay(
    server: Server,
    schedule: Schedule,
    settings: HarnessSettings,
    *,
    announce: Callable[[str], None],
    begin: Callable[[], None],
    on_complete: OnComplete,
) -> ReplayResult:
    """Warm the server up, then measure. `begin` is called between the two.

    Raises:
        LabError: every warm-up request failed, so that the rest would too.
        KeyboardInterrupt: told to stop before the first measured request.
    """
    with (
        Control(server.url, server.target.api_key) as control,
        _signals_kept(),
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        client = StreamClient(server.target, timeout_s=settings.request_timeout_s)
        if settings.num_warmup:
            announce("warming up")
            runner.run(_warm_up(client, server, settings.num_warmup))
        first_step = control.next_step() if server.card else None
        round_trip_s = control.round_trip_s()
        begin()
        before = MachineSample.take(server.pid)
        start_s = _shared_start(settings.start_at)
        if settings.processes == 1:
            end = runner.run(
                play(
                    client,
                    schedule,
                    on_complete,
                    client_chunk=server.client_chunk,
                    max_in_flight=settings.max_in_flight,
                    start_s=start_s,
                )
            )
        else:
            client.close()
            end = play_in_processes(_parts(server, schedule, settings), on_complete, start_s)
        use = MachineSample.take(server.pid).use_since(before)
        use.harness_cpu_share /= settings.processes
        steps, num_dropped = ([], 0) if first_step is None else control.steps_since(first_step)
        return ReplayResult(end, use, steps, num_dropped, round_trip_s)


def _shared_start(start_at: float | None) -> float | None:
    """The wall-clock instant START_AT on the clock of the stamps.

    Raises:
        LabError: it has passed: the other shards are sending already.
    """
    if start_at is None:
        return None
    lead_s = start_at - time()
    if lead_s < 0:
        raise LabError(
            f"this shard is {-lead_s:.1f} s late for START_AT={start_at:.3f}: start all of them anew"
        )
    return perf_counter() + lead_s


def _parts(server: Server, schedule: Schedule, settings: HarnessSettings) -> list[Part]:
    of = settings.processes
    return [
        Part(
            target=replace(server.target, origin=replace(server.target.origin, tls=None)),
            is_tls=server.target.origin.tls is not None,
            schedule=schedule.part(index, of),
            client_chunk=server.client_chunk,
            max_in_flight=max(1, settings.max_in_flight // of),
            timeout_s=settings.request_timeout_s,
            group_step=of,
            group_offset=index,
        )
        for index in range(of)
    ]


async def _warm_up(client: StreamClient, server: Server, num_requests: int) -> None:
    answers: list[Answer] = []
    warmup = Replay(client, make_warmup(num_requests), answers.append, client_chunk=server.client_chunk)
    with stops(warmup):
        end = await warmup.run()
    if end.was_interrupted:
        raise KeyboardInterrupt
    errors = [answer.error for answer in answers if answer.error is not None]
    if len(errors) == num_requests:
        raise LabError(f"all {num_requests} warm-up requests failed, the first with: {errors[0]}")


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Event loops leave default handlers behind; put back what was there."""
    kept = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in kept:
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)
