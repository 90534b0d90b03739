"""Small statistics with their limits attached.

What enters are plain numbers; what leaves are percentiles that say when too few samples stand behind
them, and ratios with a spread. Knows no columns, no variants and no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np
from numpy.typing import ArrayLike

MIN_SAMPLES = {50: 1, 95: 60, 99: 300}

# Two-sided 95% quantiles of Student's t for 1..30 degrees of freedom; beyond, the normal one is close.
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Percentile:
    """`value` is None where fewer than `min_samples` stand behind it."""

    q: int
    value: float | None
    num_samples: int
    min_samples: int

    def text(self, digits: int = 1) -> str:
        if self.value is None:
            return f"n<{self.min_samples}"
        return f"{self.value:,.{digits}f}"


def percentile(values: ArrayLike, q: int, *, weights: ArrayLike | None = None) -> Percentile:
    """The q-th percentile of the values that are numbers, linear between neighbours.

    `weights` are whole counts: a value of weight 3 stands there three times.
    """
    samples = np.asarray(values, dtype=float)
    if weights is not None:
        samples = np.repeat(samples, np.asarray(weights, dtype=int))
    samples = samples[~np.isnan(samples)]
    least = MIN_SAMPLES[q]
    value = float(np.percentile(samples, q)) if len(samples) >= least else None
    return Percentile(q, value, len(samples), least)


def mean_of(values: ArrayLike) -> float | None:
    samples = np.asarray(values, dtype=float)
    samples = samples[~np.isnan(samples)]
    return float(samples.mean()) if len(samples) else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Paired ratios of several blocks: median, extremes, and a 95% t interval on their logarithms."""

    median: float
    low: float
    high: float
    interval: tuple[float, float] | None
    """None with fewer than two blocks."""
    num_blocks: int

    def text(self) -> str:
        if self.num_blocks == 1:
            return f"{self.median:.2f}x"
        return f"{self.median:.2f}x [{self.low:.2f}-{self.high:.2f}]"

    def interval_text(self) -> str:
        return "1 block" if self.interval is None else f"{self.interval[0]:.2f}-{self.interval[1]:.2f}"


def paired_ratio(values: Sequence[float], references: Sequence[float]) -> Ratio:
    """Ratios value / reference of the same blocks, in the same order; all must be above 0."""
    if len(values) != len(references) or not values:
        raise ValueError("paired ratios need one reference per value, and at least one pair")
    if min(*values, *references) <= 0:
        raise ValueError("paired ratios need values above 0")
    ratios = [value / reference for value, reference in zip(values, references, strict=True)]
    logs = [math.log(ratio) for ratio in ratios]
    interval = None
    if len(logs) > 1:
        half_width = _t_quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
        interval = (math.exp(fmean(logs) - half_width), math.exp(fmean(logs) + half_width))
    return Ratio(median(ratios), min(ratios), max(ratios), interval, len(ratios))


def _t_quantile(degrees_of_freedom: int) -> float:
    return _T_95[degrees_of_freedom - 1] if degrees_of_freedom <= len(_T_95) else 1.96
