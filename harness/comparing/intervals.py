"""Interval of the mean logarithm of a ratio over blocks, and how many blocks a verdict needs.

Every function works on the last axis, so that thousands of simulated comparisons are judged by the code that
judges one. Sources: Tukey and McLaughlin (1963) for the trimmed t; Pocock (1977) for looks at one level.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

POWER = 0.90
FEWEST_BLOCKS = 3
"""With two, the estimate of the spread has one degree of freedom and every interval is useless."""
MAX_MORE_BLOCKS = 100
"""Most blocks that are ever asked for: estimates from few blocks run into the thousands."""
FEWEST_TRIMMED = 5
"""Of three or four blocks none can be left out: with one disturbed, t is near 1 whatever the others say."""
FEWEST_TO_GIVE_UP = 8
SPREAD_CONFIDENCE = 0.80
MIN_ORDER_DEGREES = 4
CLIPPED_AT = 3.0
NUM_FITS = 15
ERROR_OF_EARLY_LOOK = (0.40, 0.10, 0.05)
ERROR_OF_LATER_LOOK = 1 / 30
"""Parts of the allowed error, at the first look and after each block more. Looks at the same blocks agree
mostly, so that all looks from 3 to 60 blocks together spend no more than the whole (simulated: 99% of an
error of 0.4%; less where the first look is a later one)."""


class Ordered(NamedTuple):
    """Logarithms of ratios without the drift within a block."""

    logs: Floats
    extra_variance: Floats
    """Of their mean, because the drift is an estimate. Has the shape of `logs` without its last axis."""
    lost_degrees: int


def bounded_exp(value: float) -> float:
    """Bounds of few blocks run past what a float holds."""
    return math.exp(min(max(value, -700.0), 700.0))


def error_of_look(num_blocks: int, first_look: int = FEWEST_BLOCKS) -> float:
    """The part of the allowed error that a look after so many blocks may spend, `first_look` being the number
    that was planned."""
    later = max(0, num_blocks - first_look)
    return ERROR_OF_EARLY_LOOK[later] if later < len(ERROR_OF_EARLY_LOOK) else ERROR_OF_LATER_LOOK


def num_trimmed(num_blocks: int) -> int:
    """Blocks left out at each end: one disturbed block then moves nothing."""
    return 0 if num_blocks < FEWEST_TRIMMED else max(1, num_blocks // 10)


def log_interval(
    logs: Floats, confidence: float, *, extra_variance: Floats | float = 0.0, lost_degrees: int = 0
) -> tuple[Floats, Floats]:
    """Student's interval; from `FEWEST_TRIMMED` blocks on that of the trimmed mean."""
    middle, error = middle_and_error(logs, extra_variance)
    num_blocks = logs.shape[-1]
    degrees = max(1, num_blocks - 2 * num_trimmed(num_blocks) - 1 - lost_degrees)
    half_width = t_quantile(1 - (1 - confidence) / 2, degrees) * error
    return middle - half_width, middle + half_width


def middle_and_error(logs: Floats, extra_variance: Floats | float = 0.0) -> tuple[Floats, Floats]:
    """The (trimmed) mean and its standard error."""
    num_blocks = logs.shape[-1]
    trimmed = num_trimmed(num_blocks)
    kept = num_blocks - 2 * trimmed
    ordered = np.sort(logs, axis=-1)
    inner = ordered[..., trimmed : num_blocks - trimmed]
    middle = inner.mean(axis=-1)
    # Winsorized: a block that is left out counts as the outermost one that is kept.
    low, high = inner[..., :1], inner[..., -1:]
    variance = np.clip(ordered, low, high).var(axis=-1, ddof=1)
    own = variance * (num_blocks - 1) / (kept * (kept - 1))
    return middle, np.sqrt(own + extra_variance)


def blocks_missing(
    error: float,
    num_blocks: int,
    bound: float,
    confidence: float,
    lost_degrees: int = 0,
    first_look: int = FEWEST_BLOCKS,
) -> int:
    """How many more blocks find a difference of `bound`, or show its absence, with `POWER`.

    `error` is that of `num_blocks` blocks. The spread is taken at its upper `SPREAD_CONFIDENCE` limit: three
    blocks often estimate it far too small. Any number above `MAX_MORE_BLOCKS` is returned as one above it.
    """
    degrees = max(1, num_blocks - 2 * num_trimmed(num_blocks) - 1 - lost_degrees)
    spread = error * math.sqrt(num_blocks) * math.sqrt(degrees / low_chi_square(degrees))
    for more in range(1, MAX_MORE_BLOCKS + 1):
        num = num_blocks + more
        later = num - 2 * num_trimmed(num) - 1 - lost_degrees
        if num < FEWEST_BLOCKS or later < 1:
            continue
        each = 1 - (1 - confidence) * error_of_look(num, first_look)
        reach = t_quantile(1 - (1 - each) / 2, later) + t_quantile(1 - (1 - POWER) / 2, later)
        if reach * spread / math.sqrt(num) <= bound:
            return more
    return MAX_MORE_BLOCKS + 1


def next_blocks(missing: int, num_blocks: int) -> int:
    """How many of those `missing` are asked for at once: at most twice what there is, and never out of reach
    on the word of few blocks, since one of them may be disturbed."""
    if missing > MAX_MORE_BLOCKS and num_blocks >= FEWEST_TO_GIVE_UP:
        return missing
    return min(missing, 2 * num_blocks)


def without_order(logs: Floats, positions: NDArray[np.int64], reference: int) -> Ordered:
    """Take out what runs of a block gain or lose by their place in it.

    `logs` (..., arms, blocks) are ratios to the arm in row `reference`, whose own row is zero; `positions`
    (arms, blocks) are the places. One slope is fitted to all arms; too few runs for that change nothing.
    """
    num_arms, num_blocks = positions.shape
    degrees = (num_arms - 1) * (num_blocks - 1) - 1
    place = _centred(positions.astype(float))
    leverage = float((place**2).sum())
    if degrees < MIN_ORDER_DEGREES or leverage == 0:
        return Ordered(logs, np.zeros(logs.shape[:-1]), 0)
    clipped = logs
    for _ in range(NUM_FITS):
        value = _centred(clipped)
        slope = (place * value).sum(axis=(-2, -1)) / leverage
        rest = value - slope[..., None, None] * place
        # For the next fit a disturbed run counts as one at the edge of the others (Huber).
        edge = CLIPPED_AT * np.median(np.abs(rest), axis=(-2, -1), keepdims=True)
        clipped = clipped - rest + np.clip(rest, -edge, edge)
    slope_variance = (rest**2).sum(axis=(-2, -1)) / degrees / leverage
    steps = positions - positions[reference]
    extra = slope_variance[..., None] * steps.mean(axis=-1) ** 2
    # With two arms the slope is fitted to the very ratios that are judged.
    return Ordered(logs - slope[..., None, None] * steps, extra, 1 if num_arms == 2 else 0)


def _centred(values: Floats) -> Floats:
    """Without the means of arms and of blocks (the last two axes)."""
    of_arms: Floats = values - values.mean(axis=-1, keepdims=True)
    centred: Floats = of_arms - of_arms.mean(axis=-2, keepdims=True)
    return centred


def low_chi_square(degrees: int) -> float:
    """The quantile of chi-square at `1 - SPREAD_CONFIDENCE`. Source: Wilson and Hilferty (1931)."""
    z = -0.8416212335729143
    step = 2 / (9 * degrees)
    return degrees * (1 - step + z * math.sqrt(step)) ** 3


@lru_cache(maxsize=4096)
def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Quantile of Student's t for a probability above one half.

    With t = sqrt(df) tan(angle) the density is cos(angle)^(df - 1) on a bounded range.
    """
    angles = np.linspace(0.0, math.pi / 2, 40_001)
    density = np.cos(angles) ** (degrees_of_freedom - 1)
    steps = (density[1:] + density[:-1]) / 2
    share = np.concatenate(([0.0], np.cumsum(steps))) / steps.sum()
    angle = float(np.interp(2 * probability - 1, share, angles))
    return math.sqrt(degrees_of_freedom) * math.tan(angle)
