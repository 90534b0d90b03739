"""The headline metrics of a comparison, and what the blocks say about each of them.

What enters are the rows of arms measured in the same blocks; what leaves is one `Contrast` for each arm and
metric. Within a block the same planned request is taken under both arms, and only if both answered it; then
each block gives one logarithm of a ratio, and `verdict` judges those. Knows no files and prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.comparing.verdict import DEFAULT_MARGIN, Judgement, judge_ratio
from harness.results.metrics import throughput
from harness.results.stats import percentile

Value = Callable[[pd.DataFrame, bool], float | None]
"""From the answers of one arm in one block, and whether the loop was open."""


@dataclass(frozen=True, slots=True)
class Headline:
    """`value` None marks the metric that is paired request by request instead of over a block."""

    name: str
    higher_is_better: bool
    value: Value | None


@dataclass(frozen=True, slots=True)
class Contrast:
    """One metric of `arm` against `reference`; `judgement` None where no block has both values."""

    arm: str
    reference: str
    metric: Headline
    judgement: Judgement | None
    log_ratios: tuple[float, ...]

    def text(self) -> str:
        """As 4.00x [3.90-4.10]; the bare ratio where one block is all there is."""
        found = self.judgement
        if found is None:
            return "n too small"
        return f"{ratio_text(found.ratio)}" + (f" [{found.interval_text()}]" if found.interval else "")


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"


def _tokens_per_s(rows: pd.DataFrame, is_open: bool) -> float | None:
    rate = throughput(rows, is_open=is_open)
    return rate.output_tokens_per_s if rate else None


def _percentile_of(column: str, q: int) -> Value:
    return lambda rows, _: percentile(rows[column].to_numpy(dtype=float), q).value


THROUGHPUT = Headline("output tok/s", True, _tokens_per_s)
REQUEST_TIME = Headline("time per request", False, None)
"""From schedule to last token: the geometric mean over requests of the ratio of one request to itself."""
# Latencies count from schedule: from send, a strategy whose client waits before it sends would look better.
HEADLINES = (
    THROUGHPUT,
    REQUEST_TIME,
    Headline("TTFT p50", False, _percentile_of("ttft_sched_ms", 50)),
    Headline("TTFT p95", False, _percentile_of("ttft_sched_ms", 95)),
    Headline("total p95", False, _percentile_of("total_sched_ms", 95)),
)


def primary(is_open: bool) -> Headline:
    """What a comparison is decided by: an open loop delivers its rate under every arm that keeps up."""
    return REQUEST_TIME if is_open else THROUGHPUT


def error_share(metric: Headline, is_open: bool) -> float:
    """Half of the allowed error is for the deciding metric, the others share the rest."""
    return 0.5 if metric == primary(is_open) else 0.5 / (len(HEADLINES) - 1)


def contrasts(
    rows: pd.DataFrame,
    arms: Sequence[str],
    reference: str,
    *,
    is_open: bool,
    margin: float = DEFAULT_MARGIN,
) -> list[Contrast]:
    """Every arm but the reference, each with all headline metrics; intervals hold together for one arm."""
    found: list[Contrast] = []
    of_reference = dict(tuple(rows[rows["arm"] == reference].groupby("repeat")))
    for arm in arms:
        if arm == reference:
            continue
        blocks = [
            (ours, of_reference[block])
            for block, ours in rows[rows["arm"] == arm].groupby("repeat")
            if block in of_reference
        ]
        pairs = [both_answered(ours, theirs) for ours, theirs in blocks]
        for metric in HEADLINES:
            each = (_log_ratio(metric, ours, theirs, is_open) for ours, theirs in pairs)
            logs = [log for log in each if log is not None]
            judgement = None
            if logs:
                judgement = judge_ratio(
                    logs,
                    higher_is_better=metric.higher_is_better,
                    error_share=error_share(metric, is_open),
                    margin=margin,
                )
            found.append(Contrast(arm, reference, metric, judgement, tuple(logs)))
    return found


def both_answered(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same planned requests of one block under two arms, those that either failed left out."""
    ours, theirs = (part[part["error"].isna()].set_index("schedule_index") for part in (ours, theirs))
    common = ours.index.intersection(theirs.index)
    return ours.loc[common], theirs.loc[common]


def _log_ratio(metric: Headline, ours: pd.DataFrame, theirs: pd.DataFrame, is_open: bool) -> float | None:
    if metric.value is None:
        ratios = ours["total_sched_ms"].to_numpy(float) / theirs["total_sched_ms"].to_numpy(float)
        usable = ratios[np.isfinite(ratios) & (ratios > 0)]
        return float(np.log(usable).mean()) if len(usable) else None
    pair = metric.value(ours, is_open), metric.value(theirs, is_open)
    if not pair[0] or not pair[1]:
        return None
    return math.log(pair[0] / pair[1])


def decision(found: Sequence[Contrast], arm: str, is_open: bool) -> Contrast | None:
    """The contrast that decides about one arm."""
    return next((c for c in found if c.arm == arm and c.metric == primary(is_open)), None)


def more_blocks(found: Sequence[Contrast], is_open: bool) -> int:
    """How many more blocks the deciding metric of every arm needs for a verdict."""
    deciding = [c.judgement for c in found if c.metric == primary(is_open) and c.judgement]
    return max((j.num_missing for j in deciding), default=0)


def in_words(found: Sequence[Contrast], arm: str) -> str:
    """As: better in output tok/s (4.00x), TTFT p50 (0.20x); can't tell in TTFT p95 (need 12 more blocks)."""
    parts: dict[str, list[str]] = {}
    for contrast in found:
        judgement = contrast.judgement
        if contrast.arm != arm:
            continue
        name = contrast.metric.name
        if judgement is None:
            parts.setdefault("too few samples for", []).append(name)
        elif judgement.word == "can't tell":
            parts.setdefault("can't tell in", []).append(
                f"{name} (need {judgement.missing_text()} more blocks)"
            )
        elif judgement.word == "equivalent":
            parts.setdefault(f"equivalent within {judgement.margin:.0%} in", []).append(name)
        else:
            parts.setdefault(f"{judgement.word} in", []).append(f"{name} ({ratio_text(judgement.ratio)})")
    order = sorted(parts, key=lambda kind: ("better", "worse", "equi", "can't", "too").index(_stem(kind)))
    return "; ".join(f"{kind} {', '.join(parts[kind])}" for kind in order)


def _stem(kind: str) -> str:
    return next(stem for stem in ("better", "worse", "equi", "can't", "too") if kind.startswith(stem))
