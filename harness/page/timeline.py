"""The batch over time: which request held which slot, when it was live, and when its row was dead.

Slots carry no numbers on the wire: a request is drawn on the first lane that is free when it joins. All
times are seconds since the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.results.formulas import Floats

_SAME_S = 1e-6
_NUM_BINS = 60


class Bar(NamedTuple):
    """Prompt from `joined_s`, tokens from `first_token_s`, dead from `finished_s` to `left_s`."""

    lane: int
    label: str
    joined_s: float
    first_token_s: float
    finished_s: float
    left_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Shares are of slots x span: row-steps spent on live rows, on dead ones, and slots left empty."""

    bars: list[Bar]
    num_lanes: int
    span_s: float
    live_share: float
    dead_share: float
    idle_share: float


Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class OverTime:
    """One replay in `_NUM_BINS` equal parts, each a point at its middle, in s since the first request."""

    tokens_per_s: Points
    batch_size: Points
    """Mean live rows of the steps of a part, by their time; NaN without steps, empty without a step log."""
    time_at_size: Points
    """Share of the steps' time, by live rows."""


def load_over_time(rows: pd.DataFrame, steps: pd.DataFrame | None) -> OverTime | None:
    """None where nothing was answered, or without stamps of its chunks."""
    done = rows[rows["error"].isna() & (rows["num_output_tokens"] > 0)]
    num_chunks = done["chunk_s"].map(len).to_numpy(int)
    if not len(done) or not num_chunks.all():
        return None
    stamps = np.concatenate(done["chunk_s"].to_list())
    tokens = np.repeat(done["num_output_tokens"].to_numpy(float) / num_chunks, num_chunks)
    start_s = float(rows["sent_s"].min())
    edges = np.linspace(0.0, max(float(stamps.max()) - start_s, _SAME_S), _NUM_BINS + 1)
    at_s = ((edges[:-1] + edges[1:]) / 2).tolist()
    rates = np.histogram(stamps - start_s, edges, weights=tokens)[0] / edges[1]
    sizes: Floats = np.empty(0)
    time_at_size: Points = []
    if steps is not None and not steps.empty:
        spent_s, live = (steps[name].to_numpy(float) for name in ("duration_s", "num_rows"))
        # The server may have a clock of its own.
        middles = steps["start_s"].to_numpy(float) - float(steps["start_s"].min()) + spent_s / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            spent, rows_spent = (
                np.histogram(middles, edges, weights=weights)[0] for weights in (spent_s, spent_s * live)
            )
            sizes = rows_spent / spent
        shares = np.bincount(live.astype(int), spent_s) / max(spent_s.sum(), _SAME_S)
        time_at_size = [(float(size), float(shares[size])) for size in np.flatnonzero(shares)]
    return OverTime(
        list(zip(at_s, rates.tolist(), strict=True)),
        list(zip(at_s, sizes.tolist(), strict=False)),
        time_at_size,
    )


def batch_timeline(rows: pd.DataFrame, steps: pd.DataFrame, num_slots: int) -> Timeline | None:
    """The timeline of one replay; None where the server told no stamps or kept no step log."""
    needed = ["received_s", "queue_s", "batch_wait_s", "prefill_s", "decode_s"]
    if steps.empty or "received_s" not in rows:
        return None
    told = rows[rows[needed].notna().all(axis=1) & rows["error"].isna()]
    if told.empty:
        return None
    start_s = float(steps["start_s"].min())
    steps = steps.assign(end_s=steps["start_s"] + steps["duration_s"] - start_s).sort_values("end_s")
    ends_s, num_dead = (steps[name].to_numpy(float) for name in ("end_s", "num_dead_rows"))
    span_s = float(ends_s[-1])
    # Received, let in, in the batch, first token, last token.
    joined, first, finished = told[needed].cumsum(axis=1).to_numpy(float).T[2:] - start_s
    # A dead row leaves with the last live one of its batch: at the end of the run of steps with dead rows.
    is_last = np.append(num_dead[1:] == 0, True)
    batch_ends_s = pd.Series(np.where(is_last, ends_s, np.nan)).bfill().where(num_dead > 0, 0.0)
    following = np.searchsorted(ends_s, finished + _SAME_S, side="right")
    left = np.maximum(finished, np.append(batch_ends_s, 0.0)[following])
    bars: list[Bar] = []
    free_at: list[float] = []
    for i in np.argsort(joined, kind="stable"):
        lane = next((n for n, until in enumerate(free_at) if until <= joined[i] + _SAME_S), len(free_at))
        free_at[lane : lane + 1] = [left[i]]
        at_s = (float(of[i]) for of in (joined, first, finished, left))
        bars.append(Bar(lane, str(told["prompt_id"].iat[i]), *at_s))
    num_lanes = max(num_slots, len(free_at))
    live, dead = (
        float((steps[name] * steps["duration_s"]).sum()) / (num_lanes * span_s)
        for name in ("num_rows", "num_dead_rows")
    )
    return Timeline(bars, num_lanes, span_s, live, dead, idle_share=max(0.0, 1 - live - dead))
