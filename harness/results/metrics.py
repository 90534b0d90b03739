"""The metric definitions, all client-side: from stamps to milliseconds and rates.

What enters are the stamps of one answer, or the frame of all rows of one replay; what leaves are its
derived columns, its throughput, its gaps between tokens and its goodput. Failed requests have no
latencies. Knows no files, no tables and no verdicts.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
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
        num_tokens = sum((_tokens_until(row, end_s) for row in done.to_dict("records")), 0.0)
        num_requests = int((done["finish_s"] <= end_s).sum())
    if window_s <= 0:
        return None
    return Throughput(num_tokens / window_s, num_requests / window_s, window_s)


def _tokens_until(row: Mapping[Hashable, Any], end_s: float) -> float:
    """Tokens of one answer stamped up to `end_s`; without token ids, spread evenly over its chunks."""
    stamps = _array(row["chunk_s"])
    if not len(stamps):
        return 0.0
    inside = stamps <= end_s
    if row["chunk_tokens"] is None:
        return float(inside.mean()) * float(row["num_output_tokens"])
    return float(_array(row["chunk_tokens"])[inside].sum())


@dataclass(frozen=True, slots=True)
class Gaps:
    """Time between chunks. With token counts: per token, and `weights` says how many tokens share it."""

    gap_ms: Floats
    weights: Floats
    is_per_token: bool


def token_gaps(rows: pd.DataFrame) -> Gaps:
    """Inter-token latencies of all answers; inter-chunk latencies where token ids are missing."""
    gaps: list[Floats] = []
    weights: list[Floats] = []
    done = rows[rows["error"].isna()]
    is_per_token = bool(done["chunk_tokens"].notna().all())
    for row in done.to_dict("records"):
        stamps = _array(row["chunk_s"])
        if len(stamps) < 2:
            continue
        gap_ms = np.diff(stamps) * 1e3
        tokens = _array(row["chunk_tokens"])[1:] if is_per_token else np.ones(len(gap_ms))
        gaps.append(gap_ms / tokens)
        weights.append(tokens)
    if not gaps:
        return Gaps(np.empty(0), np.empty(0), is_per_token)
    return Gaps(np.concatenate(gaps), np.concatenate(weights), is_per_token)


def send_lag_s(rows: pd.DataFrame) -> Floats:
    """How late each request of an open loop left: `sent_s` - `scheduled_s` of the last prompt in it.

    A prompt that waited for its chunk to fill is not late by that wait; it shows in `ttft_sched_ms`.
    """
    sent = rows[rows["sent_s"].notna()]
    groups = sent.groupby("group_id").agg(sent_s=("sent_s", "first"), scheduled_s=("scheduled_s", "max"))
    return np.asarray(groups["sent_s"] - groups["scheduled_s"], dtype=float)


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits in ms; None sets none."""

    ttft_ms: float | None = None
    ttft_sched_ms: float | None = None
    tpot_ms: float | None = None
    total_ms: float | None = None
    total_sched_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read `ttft_ms=500,tpot_ms=50`.

        Raises:
            argparse.ArgumentTypeError: a name is unknown or a limit is not a number above 0.
        """
        known = {field.name for field in fields(cls)}
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is no latency; use {', '.join(sorted(known))}")
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = -1.0
            if not limits[name] > 0:
                raise argparse.ArgumentTypeError(f"the limit of {name} must be a number above 0")
        return cls(**limits)

    def text(self) -> str:
        limits = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name}={limit:g}" for name, limit in limits.items() if limit is not None)


@dataclass(frozen=True, slots=True)
class Goodput:
    requests_per_s: float
    share: float
    """Of all requests, failed ones included."""


def goodput(rows: pd.DataFrame, slo: Slo, window_s: float) -> Goodput:
    """Requests a second that meet all limits; failed requests miss, and so do those without a value
    unless the answer is too short to have one (TPOT of a single token)."""
    good = rows["error"].isna()
    for field in fields(slo):
        limit = getattr(slo, field.name)
        if limit is None:
            continue
        values = rows[field.name].astype(float)
        met = values <= limit
        if field.name == "tpot_ms":
            met |= values.isna() & rows["error"].isna()
        good &= met
    return Goodput(float(good.sum()) / window_s, float(good.mean()))


def _array(values: object) -> Floats:
    return np.asarray(values, dtype=float)
