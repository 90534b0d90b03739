"""One replay from its warm-up to its last answer, on an event loop of its own, and what went on beside it.

Connections that the warm-up opened are used again, so that the first measured requests find a server and a
client that have settled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from time import perf_counter, time

from adapters.base import LabError
from adapters.gpu import Gpu
from harness.client.answer import Answer
from harness.client.control import Control
from harness.client.server import Server
from harness.client.stream import StreamClient
from harness.plan.corpus import Corpus
from harness.plan.run_size import mean_budget, pace_of
from harness.plan.schedule import Schedule
from harness.plan.warmup import make_trial, make_warmup
from harness.replay.event_loop import loop_factory
from harness.replay.machine import MachineSample
from harness.replay.processes import WorkerPlan, replay_in_processes
from harness.replay.progress import Reporter
from harness.replay.runner import OnComplete, Replay, ReplayEnd
from harness.replay.server_gauges import GaugeWatch
from harness.results.facts import MachineUse, ServerGauges
from harness.settings import HarnessSettings
from services.contract.status import StepLine

GUESS_TOKENS, GUESS_S = (4, 16, 64), 1.5
"""Tokens a user: the last where all before took less than `GUESS_S`."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    end: ReplayEnd
    use: MachineUse
    steps: list[StepLine]
    num_dropped_steps: int
    round_trip_s: float | None
    """Of the idle server, before the replay."""
    gauges: ServerGauges | None
    """Of a foreign server."""


def replay(
    server: Server,
    schedule: Schedule,
    settings: HarnessSettings,
    reporter: Reporter,
    *,
    label: str,
    on_complete: OnComplete,
) -> ReplayResult:
    """Warm the server up, then measure; the reporter shows the measured part under its `label`.

    Raises:
        LabError: every warm-up request failed, so that the rest would too.
        KeyboardInterrupt: told to stop before the first measured request.
    """
    with (
        Control(server.url, server.target.authorization) as control,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
        closing(StreamClient(server.target, timeout_s=settings.request_timeout_s)) as client,
    ):
        if settings.num_warmup:
            reporter.announce("warming up")
            _warm_up(runner, client, server, make_warmup(settings.num_warmup))
        first_step = control.next_step() if server.card else None
        round_trip_s = control.round_trip_s()
        reporter.begin(label, schedule, server)
        gpu = Gpu() if server.is_local else None
        watch = GaugeWatch(control.metrics_text) if server.card is None else None
        with watch or ExitStack():
            before = MachineSample.take(server.pid, gpu)
            start_s = _shared_start(settings.start_at)
            if settings.processes == 1:
                measured = Replay(
                    client,
                    schedule,
                    on_complete,
                    client_chunk=server.client_chunk,
                    max_in_flight=settings.max_in_flight,
                )
                end = runner.run(measured.run(start_s))
            else:
                client.close()
                end = replay_in_processes(_worker_plans(server, schedule, settings), on_complete, start_s)
            use = MachineSample.take(server.pid, gpu).use_since(before)
        use.harness_cpu_share /= settings.processes
        steps, num_dropped = ([], 0) if first_step is None else control.steps_since(first_step)
        gauges = watch.gauges(end.started_s, end.ended_s, len(schedule.requests)) if watch else None
        return ReplayResult(end, use, steps, num_dropped, round_trip_s, gauges)


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a server whose users are all busy."""

    tokens_per_s: float
    unequal_tokens_per_s: float
    """Of answers of unequal lengths, where these were asked for."""
    warm_up_s: float
    """What the warm-up of a replay takes."""
    settling_s: float
    """What the first requests after a start take beyond others like them."""


def measure_speed(
    server: Server, settings: HarnessSettings, corpus: Corpus, budgets: Sequence[int] = ()
) -> Speed:
    """What the server makes of the corpus's prompts and answers of its mean length, reckoned from shorter
    ones: after a warm-up of equal ones; then, where there are `budgets`, of answers as unequal as these.

    Raises:
        LabError: every request failed.
        KeyboardInterrupt: told to stop.
    """
    with (
        asyncio.Runner(loop_factory=loop_factory()) as runner,
        closing(StreamClient(server.target, timeout_s=settings.request_timeout_s)) as client,
    ):
        users, mean_tokens = settings.concurrency, mean_budget(corpus)

        def timed(max_tokens: int | Sequence[int], num: int = users) -> tuple[float, float]:
            trial = make_trial(corpus.prompts, max_tokens, num, users)
            start_s = perf_counter()
            answers = _warm_up(runner, client, server, trial)
            return _num_tokens(answers) / num, perf_counter() - start_s

        first_tokens, first_s = timed(2)
        points = [timed(num) for num in GUESS_TOKENS[:2]]
        if points[-1][1] < GUESS_S:
            points.append(timed(GUESS_TOKENS[2]))
        pace = pace_of(*points[-2:])
        rate = unequal = users * mean_tokens / pace.seconds(mean_tokens)
        if budgets:
            own_tokens, took_s = timed(budgets, len(budgets))
            begin_s = min(pace.begin_s * len(budgets) / users, took_s)
            whole_s = begin_s + (took_s - begin_s) * mean_tokens / own_tokens
            unequal = len(budgets) * mean_tokens / whole_s
        warm_up = [request.max_tokens for request in make_warmup(settings.num_warmup).requests]
        warm_up_s = pace.seconds(sum(warm_up) / len(warm_up)) * len(warm_up) / users if warm_up else 0.0
        settling_s = max(0.0, first_s - pace.seconds(first_tokens))
        return Speed(rate, unequal, warm_up_s, settling_s)


def _num_tokens(answers: Sequence[Answer]) -> int:
    return sum(answer.num_output_tokens or 0 for answer in answers)


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


def _worker_plans(server: Server, schedule: Schedule, settings: HarnessSettings) -> list[WorkerPlan]:
    num_workers = settings.processes
    return [
        WorkerPlan(
            target=server.target,
            schedule=schedule.part(index, num_workers),
            client_chunk=server.client_chunk,
            max_in_flight=max(1, settings.max_in_flight // num_workers),
            timeout_s=settings.request_timeout_s,
            index=index,
            num_workers=num_workers,
        )
        for index in range(num_workers)
    ]


def _warm_up(
    runner: asyncio.Runner, client: StreamClient, server: Server, schedule: Schedule
) -> list[Answer]:
    answers: list[Answer] = []
    num_requests = len(schedule.requests)
    warmup = Replay(client, schedule, answers.append, client_chunk=server.client_chunk)
    if runner.run(warmup.run()).was_interrupted:
        raise KeyboardInterrupt
    errors = [answer.error for answer in answers if answer.error is not None]
    if len(errors) == num_requests:
        raise LabError(f"all {num_requests} warm-up requests failed, the first with: {errors[0]}")
    return answers
