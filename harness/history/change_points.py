"""Nights at which a series changed its level, with a bound on false alarms.

The test is Pettitt's: a CUSUM of ranks, which one wild night cannot move, weighted so that changes near the
ends are found as well. Its critical value comes from random permutations of the ranks, so that it holds for
every distribution of the noise. It assumes that nights are exchangeable. A machine that is slow for days
breaks that: the statistic is divided by what such a memory adds, an estimate that mends only a part of it.

Sources: Pettitt (1979); Vostrikova (1981) for binary segmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from harness.comparing.intervals import t_quantile
from harness.results.formulas import Floats

FALSE_ALARM = 0.05
"""Chance that pure noise has a mark anywhere, over all series that are looked at together."""
MIN_NIGHTS = 4
"""Nights that have to stand on each side of a change."""
MOST_NIGHTS = 400
"""Older ones are left out: the permutations of longer series take seconds."""
NUM_PERMUTATIONS = 20_000
CLIPPED_AT = 9.0
"""Of the median squared difference."""


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """`index` is the first night of the new level; `ratio` that of the medians after and before it, in a
    chain that of its night. `p_value` of a jump is a bound."""

    index: int
    ratio: float
    p_value: float


def change_points(values: Floats, *, false_alarm: float = FALSE_ALARM) -> list[ChangePoint]:
    """In the order of nights. `values` are positive, one a night, the oldest first.

    A history of pure noise has any mark with a chance of at most `false_alarm`. Each half of a series that
    was cut is searched with half of that.
    """
    skipped = max(0, len(values) - MOST_NIGHTS)
    logs = np.log(values[skipped:])
    cuts = _cuts(logs, 0, len(logs), false_alarm)
    edges = [0, *(index for index, _ in cuts), len(logs)]
    levels = [float(np.median(logs[a:b])) for a, b in pairwise(edges)]
    return [
        ChangePoint(index + skipped, float(np.exp(levels[i + 1] - levels[i])), p_value)
        for i, (index, p_value) in enumerate(cuts)
    ]


def jumps(levels: Floats, *, false_alarm: float = FALSE_ALARM) -> list[ChangePoint]:
    """Nights at which a chain of ratios jumps; the first value stands before the first ratio.

    A chain adds up the noise of its ratios, so it walks at random and has no levels to compare. Its steps are
    independent, though: one is a jump where it is too large for the spread of all of them (by the median of
    their sizes, which jumps hardly move).
    """
    steps = np.diff(np.log(levels))
    if len(steps) < 2 * MIN_NIGHTS - 1 or not (spread := 1.4826 * float(np.median(np.abs(steps)))):
        return []
    # The median of sizes uses 37% of what the steps tell.
    degrees = max(3, int(0.37 * len(steps)))
    sizes = np.abs(steps) / spread
    limit = t_quantile(1 - false_alarm / len(steps) / 2, degrees)
    return [
        ChangePoint(int(at) + 1, float(np.exp(steps[at])), false_alarm)
        for at in np.flatnonzero(sizes > limit)
    ]


def _cuts(logs: Floats, start: int, end: int, level: float) -> list[tuple[int, float]]:
    num = end - start
    if num < 2 * MIN_NIGHTS:
        return []
    part = logs[start:end]
    before = _best_cut(part)
    statistic = float(_cusum(_ranks(part)[None, :]).max()) / _inflation(part)
    null = _null(num)
    p_value = (1 + int((null >= statistic).sum())) / (1 + len(null))
    if p_value > level:
        return []
    middle = start + before
    return [
        *_cuts(logs, start, middle, level / 2),
        (middle, p_value),
        *_cuts(logs, middle, end, level / 2),
    ]


def _best_cut(part: Floats) -> int:
    """How many nights stand before the change: two medians fit the nights best (least absolute error)."""
    places = range(MIN_NIGHTS, len(part) - MIN_NIGHTS + 1)
    errors = [
        sum(float(np.abs(side - np.median(side)).sum()) for side in np.split(part, [p])) for p in places
    ]
    return MIN_NIGHTS + int(np.argmin(errors))


def _inflation(part: Floats) -> float:
    """What noise with a memory adds to a CUSUM: that of AR(1), never below 1.

    For AR(1) the mean squared difference over two nights is (1 + memory) times that over one. A step is
    in few differences, and those are clipped.
    """
    squares = [np.square(part[lag:] - part[:-lag]) for lag in (1, 2)]
    edge = CLIPPED_AT * float(np.median(np.concatenate(squares)))
    one, two = (float(np.minimum(square, edge).mean()) for square in squares)
    memory = min(0.9, max(0.0, two / one - 1)) if one else 0.0
    return math.sqrt((1 + memory) / (1 - memory))


def _ranks(values: Floats) -> Floats:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, of_value, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[of_value]
    return ranks


def _cusum(ranks: Floats) -> Floats:
    """(series, nights) -> (series, places of a change)."""
    num = ranks.shape[-1]
    before = np.arange(MIN_NIGHTS, num - MIN_NIGHTS + 1)
    sums = np.cumsum(ranks - (num + 1) / 2, axis=-1)[..., before - 1]
    weighted: Floats = np.abs(sums) / np.sqrt(before * (num - before))
    # Ties of floats must not decide between a series and its permutations.
    return np.round(weighted, 9)


@lru_cache(maxsize=MOST_NIGHTS)
def _null(num: int) -> NDArray[np.float64]:
    """The statistic of `NUM_PERMUTATIONS` random orders of the ranks 1 to num."""
    generator = np.random.default_rng(num)
    found = [
        _cusum(generator.permuted(np.tile(np.arange(1.0, num + 1), (2000, 1)), axis=1)).max(axis=-1)
        for _ in range(NUM_PERMUTATIONS // 2000)
    ]
    return np.concatenate(found)
