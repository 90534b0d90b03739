"""One schedule played by several processes of this machine, for loads that one core cannot send.

What enters are a server, a schedule and a number of processes; what leaves are completed answers, handed to
a callback as they come, and how the replay went as a whole. Every process sends its own part of the schedule
from one shared instant of the machine's monotonic clock. Writes no files.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import perf_counter
from types import FrameType
from typing import Any

from adapters.base import LabError
from harness.client.answer import Answer
from harness.client.event_loop import loop_factory
from harness.client.stream import StreamClient
from harness.client.target import Target
from harness.plan.schedule import Schedule
from harness.replay.play import play
from harness.replay.runner import OnComplete, ReplayEnd

_READY = "ready"
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 5.0
_LEAD_S = 0.25
"""From the last process's word that it is ready to the shared start."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one process is told. A TLS context crosses no process border, so `is_tls` stands for it."""

    target: Target
    is_tls: bool
    schedule: Schedule
    client_chunk: int
    max_in_flight: int
    timeout_s: float
    group_step: int
    group_offset: int


def play_in_processes(parts: list[Part], on_complete: OnComplete, start_s: float | None) -> ReplayEnd:
    """Play all parts and hand over every answer.

    Raises:
        LabError: a process ended before it was done.
    """
    context = multiprocessing.get_context("spawn")
    lines: dict[Connection, BaseProcess] = {}
    try:
        for part in parts:
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_play_part, args=(theirs, part), daemon=True)
            process.start()
            theirs.close()
            lines[ours] = process
        for line in lines:
            if not line.poll(_START_TIMEOUT_S) or line.recv() != _READY:
                raise LabError("a process of the harness did not start")
        common_s = perf_counter() + _LEAD_S if start_s is None else start_s
        for line in lines:
            line.send(common_s)
        with _forwarded(list(lines.values())):
            ends = _collect(lines, on_complete)
    except BaseException as error:
        for process in lines.values():
            process.terminate()
        if isinstance(error, EOFError):
            raise LabError("a process of the harness ended before it was done") from error
        raise
    finally:
        _end(lines)
    return ReplayEnd(
        common_s,
        max(end.ended_s for end in ends),
        any(end.hit_in_flight_cap for end in ends),
        any(end.was_interrupted for end in ends),
    )


def _end(lines: dict[Connection, BaseProcess]) -> None:
    """Wait for all processes until one shared deadline, kill what is left, and close the lines."""
    deadline_s = perf_counter() + _END_TIMEOUT_S
    for process in lines.values():
        process.join(max(0.0, deadline_s - perf_counter()))
    for line, process in lines.items():
        process.kill()
        process.join()
        process.close()
        line.close()


def _collect(lines: dict[Connection, BaseProcess], on_complete: OnComplete) -> list[ReplayEnd]:
    ends: list[ReplayEnd] = []
    open_lines: list[Connection] = list(lines)
    while open_lines:
        for line in wait(open_lines):
            assert isinstance(line, Connection)
            message = line.recv()
            if isinstance(message, Answer):
                on_complete(message)
            else:
                ends.append(message)
                open_lines.remove(line)
    return ends


def _play_part(line: Connection, part: Part) -> None:
    """What a process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent forwards what reaches it

    def send(answer: Answer) -> None:
        answer.group_id = answer.group_id * part.group_step + part.group_offset
        line.send(answer)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:

        async def run() -> ReplayEnd:
            tls = ssl.create_default_context() if part.is_tls else None
            target = replace(part.target, origin=replace(part.target.origin, tls=tls))
            client = StreamClient(target, timeout_s=part.timeout_s)
            line.send(_READY)
            start_s: float = await asyncio.to_thread(line.recv)
            return await play(
                client,
                part.schedule,
                send,
                client_chunk=part.client_chunk,
                max_in_flight=part.max_in_flight,
                start_s=start_s,
            )

        with contextlib.suppress(BrokenPipeError):
            line.send(runner.run(run()))
    line.close()


@contextmanager
def _forwarded(processes: list[BaseProcess]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM end the parts, which then hand over what they have."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.terminate()

    kept: list[tuple[signal.Signals, Any]] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread
            kept.append((number, signal.signal(number, forward)))
    try:
        yield
    finally:
        for number, handler in kept:
            signal.signal(number, handler)
