"""One schedule sent by several processes of this machine, for loads that one core cannot send.

Every worker sends its own part of the schedule. All start at one instant of the machine's monotonic clock,
which they share, so their stamps compare.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import perf_counter

from adapters.base import LabError
from harness.client.answer import Answer
from harness.client.stream import StreamClient
from harness.client.target import Target
from harness.plan.schedule import Schedule
from harness.replay.event_loop import loop_factory
from harness.replay.interrupts import INTERRUPTED, on_interrupt
from harness.replay.parent import end_with_parent
from harness.replay.runner import OnComplete, Replay, ReplayEnd

_READY = "ready"
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 5.0
_LEAD_S = 0.25
"""From the last worker's word that it is ready to the shared start."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What worker number `index` of `num_workers` sends."""

    target: Target
    schedule: Schedule
    client_chunk: int
    max_in_flight: int
    timeout_s: float
    index: int
    num_workers: int


def replay_in_processes(plans: list[WorkerPlan], on_complete: OnComplete, start_s: float | None) -> ReplayEnd:
    """Replay all parts and hand over every answer.

    Raises:
        LabError: a worker ended before it was done, or `on_complete` raised it.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for plan in plans:
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_run_worker, args=(theirs, plan), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        for pipe in workers:
            if not pipe.poll(_START_TIMEOUT_S) or pipe.recv() != _READY:
                raise LabError("a process of the harness did not start")
        common_s = perf_counter() + _LEAD_S if start_s is None else start_s
        for pipe in workers:
            pipe.send(common_s)
        # Each worker ends its replay and hands over what it has.
        with on_interrupt(lambda: _terminate(workers)):
            ends = _collect(workers, on_complete)
    except BaseException as error:
        for process in workers.values():
            process.kill()  # nobody reads what it would hand over
        if isinstance(error, EOFError):
            raise LabError("a process of the harness ended before it was done") from error
        raise
    finally:
        _end(workers)
    return ReplayEnd(
        common_s,
        max(end.ended_s for end in ends),
        any(end.hit_in_flight_cap for end in ends),
        any(end.was_interrupted for end in ends),
    )


def _terminate(workers: dict[Connection, BaseProcess]) -> None:
    for process in workers.values():
        process.terminate()


def _end(workers: dict[Connection, BaseProcess]) -> None:
    """Wait for all workers until one shared deadline, kill what is left, and close the pipes."""
    deadline_s = perf_counter() + _END_TIMEOUT_S
    for process in workers.values():
        process.join(max(0.0, deadline_s - perf_counter()))
    for pipe, process in workers.items():
        process.kill()
        process.join()
        process.close()
        pipe.close()


def _collect(workers: dict[Connection, BaseProcess], on_complete: OnComplete) -> list[ReplayEnd]:
    ends: list[ReplayEnd] = []
    not_kept: LabError | None = None
    pipes: list[Connection] = list(workers)
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            message = pipe.recv()
            if isinstance(message, Answer):
                try:
                    on_complete(message)
                except LabError as error:
                    if not_kept is None:
                        _terminate(workers)  # each hands over what it has
                    not_kept = error
            else:
                ends.append(message)
                pipes.remove(pipe)
    if not_kept is not None:
        raise not_kept
    return ends


def _run_worker(pipe: Connection, plan: WorkerPlan) -> None:
    """What a worker does, from its start to its end."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the workers

    async def run() -> ReplayEnd:
        client = StreamClient(plan.target, timeout_s=plan.timeout_s)
        replay = Replay(
            client,
            plan.schedule,
            pipe.send,
            client_chunk=plan.client_chunk,
            max_in_flight=plan.max_in_flight,
            group_ids=count(plan.index, plan.num_workers),
        )
        # Told to stop before its start or after its end, it still hands over what it has.
        interrupts.enter_context(on_interrupt(lambda: replay.interrupt(INTERRUPTED)))
        pipe.send(_READY)
        start_s: float = await asyncio.to_thread(pipe.recv)
        with contextlib.closing(client):
            return await replay.run(start_s)

    with (
        contextlib.ExitStack() as interrupts,
        contextlib.suppress(BrokenPipeError),
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        pipe.send(runner.run(run()))
    pipe.close()
