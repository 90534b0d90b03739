"""From stamps to figures: the latencies of one request, the throughput of one replay, gaps, send lag.

All stamps are the client's, on one monotonic clock. Failed requests have no latencies. Which of these figures
are shown and judged stands in `metrics`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.results.stats import Percentile, mean_of, percentile

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(slots=True)  # not frozen, which takes three times as long: each answer makes one
class RequestMetrics:
    """Derived columns of one row; None where a definition does not apply."""

    ttft_ms: float | None = None
    ttft_sched_ms: float | None = None
    total_ms: float | None = None
    total_sched_ms: float | None = None
    tokens_per_sec: float | None = None
    tpot_ms: float | None = None


def request_metrics(
    *,
    scheduled_s: float,
    sent_s: float,
    chunk_s: Sequence[float],
    chunk_tokens: Sequence[int] | None,
    num_output_tokens: int,
) -> RequestMetrics:
    """Metrics of one answer that succeeded.

    TPOT is (last - first) / (tokens after the first chunk); where a server sends no token ids, the
    first chunk is taken to hold one token.
    """
    if not chunk_s:
        return RequestMetrics()
    first_s, last_s = chunk_s[0], chunk_s[-1]
    span_s = last_s - first_s
    num_later = num_output_tokens - (chunk_tokens[0] if chunk_tokens else 1)
    return RequestMetrics(
        ttft_ms=(first_s - sent_s) * 1e3,
        ttft_sched_ms=(first_s - scheduled_s) * 1e3,
        total_ms=(last_s - sent_s) * 1e3,
        total_sched_ms=(last_s - scheduled_s) * 1e3,
        tokens_per_sec=(num_output_tokens - 1) / span_s if num_output_tokens > 1 and span_s > 0 else None,
        tpot_ms=span_s / num_later * 1e3 if num_later > 0 and span_s > 0 else None,
    )


@dataclass(frozen=True, slots=True)
class Throughput:
    """Rates of one replay. `window_s` is the length that they were measured over."""

    output_tokens_per_s: float
    requests_per_s: float
    window_s: float


def throughput(rows: pd.DataFrame, *, is_open: bool) -> Throughput | None:
    """Throughput of one replay; None where nothing was answered or the window has no length.

    Closed loop: everything, from the first send to the last finish. Open loop: what was stamped from
    the start of the schedule to its last arrival, so that neither the empty tail nor late answers count.
    """
    done = rows[rows["error"].isna()]
    if done.empty:
        return None
    if not is_open:
        window_s = float(rows["finish_s"].max() - rows["sent_s"].min())
        num_tokens, num_requests = float(done["num_output_tokens"].sum()), len(done)
    else:
        start_s = float((rows["scheduled_s"] - rows["offset_s"]).min())
        end_s = float(rows["scheduled_s"].max())
        window_s = end_s - start_s
        num_tokens = sum((tokens_until(row, end_s) for row in done.to_dict("records")), 0.0)
        num_requests = int((done["finish_s"] <= end_s).sum())
    if window_s <= 0:
        return None
    return Throughput(num_tokens / window_s, num_requests / window_s, window_s)


def tokens_until(row: Mapping[Hashable, Any], end_s: float) -> float:
    """Tokens of one answer stamped up to `end_s`; without token ids, spread evenly over its chunks."""
    stamps = _array(row["chunk_s"])
    if not len(stamps):
        return 0.0
    inside = stamps <= end_s
    if row["chunk_tokens"] is None:
        return float(inside.mean()) * float(row["num_output_tokens"])
    return float(_array(row["chunk_tokens"])[inside].sum())


@dataclass(frozen=True, slots=True)
class Samples:
    """Values of one metric."""

    values: Floats
    request: NDArray[np.int64] | None = None
    """The row number of the request that each belongs to; None: there is one for each row, in order."""
    weights: Floats | None = None
    """Whole counts: a value of weight 3 stands there three times."""
    is_per_token: bool = True
    """False where a server sends no token ids, so that gaps are between chunks."""

    def percentile(self, q: int, num_blocks: int = 1) -> Percentile:
        """Gaps of one answer are alike, so that for gaps requests are counted, not gaps. A comparison of
        `num_blocks` judges the blocks' values together, so that all their requests count."""
        if self.weights is None or self.request is None:
            return percentile(self.values, q)
        num_requests = len(np.unique(self.request)) * num_blocks
        return percentile(self.values, q, weights=self.weights, num_samples=num_requests)

    def mean(self) -> float | None:
        if self.weights is None or not len(self.values):
            return mean_of(self.values)
        return float((self.values * self.weights).sum() / self.weights.sum())

    def worst(self, num_rows: int, *, higher_is_better: bool) -> Floats:
        """The worst value of each row; NaN where a row has none."""
        if self.request is None:
            return self.values
        of_row = pd.Series(self.values).groupby(self.request)
        worst = of_row.min() if higher_is_better else of_row.max()
        return np.asarray(worst.reindex(range(num_rows)), dtype=float)


def token_gaps(rows: pd.DataFrame) -> Samples:
    """Inter-token latencies of all answers in ms; inter-chunk latencies where token ids are missing."""
    gaps, request = _gaps(rows)
    done = rows["error"].isna().to_numpy()
    if not rows["chunk_tokens"][done].notna().all():
        return Samples(gaps, request, np.ones(len(gaps)), is_per_token=False)
    counts = (_array(tokens)[1:] for tokens in rows["chunk_tokens"][done])
    weights = np.concatenate([np.empty(0), *counts])
    return Samples(gaps / weights, request, weights)


def frame_gaps(rows: pd.DataFrame) -> Samples:
    """Gaps between chunks in ms, not divided by their tokens: frames that merge do not hide a stall."""
    gaps, request = _gaps(rows)
    return Samples(gaps, request, np.ones(len(gaps)))


def longest_stalls(rows: pd.DataFrame) -> Samples:
    """The longest gap of each answer in ms; NaN where it came in one chunk."""
    gaps, request = _gaps(rows)
    longest = np.full(len(rows), -np.inf)
    np.maximum.at(longest, request, gaps)
    return Samples(np.where(np.isneginf(longest), np.nan, longest))


def _gaps(rows: pd.DataFrame) -> tuple[Floats, NDArray[np.int64]]:
    """Gaps between chunks in ms, and the row of each."""
    done = rows["error"].isna().to_numpy()
    each = [_array(stamps) for stamps in rows["chunk_s"][done]]
    request = np.repeat(np.flatnonzero(done), [len(stamps) for stamps in each])
    # All at once: a call of numpy for each answer is most of the time of a large report.
    gaps = np.diff(np.concatenate([np.empty(0), *each])) * 1e3
    is_inside = request[1:] == request[:-1]
    return gaps[is_inside], request[1:][is_inside]


def send_lag_s(rows: pd.DataFrame) -> Floats:
    """How late each request of an open loop left: `sent_s` - `scheduled_s` of the last prompt in it.

    A prompt that waited for its chunk to fill is not late by that wait; it shows in `ttft_sched_ms`.
    """
    sent = rows[rows["sent_s"].notna()]
    groups = sent.groupby("group_id").agg(sent_s=("sent_s", "first"), scheduled_s=("scheduled_s", "max"))
    return np.asarray(groups["sent_s"] - groups["scheduled_s"], dtype=float)


def _array(values: object) -> Floats:
    return np.asarray(values, dtype=float)


MIN_TTFT_FALL = 3.0
"""From here on a prefix cache counts as found. Machines and loads change TTFT as well, but rarely so much."""


def ttft_fall(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """The median over the same requests of TTFT before to TTFT after, from send; 1 where none has both."""
    first, again = (
        part[part["error"].isna()].groupby("schedule_index")["ttft_ms"].median() for part in (before, after)
    )
    ratios = (first / again).dropna()
    return float(ratios.median()) if len(ratios) else 1.0
