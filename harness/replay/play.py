"""Plays a schedule once on the running event loop, undisturbed and stoppable.

What enters are a client, a schedule and a callback; what leaves is how it went. Garbage collection stands
still meanwhile; SIGINT and SIGTERM end the replay instead of the process, with a row for every request that
was out. Starts no server and writes no files.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from harness.client.stream import StreamClient
from harness.plan.schedule import Schedule
from harness.replay.runner import OnComplete, Replay, ReplayEnd

INTERRUPTED = "interrupted: the harness was told to stop"


async def play(
    client: StreamClient,
    schedule: Schedule,
    on_complete: OnComplete,
    *,
    client_chunk: int,
    max_in_flight: int,
    start_s: float | None = None,
) -> ReplayEnd:
    """Play a schedule once, with garbage collection off; the client is closed after it."""
    measured = Replay(client, schedule, on_complete, client_chunk=client_chunk, max_in_flight=max_in_flight)
    with _collector_off(), stops(measured):
        end = await measured.run(start_s)
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
def stops(running: Replay) -> Iterator[None]:
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
