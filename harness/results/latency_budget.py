"""The latency budget: where the time to the first token went, request by request.

Every term is the difference of stamps of its own, none is what the others leave over. So the residual,
which no term accounts for, is a finding: stamps that contradict each other, or time that nobody stamps.
Instants of client and server are compared only where their order proves that both read one clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

TERMS: tuple[tuple[str, str], ...] = (
    ("chunk_ms", "waiting for a full chunk (client)"),
    ("lag_ms", "send lag"),
    ("connection_ms", "connection"),
    ("network_ms", "network, both ways"),
    ("queue_ms", "server queue"),
    ("batch_wait_ms", "batch wait (the strategy's choice)"),
    ("prefill_ms", "prefill"),
    ("delivery_ms", "delivery (engine to the API's write)"),
)
"""In the order in which a request meets them, the way back apart."""


@dataclass(frozen=True, slots=True)
class Budget:
    """`terms`: one row a request (the index is that of the rows), columns of `TERMS`, `residual_ms` and
    `ttft_sched_ms`. `shares_clock`: the network is measured by stamps of both ends, else by round trips.
    `has_server_means`: queue and prefill are the server's means, so only means over requests
    say something."""

    terms: pd.DataFrame
    shares_clock: bool
    has_server_means: bool = False

    @property
    def residual_share(self) -> float | None:
        """The median over requests of |residual| / `ttft_sched_ms`; with `has_server_means` that of means."""
        if self.terms.empty:
            return None
        if self.has_server_means:
            return abs(float(self.terms["residual_ms"].mean() / self.terms["ttft_sched_ms"].mean()))
        shares = self.terms["residual_ms"].abs() / self.terms["ttft_sched_ms"]
        return float(shares.median())

    def means(self) -> dict[str, float]:
        """Mean ms of each term and of the residual: means add up to the mean TTFT, medians would not."""
        names = [*(name for name, _ in TERMS), "residual_ms"]
        return {name: float(self.terms[name].mean()) for name in names}


def latency_budget(
    rows: pd.DataFrame, round_trip_s: float | None = None, means: Sequence[float | None] = (None, None)
) -> Budget | None:
    """The budget of all answers that tell the server's timings; None where none does.

    `round_trip_s` is that of an idle server, for where client and server have clocks of their own. `means`
    are seconds of queue and prefill that a foreign server tells, for where answers do not.
    """
    if not {"received_s", "first_token_s", "written_s"} <= set(rows.columns):
        return None  # a file from before these stamps were taken
    needed = [
        "received_s",
        "first_token_s",
        "first_write_s",
        "queue_s",
        "prefill_s",
        "ttft_sched_ms",
        "written_s",
    ]
    done = rows[rows["error"].isna() & rows[needed].notna().all(axis=1)]
    if done.empty:
        return _budget_of_means(rows, round_trip_s, *means)
    first_s = done["chunk_s"].map(lambda stamps: float(stamps[0]))
    last_asked_s = done.groupby(["run_id", "repeat", "group_id"])["scheduled_s"].transform("max")
    shares_clock = has_one_clock(done, first_s)
    if shares_clock:
        network_s = (done["received_s"] - done["written_s"]) + (first_s - done["first_write_s"])
    else:
        network_s = pd.Series(np.nan if round_trip_s is None else round_trip_s, index=done.index)
    terms = pd.DataFrame(
        {
            "chunk_ms": last_asked_s - done["scheduled_s"],
            "lag_ms": done["sent_s"] - last_asked_s,
            "connection_ms": done["written_s"] - done["sent_s"],
            "network_ms": network_s.fillna(0.0),
            "queue_ms": done["queue_s"],
            "batch_wait_ms": done["batch_wait_s"],
            "prefill_ms": done["prefill_s"],
            "delivery_ms": done["first_write_s"] - done["first_token_s"],
        }
    ).mul(1e3)
    terms["residual_ms"] = done["ttft_sched_ms"] - terms.sum(axis=1)
    terms["ttft_sched_ms"] = done["ttft_sched_ms"]
    return Budget(terms, shares_clock)


def _budget_of_means(
    rows: pd.DataFrame, round_trip_s: float | None, queue_s: float | None, prefill_s: float | None
) -> Budget | None:
    needed = ["written_s", "ttft_sched_ms"]
    done = rows[rows["error"].isna() & rows[needed].notna().all(axis=1)]
    if done.empty or (queue_s is None and prefill_s is None):
        return None
    terms = pd.DataFrame(0.0, index=done.index, columns=[name for name, _ in TERMS])
    terms["lag_ms"] = (done["sent_s"] - done["scheduled_s"]) * 1e3
    terms["connection_ms"] = (done["written_s"] - done["sent_s"]) * 1e3
    for name, told_s in (("network_ms", round_trip_s), ("queue_ms", queue_s), ("prefill_ms", prefill_s)):
        terms[name] = 1e3 * (told_s or 0.0)
    terms["residual_ms"] = done["ttft_sched_ms"] - terms.sum(axis=1)
    terms["ttft_sched_ms"] = done["ttft_sched_ms"]
    return Budget(terms, shares_clock=False, has_server_means=True)


def has_one_clock(done: pd.DataFrame, first_s: pd.Series[float]) -> bool:
    """Whether every request was received after it was written and came back after it was answered.

    Clocks of two machines differ by the time between their boots, so this cannot happen by chance.
    """
    in_order = (done["written_s"] <= done["received_s"]) & (done["received_s"] <= done["first_write_s"])
    return bool((in_order & (done["first_write_s"] <= first_s)).all())
