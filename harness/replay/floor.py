"""The harness against a server of known delays, and its own floor: what it reports of one without any.

Latencies near the floor say more about the client and the machine than about the server under test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from time import perf_counter, process_time

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.client.answer import Answer
from harness.client.connection import Origin
from harness.client.stream import StreamClient
from harness.client.target import Target
from harness.plan.corpus import Prompt
from harness.plan.schedule import Arrivals, Load, Schedule, make_schedule
from harness.plan.warmup import make_warmup
from harness.replay.event_loop import loop_factory
from harness.replay.known_server import Delays, known_server
from harness.replay.runner import Replay
from harness.results.formulas import send_lag_s
from harness.results.manifest import Floor
from harness.results.record import ReplayLabels, make_row, make_table, to_frame
from harness.results.stats import percentile

_NUM_WARMUP = 16
_RATE, _NUM_REQUESTS, _NUM_TOKENS = 200.0, 100, 4

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """`token_s`: when the server sent each token, one list a row."""

    rows: pd.DataFrame
    token_s: list[Floats]
    cpu_share: float
    tokens_per_s: float
    send_lag_p99_ms: float


@cache
def measure_floor() -> Floor:
    """Takes about a second, once a process.

    Raises:
        KeyboardInterrupt: told to stop meanwhile.
    """
    measured = measure_known(Delays(), _RATE, _NUM_REQUESTS, _NUM_TOKENS)
    ttft_ms = measured.rows["ttft_ms"].to_numpy(dtype=float)
    p50, p95 = (percentile(ttft_ms, q).value for q in (50, 95))
    return Floor(
        ttft_p50_ms=p50,
        ttft_p95_ms=p95,
        send_lag_p99_ms=measured.send_lag_p99_ms,
        num_requests=_NUM_REQUESTS,
    )


def measure_known(
    delays: Delays, rate: float, num_requests: int, num_tokens: int, arrivals: Arrivals = Arrivals.POISSON
) -> Measured:
    """An open loop against a known server, with this harness's client in this process.

    Raises:
        RuntimeError: a request failed.
        KeyboardInterrupt: told to stop meanwhile.
    """
    schedule = make_schedule(
        [Prompt(id="p", prompt="a prompt", max_tokens=num_tokens)], num_requests, Load(arrivals, rate=rate), 1
    )
    answers: list[Answer] = []

    async def run(port: int, plan: Schedule, on_complete: Callable[[Answer], None]) -> None:
        with closing(StreamClient(Target(Origin("127.0.0.1", port), "/generate"), timeout_s=60)) as client:
            end = await Replay(client, plan, on_complete, max_in_flight=4096).run()
        if end.was_interrupted:
            raise KeyboardInterrupt

    with known_server(delays) as port, asyncio.Runner(loop_factory=loop_factory()) as runner:
        if not delays.stall_s:  # which counts from the server's first request
            runner.run(run(port, make_warmup(_NUM_WARMUP), lambda answer: None))
        cpu_s, wall_s = process_time(), perf_counter()
        runner.run(run(port, schedule, answers.append))
        cpu_s, wall_s = process_time() - cpu_s, perf_counter() - wall_s
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    token_s = [np.asarray(answer.token_ids, dtype=float) / 1e6 for answer in answers]
    for answer in answers:
        answer.token_ids.clear()  # instants, too large for the column of ids
    labels = ReplayLabels("known", "known", "known", "known", "known", 0)
    rows = to_frame(make_table([make_row(labels, answer) for answer in answers]))
    lag_ms = float(np.percentile(send_lag_s(rows), 99)) * 1e3
    return Measured(rows, token_s, cpu_s / wall_s, num_requests * num_tokens / wall_s, lag_ms)
