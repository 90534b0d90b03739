"""What ratios measured in blocks allow one to say: better, worse, equivalent, or how many blocks are missing.

The block is the unit: requests within one share a service start and a spell of the machine.
Sources: Stein (1945) for the number of blocks from a first stage; Efron's bootstrap-t for many blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
POWER = 0.90
DEFAULT_MARGIN = 0.05
MIN_BLOCKS_BOOTSTRAP = 10
NUM_RESAMPLES = 4000
MOST_TOLD = 100
FEWEST_BLOCKS = 3
"""With two, the estimate of the spread has one degree of freedom and every interval is useless."""

Word = Literal["better", "worse", "equivalent", "can't tell"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure of one arm against the reference, `ratio` and `interval` as they are (not logarithms)."""

    word: Word
    ratio: float
    interval: tuple[float, float] | None
    """At `confidence`; None with fewer than two blocks."""
    confidence: float
    num_blocks: int
    num_missing: int
    """Blocks that are still needed for a verdict; 0 where there is one."""
    margin: float

    def text(self) -> str:
        if self.word == "can't tell":
            return f"can't tell: need {self.missing_text()} more blocks"
        return self.word if self.word != "equivalent" else f"equivalent within {self.margin:.0%}"

    def missing_text(self) -> str:
        """Estimates from few blocks run into the thousands, which nobody should take for a plan."""
        return str(self.num_missing) if self.num_missing <= MOST_TOLD else f"over {MOST_TOLD}"

    def interval_text(self) -> str:
        if self.interval is None:
            return f"{self.num_blocks} block" if self.num_blocks == 1 else f"{self.num_blocks} blocks"
        return f"{self.interval[0]:.3g}-{self.interval[1]:.3g}"


def judge_ratio(
    log_ratios: Sequence[float],
    *,
    higher_is_better: bool,
    error_share: float = 1.0,
    margin: float = DEFAULT_MARGIN,
    confidence: float = CONFIDENCE,
) -> Verdict:
    """Judge the ratio to a reference from one logarithm a block.

    `error_share` is this metric's part of the error that all metrics judged together may make: each
    interval is widened so that all of them hold at `confidence` (Bonferroni).
    `margin` 0.05: ratios from 1/1.05 to 1.05 count as equivalent.
    """
    logs = np.asarray(log_ratios, dtype=float)
    num_blocks = len(logs)
    if not num_blocks:
        raise ValueError("a verdict needs at least one block")
    each = 1 - (1 - confidence) * error_share
    middle, bound = float(logs.mean()), math.log1p(margin)
    if num_blocks < 2:
        ratio = math.exp(middle)
        return Verdict("can't tell", ratio, None, each, num_blocks, FEWEST_BLOCKS - num_blocks, margin)
    low, high = log_interval(logs, each)
    word: Word = "can't tell"
    if -bound < low and high < bound:
        word = "equivalent"
    elif low > 0 or high < 0:
        word = "better" if (low > 0) == higher_is_better else "worse"
    missing = 0
    if word == "can't tell":
        missing = max(1, blocks_needed(logs, bound, each) - num_blocks)
    interval = (math.exp(low), math.exp(high))
    return Verdict(word, math.exp(middle), interval, each, num_blocks, missing, margin)


def log_interval(logs: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Interval of the mean: Student's, from `MIN_BLOCKS_BOOTSTRAP` blocks on a bootstrap of blocks."""
    num_blocks, middle = len(logs), float(logs.mean())
    error = float(logs.std(ddof=1)) / math.sqrt(num_blocks)
    if error == 0:
        return middle, middle
    upper = 1 - (1 - confidence) / 2
    if num_blocks < MIN_BLOCKS_BOOTSTRAP:
        half_width = t_quantile(upper, num_blocks - 1) * error
        return middle - half_width, middle + half_width
    low_t, high_t = np.quantile(_resampled_t(logs, middle), [1 - upper, upper])
    return middle - float(high_t) * error, middle - float(low_t) * error


def _resampled_t(logs: NDArray[np.float64], middle: float) -> NDArray[np.float64]:
    """The t statistic of `NUM_RESAMPLES` draws of whole blocks; a seed of its own, so a file judges alike."""
    generator = np.random.default_rng(20_260_101)
    num_blocks = len(logs)
    drawn = logs[generator.integers(0, num_blocks, (NUM_RESAMPLES, num_blocks))]
    spread = drawn.std(axis=1, ddof=1) / math.sqrt(num_blocks)
    # A draw of one block alone has no spread; it says nothing about the shape of t.
    usable = spread > 1e-12
    t: NDArray[np.float64] = (drawn.mean(axis=1)[usable] - middle) / spread[usable]
    return t


def blocks_needed(logs: NDArray[np.float64], bound: float, confidence: float) -> int:
    """Blocks in all, after which a difference of `bound` is found, or its absence shown, with `POWER`.

    Stein's rule: the t quantiles of this first stage, so that an estimate of the spread from three blocks,
    which is often far too small, still leads to enough of them.
    """
    degrees = len(logs) - 1
    reach = t_quantile(1 - (1 - confidence) / 2, degrees) + t_quantile(1 - (1 - POWER) / 2, degrees)
    return max(FEWEST_BLOCKS, math.ceil(float(logs.var(ddof=1)) * (reach / bound) ** 2))


@lru_cache(maxsize=4096)
def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Quantile of Student's t for a probability above one half.

    With t = sqrt(df) tan(angle) the density is cos(angle)^(df - 1) on a bounded range.
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees_of_freedom - 1)
    steps = (density[1:] + density[:-1]) / 2
    share = np.concatenate(([0.0], np.cumsum(steps))) / steps.sum()
    angle = float(np.interp(2 * probability - 1, share, angles))
    return math.sqrt(degrees_of_freedom) * math.tan(angle)
