"""The history as series: one figure of one strategy under one backend, model and load, a value a night.

Older commits that were measured beside a new one are no nights of their own. INVALID results are no values.
Change points are sought among nights on the same machine, because another machine is no change of the code.
Where nights hold a commit against an older one, the ratios are chained: what a machine does from night to
night is in no ratio, so a chain runs over all machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.history.change_points import FALSE_ALARM, MIN_NIGHTS, change_points, jumps
from harness.history.entries import COMMIT_CHARS

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
    of_ratios: bool = False


def chained(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a night, strategy and figure; `value` is the level of its commit, 1 the oldest one's.

    `low` and `high` are those of the night's own ratio, on the level of the commit that it was held against.
    """
    held = rows[(rows["kind"] == "comparison") & (rows["validity"] != "INVALID")]
    prefix = held["strategy"].astype(str) + " at "
    is_own = [str(against).startswith(start) for against, start in zip(held["against"], prefix, strict=True)]
    held = held[np.array(is_own, dtype=bool)].sort_values("started_at")
    if held.empty:
        return held
    made = []
    for _, own in held.groupby([*GROUP, "strategy", "metric"]):
        levels: dict[str, float] = {}
        last = 1.0
        for night in own.to_dict("records"):
            old = str(night["against"]).rpartition(" at ")[2][:COMMIT_CHARS]
            # A commit that is not in the chain (the history was pruned) stands where the chain ends.
            level = levels.setdefault(old, last)
            last = level * night["value"]
            if old != night["commit"]:
                levels[night["commit"]] = last
            scaled = {column: level * night[column] for column in ("value", "low", "high")}
            made.append(night | scaled)
    return pd.DataFrame(made, columns=held.columns)


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
    told = chained(rows)
    chains = [
        (key, own)
        for key, own in told[told["metric"].isin(metrics)].groupby([*GROUP, "strategy", "metric"])
        if len(own) >= 2 * MIN_NIGHTS
    ]
    level = FALSE_ALARM / max(1, len(series) + len(chains))
    found: list[Mark] = []
    for key, own in chains:
        *group, strategy, metric = map(str, key)
        for change in jumps(np.concatenate(([1.0], own["value"].to_numpy())), false_alarm=level):
            night = own.iloc[change.index - 1]
            at, commit, value = night["started_at"], night["commit"], float(night["value"])
            where = (tuple(group), strategy, metric, at, commit, value)
            found.append(Mark(*where, change.ratio, change.p_value, of_ratios=True))
    for key, own in series:
        *group, strategy, metric, _ = map(str, key)
        for change in change_points(own["value"].to_numpy(), false_alarm=level):
            night = own.iloc[change.index]
            at, commit, value = night["started_at"], night["commit"], float(night["value"])
            where = (tuple(group), strategy, metric, at, commit, value)
            found.append(Mark(*where, change.ratio, change.p_value))
    return sorted(found, key=lambda mark: (mark.at, mark.strategy, mark.metric))


def validity_number(level: str) -> float:
    return {"VALID": 1.0, "CAUTION": 0.5}.get(level, 0.0)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
