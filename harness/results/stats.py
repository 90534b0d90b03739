"""Percentiles with the interval that their ranks give, and that say when too few samples stand behind them.

The interval runs between two of the ordered samples, whatever their distribution; the number of samples below
the true percentile is binomial. It counts independent samples, and gaps of one answer are not. Source: David
and Nagaraja (2003), Order Statistics, section 7.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

MIN_SAMPLES = {50: 1, 95: 60, 99: 300}
"""Fewer have no upper end: with 299 requests all are below the true p99 in 5% of runs."""
RANK_ERROR = 0.05
"""Of each end of an interval, which as a whole so holds at 90%."""


@dataclass(frozen=True, slots=True)
class Percentile:
    """`value` is None where fewer than `min_samples` stand behind it: their ranks then give no upper end."""

    q: int
    value: float | None
    num_samples: int
    min_samples: int
    interval: tuple[float, float] | None = None
    """By ranks; None where they give no lower end (a median of less than five)."""

    def text(self, digits: int = 1) -> str:
        if self.value is None:
            return f"n<{self.min_samples}"
        told = f"{self.value:,.{digits}f}"
        if self.interval is None:
            return told
        return f"{told} [{self.interval[0]:,.{digits}f}-{self.interval[1]:,.{digits}f}]"


@lru_cache(maxsize=256)
def rank_interval(num_samples: int, q: int, error: float = RANK_ERROR) -> tuple[int, int] | None:
    """Ranks from 1 on whose values enclose the q-th percentile, each end wrong in at most `error` of cases.

    None where the samples are too few to have both.
    """
    share = q / 100
    # Of the numbers of samples below the true value, those that are not rarer than 1e-20.
    mean, spread = num_samples * share, 10 + 10 * math.sqrt(num_samples * share * (1 - share))
    least, most = max(0, math.floor(mean - spread)), min(num_samples, math.ceil(mean + spread))
    num_below = np.arange(least, most)
    steps = np.log((num_samples - num_below) / (num_below + 1)) + math.log(share / (1 - share))
    logs = np.concatenate(([0.0], np.cumsum(steps)))
    chances = np.exp(logs - logs.max())
    at_most = np.cumsum(chances) / chances.sum()
    # The true value is below the sample of rank r where fewer than r samples are below it.
    low = least + int(np.searchsorted(at_most, error, side="right"))
    high = least + int(np.searchsorted(at_most, 1 - error)) + 1
    return (low, high) if low >= 1 and high <= num_samples else None


def percentile(
    values: ArrayLike, q: int, *, weights: ArrayLike | None = None, num_samples: int | None = None
) -> Percentile:
    """The q-th percentile of the values that are numbers, linear between neighbours.

    `weights` are whole counts: a value of weight 3 stands there three times. `num_samples` is how many count
    as independent, where that is not all of them.
    """
    samples = np.asarray(values, dtype=float)
    if weights is not None:
        samples = np.repeat(samples, np.asarray(weights, dtype=int))
    samples = samples[~np.isnan(samples)]
    samples.sort()
    least = MIN_SAMPLES[q]
    num = len(samples) if num_samples is None else num_samples
    if not len(samples) or num < least:
        return Percentile(q, None, num, least)
    interval = None
    if (ranks := rank_interval(num, q)) is not None:
        # Where requests count and not their gaps, the ranks are shares of all gaps.
        at = (np.array(ranks) * len(samples) / num).clip(1, len(samples)).round().astype(int) - 1
        low, high = samples[at]
        interval = (float(low), float(high))
    value = np.percentile(samples, q, overwrite_input=True)
    return Percentile(q, float(value), num, least, interval)


def mean_of(values: ArrayLike | Sequence[float | None]) -> float | None:
    """Of those that are numbers; None where there is none."""
    samples = np.asarray(values, dtype=float)
    samples = samples[~np.isnan(samples)]
    return float(samples.mean()) if len(samples) else None
