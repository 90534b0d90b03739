"""What ratios measured in blocks allow one to say: better, worse, equivalent, or how much is missing.

The block is the unit: requests within one share a service start and a spell of the machine. A verdict holds
however often it was looked at while blocks were added: each look spends a part of the allowed error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.comparing.intervals import (
    FEWEST_BLOCKS,
    MAX_MORE_BLOCKS,
    blocks_missing,
    bounded_exp,
    error_of_look,
    log_interval,
    middle_and_error,
    next_blocks,
)
from harness.results.table import counted

CONFIDENCE = 0.95
DEFAULT_MARGIN = 0.05

Word = Literal["better", "worse", "equivalent", "can't tell"]


FARTHEST = 100
"""An interval that goes further both ways says nothing in numbers."""


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
    """Blocks to measure next; 0 where there is a verdict, `MAX_MORE_BLOCKS` + 1 where no number would do.
    At most twice what there is, because few blocks tell little of how many are needed."""
    margin: float

    @property
    def is_out_of_reach(self) -> bool:
        """No number of blocks that anybody measures would decide."""
        return self.num_missing > MAX_MORE_BLOCKS

    def text(self) -> str:
        if self.word == "can't tell":
            return f"can't tell: {self.missing_text()}"
        return self.word if self.word != "equivalent" else f"equivalent within {self.margin:.0%}"

    def missing_text(self) -> str:
        """How many blocks decide; where that is no plan, what the difference is at most."""
        if not self.is_out_of_reach:
            return f"need {self.asked_text()}"
        return f"the difference, if any, is below {self.bound_text()}"

    def asked_text(self) -> str:
        """What is asked for at once is at most twice what there is, or what a first interval needs."""
        is_cut = self.num_missing in (2 * self.num_blocks, FEWEST_BLOCKS - self.num_blocks)
        return ("at least " if is_cut else "") + counted(self.num_missing, "more block")

    def bound_text(self) -> str:
        """As 12%, or 3.1x: the end of the interval that lies further from 1."""
        assert self.interval is not None
        most = max(1 / self.interval[0], self.interval[1])
        return f"{most - 1:.0%}" if most < 2 else f"{most:.2g}x"

    def interval_text(self) -> str:
        if self.interval is None:
            return counted(self.num_blocks, "block")
        if self.interval[0] < 1 / FARTHEST and self.interval[1] > FARTHEST:
            return "too few blocks"
        return f"{self.interval[0]:.3g}-{self.interval[1]:.3g}"


def judge_ratio(
    log_ratios: Sequence[float],
    *,
    higher_is_better: bool,
    error_share: float = 1.0,
    margin: float = DEFAULT_MARGIN,
    confidence: float = CONFIDENCE,
    extra_variance: float = 0.0,
    lost_degrees: int = 0,
    first_look: int = FEWEST_BLOCKS,
) -> Verdict:
    """Judge the ratio to a reference from one logarithm a block.

    `error_share` is this metric's part of the error that all metrics judged together may make: each
    interval is widened so that all of them hold at `confidence` (Bonferroni), at this look and at all others.
    The first look was after `first_look` blocks. `margin` 0.05: ratios from 1/1.05 to 1.05 count as
    equivalent. `extra_variance` and `lost_degrees` are those of `intervals.Ordered`.
    """
    logs = np.asarray(log_ratios, dtype=float)
    num_blocks = len(logs)
    if not num_blocks:
        raise ValueError("a verdict needs at least one block")
    of_metric = 1 - (1 - confidence) * error_share
    each = 1 - (1 - of_metric) * error_of_look(num_blocks, first_look)
    bound = math.log1p(margin)
    if num_blocks < 2:
        ratio, missing = math.exp(float(logs[0])), FEWEST_BLOCKS - num_blocks
        return Verdict("can't tell", ratio, None, each, num_blocks, missing, margin)
    middle, error = middle_and_error(logs, extra_variance)
    low, high = map(float, log_interval(logs, each, extra_variance=extra_variance, lost_degrees=lost_degrees))
    word: Word = "can't tell"
    if -bound < low and high < bound:
        word = "equivalent"
    elif low > 0 or high < 0:
        word = "better" if (low > 0) == higher_is_better else "worse"
    missing = 0
    if word == "can't tell":
        needed = blocks_missing(float(error), num_blocks, bound, of_metric, lost_degrees, first_look)
        missing = next_blocks(needed, num_blocks)
    interval = bounded_exp(low), bounded_exp(high)
    return Verdict(word, math.exp(float(middle)), interval, each, num_blocks, missing, margin)
