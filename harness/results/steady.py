"""The steady window: the part of a replay in which load is as asked, without its start-up and its end.

Closed loop: from the instant at which every user's first request has its first token (until then a burst is
served) to the first answer after which a user finds no more work. Open loop: from one mean service time after
the first arrival to one before the last. Latencies are those of requests scheduled in the window; throughput
counts the tokens stamped in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd

from harness.plan.arrival_times import Load
from harness.results.formulas import throughput, tokens_until
from harness.results.metrics import TPOT, TTFT, Figure

FIGURES = tuple(Figure(metric, q) for metric in (TTFT, TPOT) for q in (50, 95))


@dataclass(frozen=True, slots=True)
class SteadyWindow:
    """Of one replay. Instants are on the clock of the stamps."""

    start_s: float
    end_s: float
    share: float
    """Of what throughput is measured over."""
    output_tokens_per_s: float
    rows: pd.DataFrame
    """Requests scheduled in it."""


def steady_window(rows: pd.DataFrame, load: Load) -> SteadyWindow | None:
    """None where load was never as asked: a user had one request only, say."""
    whole = throughput(rows, is_open=load.is_open)
    bounds = _open_bounds(rows) if load.is_open else _closed_bounds(rows, load.concurrency)
    if whole is None or bounds is None or bounds[1] <= bounds[0]:
        return None
    start_s, end_s = bounds
    stamped = ["chunk_s", "chunk_tokens", "num_output_tokens"]
    answers = rows.loc[rows["error"].isna(), stamped].to_dict("records")
    tokens = sum((tokens_until(row, end_s) - tokens_until(row, start_s) for row in answers), 0.0)
    inside = rows[(rows["scheduled_s"] >= start_s) & (rows["scheduled_s"] < end_s)]
    length_s = end_s - start_s
    return SteadyWindow(start_s, end_s, length_s / whole.window_s, tokens / length_s, inside)


def _closed_bounds(rows: pd.DataFrame, num_users: int) -> tuple[float, float] | None:
    """Each answer but the last `num_users` brings the next request, so that one more leaves a user idle."""
    if len(rows) <= num_users:
        return None
    first = rows.sort_values("schedule_index").head(num_users)
    started = [
        float(chunks[0]) if len(chunks) else float(finish)
        for chunks, finish in zip(first["chunk_s"], first["finish_s"], strict=True)
    ]
    ends = np.sort(rows["finish_s"].to_numpy(dtype=float))
    return max(started), float(ends[len(rows) - num_users])


def _open_bounds(rows: pd.DataFrame) -> tuple[float, float] | None:
    service_s = float(rows["total_sched_ms"].mean()) / 1e3
    if not service_s > 0:
        return None
    return float(rows["scheduled_s"].min()) + service_s, float(rows["scheduled_s"].max()) - service_s


SHORTEST_SHARE = 0.2
"""Of a run: a shorter window is an accident of a few steps."""


@dataclass(frozen=True, slots=True)
class SteadyFigures:
    """Medians over replays; None where samples are too few."""

    share: float
    num_requests: int
    output_tokens_per_s: float
    latencies: tuple[float | None, ...]
    """In the order of `FIGURES`."""

    def as_dict(self) -> dict[str, object]:
        """As JSON has it; latencies by the keys of their figures."""
        latencies = {figure.key: value for figure, value in zip(FIGURES, self.latencies, strict=True)}
        return {
            "share": self.share,
            "num_requests": self.num_requests,
            "output_tokens_per_s": self.output_tokens_per_s,
            "figures": latencies,
        }


def steady_figures(rows: pd.DataFrame, load: Load) -> SteadyFigures | None:
    """Of all replays in these rows; None where none has a window of `SHORTEST_SHARE`."""
    windows = [w for _, part in rows.groupby(["run_id", "repeat"]) if (w := steady_window(part, load))]
    found = [window for window in windows if window.share >= SHORTEST_SHARE]
    if not found:
        return None
    each = [[figure.value(window.rows, load.is_open) for figure in FIGURES] for window in found]
    return SteadyFigures(
        share=median(window.share for window in found),
        num_requests=round(median(len(window.rows) for window in found)),
        output_tokens_per_s=median(window.output_tokens_per_s for window in found),
        latencies=tuple(_median(values) for values in zip(*each, strict=True)),
    )


def never_steady(arms: Sequence[str]) -> list[str]:
    """What to know of arms whose replays have no window; they are those given."""
    if not arms:
        return []
    return [
        f"The load asked for held less than {SHORTEST_SHARE:.0%} of the time in {', '.join(arms)}: start-up "
        "and end are in these figures, and less so with more --requests."
    ]


def _median(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
