"""The harness held against a server whose delays are known: `python -m harness.selfcheck.known_truth`.

What enters are rates and delays; what leaves is a table of what the harness reports beside what the server
did, by its own stamps, and what a request felt while the server stood still for two seconds. One machine, one
monotonic clock. Judges no strategy.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from harness.replay.play import play
from harness.replay.runner import ReplayEnd
from harness.results.formulas import send_lag_s, token_gaps
from harness.results.manifest import loop_factory
from harness.results.record import ReplayLabels, make_row, to_frame
from harness.results.stats import percentile
from harness.results.table import number, render_table, share
from harness.selfcheck.known_server import Delays, known_server

QUANTILES = (50, 95, 99)
STALL_S = 2.0
_NUM_WARMUP = 16

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """`token_s`: when the server sent each token, one list a row."""

    rows: pd.DataFrame
    token_s: list[Floats]
    cpu_share: float
    tokens_per_s: float
    send_lag_p99_ms: float


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

    async def run(port: int, plan: Schedule, on_complete: Callable[[Answer], None]) -> ReplayEnd:
        client = StreamClient(Target(Origin("127.0.0.1", port), "/generate"), timeout_s=60)
        return await play(client, plan, on_complete, client_chunk=1, max_in_flight=4096)

    with known_server(delays) as port, asyncio.Runner(loop_factory=loop_factory()) as runner:
        if not delays.stall_s:  # which counts from the server's first request
            runner.run(run(port, make_warmup(_NUM_WARMUP), lambda answer: None))
        cpu_s, wall_s = process_time(), perf_counter()
        end = runner.run(run(port, schedule, answers.append))
        cpu_s, wall_s = process_time() - cpu_s, perf_counter() - wall_s
    if end.was_interrupted:
        raise KeyboardInterrupt
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    token_s = [np.asarray(answer.token_ids, dtype=float) / 1e6 for answer in answers]
    for answer in answers:
        answer.token_ids.clear()  # instants, too large for the column of ids
    labels = ReplayLabels("known", "known", "known", "known", "known", 0)
    rows = to_frame([make_row(labels, answer) for answer in answers])
    lag_ms = float(np.percentile(send_lag_s(rows), 99)) * 1e3
    return Measured(rows, token_s, cpu_s / wall_s, num_requests * num_tokens / wall_s, lag_ms)


def truths(rows: pd.DataFrame, token_s: list[Floats]) -> dict[str, tuple[Floats, Floats]]:
    """What was reported and what the server did, in ms, by name of the latency.

    Times from sending include the opening of a connection by definition, which is no doing of the server.
    """
    received, first = (rows[name].to_numpy(dtype=float) for name in ("received_s", "first_write_s"))
    connecting_ms = (rows["written_s"] - rows["sent_s"]).to_numpy(dtype=float) * 1e3
    last = np.array([stamps[-1] for stamps in token_s])
    spans = np.array([stamps[-1] - stamps[0] for stamps in token_s])
    num_later = np.array([max(1, len(stamps) - 1) for stamps in token_s])
    return {
        "TTFT": (rows["ttft_ms"].to_numpy(dtype=float), (first - received) * 1e3 + connecting_ms),
        "TPOT": (rows["tpot_ms"].to_numpy(dtype=float), spans / num_later * 1e3),
        "ITL": (token_gaps(rows).values, np.concatenate([np.diff(stamps) for stamps in token_s]) * 1e3),
        "total": (rows["total_ms"].to_numpy(dtype=float), (last - received) * 1e3 + connecting_ms),
    }


def distances(measured: Measured) -> list[tuple[str, int, float, float]]:
    """(latency, percentile, reported ms, true ms); percentiles that no table would show are left out."""
    return [
        (name, q, told, float(np.percentile(true, q)))
        for name, (reported, true) in truths(measured.rows, measured.token_s).items()
        for q in QUANTILES
        if (told := percentile(reported, q).value) is not None
    ]


def within_bound(reported_ms: float, true_ms: float) -> bool:
    """Within 1 ms or 2%."""
    return abs(reported_ms - true_ms) <= max(1.0, 0.02 * true_ms)


def stall_shown(rate: float = 50.0, num_requests: int = 300) -> tuple[float, float]:
    """The longest `ttft_sched_ms` with a server that stands still for 2 s, and the least share of its own
    remaining stall that any request scheduled within it felt."""
    delays = Delays(ttft_s=0.01, stall_after_s=1.5, stall_s=STALL_S)
    rows = measure_known(delays, rate, num_requests, 2, Arrivals.CONSTANT).rows
    felt_s = rows["ttft_sched_ms"].to_numpy(dtype=float) / 1e3
    first_s = rows["scheduled_s"].to_numpy(dtype=float)
    end_s = float(first_s[felt_s.argmax()] + felt_s.max())
    inside = (first_s > end_s - STALL_S + 0.05) & (first_s < end_s - 0.1)
    return float(felt_s.max() * 1e3), float((felt_s[inside] / (end_s - first_s[inside])).min())


def _lines(rates: Sequence[float], seconds: float) -> tuple[list[list[str]], list[list[str]], int]:
    details: list[list[str]] = []
    summary: list[list[str]] = []
    num_beyond = 0
    for rate in rates:
        for is_random in (False, True):
            num_tokens = 44 if rate >= 500 else 16
            delays = Delays(ttft_s=0.05, gap_s=0.01, is_random=is_random)
            measured = measure_known(delays, rate, max(100, int(rate * seconds)), num_tokens)
            kind = "random" if is_random else "constant"
            found = distances(measured)
            beyond = [f for f in found if not within_bound(f[2], f[3])]
            num_beyond += len(beyond)
            details += [
                [
                    f"{rate:g}/s {kind}",
                    f"{name} p{q}",
                    number(told, 2),
                    number(true, 2),
                    number(told - true, 2),
                ]
                for name, q, told, true in found
            ]
            worst = max(found, key=lambda f: abs(f[2] - f[3]) / max(1.0, 0.02 * f[3]))
            summary.append(
                [
                    f"{rate:g}/s {kind}",
                    number(measured.tokens_per_s, 0),
                    number(measured.send_lag_p99_ms, 2),
                    share(measured.cpu_share),
                    f"{worst[0]} p{worst[1]} {worst[2] - worst[3]:+.2f} ms of {worst[3]:.1f}",
                    f"{len(found) - len(beyond)}/{len(found)}",
                ]
            )
    return details, summary, num_beyond


def main() -> int:
    parser = argparse.ArgumentParser(description="the harness against a server of known delays")
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 100, 500])
    parser.add_argument("--seconds", type=float, default=8.0, help="of load at each rate (default 8)")
    parser.add_argument("--all", action="store_true", help="print every percentile")
    args = parser.parse_args()
    details, summary, num_beyond = _lines(args.rates, args.seconds)
    if args.all:
        print(render_table(["load", "latency", "reported (ms)", "true (ms)", "distance"], details))
    headers = [
        "load",
        "tokens/s",
        "send lag p99 (ms)",
        "CPU of a core",
        "largest distance",
        "within 1 ms or 2%",
    ]
    print(render_table(headers, summary))
    longest_ms, felt = stall_shown()
    print(
        f"server stalled for {STALL_S:g} s: longest TTFT from schedule {longest_ms:,.0f} ms; every request ",
        end="",
    )
    print(f"scheduled meanwhile felt at least {felt:.1%} of the stall that was left")
    return 1 if num_beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
