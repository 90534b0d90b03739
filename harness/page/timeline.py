"""The batch over time: which request held which slot, when it was live, and when its row was dead.

Slots carry no numbers on the wire: a request is drawn on the first lane that is free when it joins. All
times are seconds since the first step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.results.formulas import Floats

_SAME_S = 1e-6
_NUM_BINS = 60


@dataclass(frozen=True, slots=True)
class Bar:
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
    between_steps_share: float
    """Of the span: no step was being computed."""


@dataclass(frozen=True, slots=True)
class OverTime:
    """One replay in `_NUM_BINS` equal parts: `at_s` is the middle of each."""

    at_s: list[float]
    """Since the first request was sent."""
    tokens_per_s: list[float]
    batch_size: list[float]
    """Mean live rows of the steps of a part, by their time; NaN without steps, empty without a step log."""
    time_at_size: dict[int, float]
    """Share of the steps' time, by live rows."""


def load_over_time(rows: pd.DataFrame, steps: pd.DataFrame | None) -> OverTime | None:
    """None where nothing was answered, or without stamps of its chunks."""
    done = rows[rows["error"].isna() & (rows["num_output_tokens"] > 0)]
    each = [np.asarray(stamps, dtype=float) for stamps in done["chunk_s"] if len(stamps)]
    if len(each) < max(1, len(done)):
        return None
    all_stamps = np.concatenate(each)
    num_chunks = np.array([max(1, len(stamps)) for stamps in each])
    tokens = np.repeat(done["num_output_tokens"].to_numpy(float) / num_chunks, [len(s) for s in each])
    start_s = float(rows["sent_s"].min())
    edges = np.linspace(start_s, max(float(all_stamps.max()), start_s + _SAME_S), _NUM_BINS + 1)
    width_s = float(edges[1] - edges[0])
    at_s = (edges[:-1] + edges[1:]) / 2 - start_s
    sums = np.histogram(all_stamps, edges, weights=tokens)[0]
    sizes: Floats = np.empty(0)
    time_at_size: dict[int, float] = {}
    if steps is not None and not steps.empty:
        spent_s = steps["duration_s"].to_numpy(float)
        live = steps["num_rows"].to_numpy(float)
        middles = steps["start_s"].to_numpy(float) + spent_s / 2
        edges = edges - start_s + float(steps["start_s"].min())  # the server may have a clock of its own
        in_bin = np.histogram(middles, edges, weights=spent_s)[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            sizes = np.histogram(middles, edges, weights=spent_s * live)[0] / in_bin
        shares = steps["duration_s"].groupby(steps["num_rows"]).sum() / max(spent_s.sum(), _SAME_S)
        time_at_size = {int(str(size)): float(share) for size, share in shares.items()}
    return OverTime(at_s.tolist(), (sums / width_s).tolist(), sizes.tolist(), time_at_size)


def batch_timeline(rows: pd.DataFrame, steps: pd.DataFrame, num_slots: int) -> Timeline | None:
    """The timeline of one replay; None where the server told no stamps or kept no step log."""
    if steps.empty or "received_s" not in rows:
        return None
    needed = ["received_s", "queue_s", "batch_wait_s", "prefill_s", "decode_s"]
    told = rows[rows[needed].notna().all(axis=1) & rows["error"].isna()]
    if told.empty:
        return None
    start_s = float(steps["start_s"].min())
    ends = steps["start_s"] + steps["duration_s"]
    span_s = float(ends.max()) - start_s
    joined = told["received_s"] + told["queue_s"] + told["batch_wait_s"] - start_s
    first = joined + told["prefill_s"]
    finished = first + told["decode_s"]
    dead_until = _dead_until(steps.assign(end_s=ends - start_s))
    bars: list[Bar] = []
    free_at: list[float] = []
    for index in joined.sort_values().index:
        joined_s, finished_s = float(joined[index]), float(finished[index])
        lane = next((i for i, until in enumerate(free_at) if until <= joined_s + _SAME_S), len(free_at))
        left_s = dead_until(finished_s)
        free_at[lane : lane + 1] = [left_s]
        label = str(told.at[index, "prompt_id"])
        bars.append(Bar(lane, label, joined_s, float(first[index]), finished_s, left_s))
    num_lanes = max(num_slots, len(free_at))
    live, dead = (
        float((steps[name] * steps["duration_s"]).sum()) / (num_lanes * span_s)
        for name in ("num_rows", "num_dead_rows")
    )
    return Timeline(
        bars=bars,
        num_lanes=num_lanes,
        span_s=span_s,
        live_share=live,
        dead_share=dead,
        idle_share=max(0.0, 1 - live - dead),
        between_steps_share=max(0.0, 1 - float(steps["duration_s"].sum()) / span_s),
    )


def _dead_until(steps: pd.DataFrame) -> Callable[[float], float]:
    """A function: a row that finished then is computed as a dead one until when.

    Dead rows leave with the last live one of their batch, so at the end of the run of steps with dead rows.
    """
    ordered = steps.sort_values("end_s")
    ends = [float(end_s) for end_s in ordered["end_s"]]
    batch_ends: list[float] = []
    batch_end_s = 0.0
    for end_s, num_dead in zip(reversed(ends), reversed(list(ordered["num_dead_rows"])), strict=True):
        batch_end_s = (batch_end_s or end_s) if num_dead else 0.0
        batch_ends.append(batch_end_s)
    batch_ends.reverse()

    def until(finished_s: float) -> float:
        following = bisect_right(ends, finished_s + _SAME_S)
        return max(finished_s, batch_ends[following]) if following < len(ends) else finished_s

    return until
