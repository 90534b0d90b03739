"""The harness held against a server whose delays are known: `python -m harness.selfcheck.known_truth`.

Its table sets what the harness reports beside what the server did by its own stamps. They compare because
both are on one machine, whose processes share one monotonic clock. Besides, it says what a request felt while
the server stood still for two seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd

from harness.plan.schedule import Arrivals
from harness.replay.floor import Floats, Measured, measure_known
from harness.replay.known_server import Delays
from harness.results.formulas import token_gaps
from harness.results.stats import percentile
from harness.results.table import number, render_table, share

QUANTILES = (50, 95, 99)
STALL_S = 2.0


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
