"""The history as series: one figure of one strategy under one backend, model and load, a value a night.

Older commits that were measured beside a new one are no nights of their own. INVALID results are no values.
Change points are sought among nights on the same machine, because another machine is no change of the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.history.change_points import FALSE_ALARM, MIN_NIGHTS, change_points

GROUP = ["backend", "model", "load"]
"""What one part of the page has in common."""

SHOWN = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "itl_p99_ms")
"""Keys of figures, as `--slo` spells them."""


class Mark(NamedTuple):
    """A change of level. `at` is its first night, `ratio` that of the levels after and before."""

    group: tuple[str, ...]
    strategy: str
    metric: str
    at: pd.Timestamp
    commit: str
    value: float
    ratio: float
    p_value: float


def nights(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a night, strategy and figure: of the last result where a night has several."""
    results = rows[(rows["kind"] == "result") & ~rows["is_old"]]
    results = results.assign(night=results["started_at"].dt.strftime("%Y-%m-%d")).sort_values("started_at")
    return results.drop_duplicates([*GROUP, "strategy", "metric", "night"], keep="last")


def marks(rows: pd.DataFrame, metrics: Sequence[str] = SHOWN) -> list[Mark]:
    """Change points of all series together: with pure noise in every series, any mark has `FALSE_ALARM`."""
    usable = nights(rows)
    usable = usable[
        usable["metric"].isin(metrics) & (usable["validity"] != "INVALID") & (usable["value"] > 0)
    ]
    series = [
        (key, own)
        for key, own in usable.groupby([*GROUP, "strategy", "metric", "machine"])
        if len(own) >= 2 * MIN_NIGHTS
    ]
    found: list[Mark] = []
    for key, own in series:
        *group, strategy, metric, _ = map(str, key)
        for change in change_points(own["value"].to_numpy(), false_alarm=FALSE_ALARM / len(series)):
            night = own.iloc[change.index]
            at, commit, value = night["started_at"], night["commit"], float(night["value"])
            where = (tuple(group), strategy, metric, at, commit, value)
            found.append(Mark(*where, change.ratio, change.p_value))
    return sorted(found, key=lambda mark: (mark.at, mark.strategy, mark.metric))


def validity_number(level: str) -> float:
    return {"VALID": 1.0, "CAUTION": 0.5}.get(level, 0.0)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
