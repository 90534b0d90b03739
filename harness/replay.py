"""One replay from its warm-up to its last answer, on an event loop of its own.

What enters are a server, a schedule and two callbacks; what leaves is how it went, what the machine did
meanwhile and the service's steps. Ctrl-C and SIGTERM end it cleanly, with a row for every request that
was out. Garbage collection stands still while answers are measured. Writes no files.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from adapters.base import LabError
from harness.answer import Answer
from harness.arrivals import Schedule
from harness.client import StreamClient
from harness.control import Control
from harness.machine import MachineSample, MachineUse
from harness.manifest import loop_factory
from harness.runner import OnComplete, Replay, ReplayEnd
from harness.server import Server
from harness.settings import HarnessSettings
from harness.warmup import make_warmup
from services.contract import StepLine

INTERRUPTED = "interrupted: the harness was told to stop"


@dataclass(frozen=True, slots=True)
class ReplayResult:
    end: ReplayEnd
    use: MachineUse
    steps: list[StepLine]
    num_dropped_steps: int


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
        begin()
        measured = Replay(
            client,
            schedule,
            on_complete,
            client_chunk=server.client_chunk,
            max_in_flight=settings.max_in_flight,
        )
        before = MachineSample.take(server.pid)
        end = runner.run(_measure(client, measured))
        use = MachineSample.take(server.pid).use_since(before)
        steps, num_dropped = ([], 0) if first_step is None else control.steps_since(first_step)
        return ReplayResult(end, use, steps, num_dropped)


async def _warm_up(client: StreamClient, server: Server, num_requests: int) -> None:
    answers: list[Answer] = []
    warmup = Replay(client, make_warmup(num_requests), answers.append, client_chunk=server.client_chunk)
    with _stops(warmup):
        end = await warmup.run()
    if end.was_interrupted:
        raise KeyboardInterrupt
    errors = [answer.error for answer in answers if answer.error is not None]
    if len(errors) == num_requests:
        raise LabError(f"all {num_requests} warm-up requests failed, the first with: {errors[0]}")


async def _measure(client: StreamClient, measured: Replay) -> ReplayEnd:
    with _collector_off(), _stops(measured):
        end = await measured.run()
    client.close()
    return end


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


@contextmanager
def _stops(running: Replay) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM end this replay instead of the process."""
    loop = asyncio.get_running_loop()
    watched: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, running.interrupt, INTERRUPTED)
            watched.append(number)
    try:
        yield
    finally:
        for stopped in watched:
            loop.remove_signal_handler(stopped)


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
