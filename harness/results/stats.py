"""Percentiles that say when too few samples stand behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MIN_SAMPLES = {50: 1, 95: 60, 99: 300}


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
    least = MIN_SAMPLES[q]
    num = len(samples) if num_samples is None else num_samples
    value = float(np.percentile(samples, q)) if len(samples) and num >= least else None
    return Percentile(q, value, num, least)


def mean_of(values: ArrayLike) -> float | None:
    samples = np.asarray(values, dtype=float)
    samples = samples[~np.isnan(samples)]
    return float(samples.mean()) if len(samples) else None
