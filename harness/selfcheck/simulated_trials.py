"""How often verdicts are right on simulated comparisons of a known slowdown.

`python -m harness.selfcheck.simulated_trials --write docs/measurement.md` makes its tables. All trials of one
kind are judged at once by the functions that judge one comparison, and after every block, as people do. The
noise is what breaks such verdicts: block noise with heavy tails, a machine that slows down steadily over the
whole comparison, one disturbed block, and services that differ a little from one start to the next.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from harness.comparing.arms import williams_row
from harness.comparing.contrasts import error_share, leading_figures
from harness.comparing.intervals import (
    FEWEST_BLOCKS,
    Floats,
    Ordered,
    blocks_missing,
    error_of_look,
    log_interval,
    middle_and_error,
    next_blocks,
    without_order,
)
from harness.comparing.verdict import CONFIDENCE, DEFAULT_MARGIN
from harness.results.metrics import deciding_figures
from harness.results.table import render_table, replace_section, share

NORMAL_DEGREES = 1000
Bools = NDArray[np.bool_]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviations of logarithms of run times, all with the tails of Student's t."""

    block: float = 0.05
    """Between blocks, the same for all arms."""
    run: float = 0.010
    """Between runs, the same for all metrics."""
    metric: float = 0.005
    """Between the metrics of one run."""
    drift: float = 0.20
    """How much slower the machine is after `drift_blocks` than at the start; it goes on like that."""
    drift_blocks: int = 10
    disturbance: float = 0.30
    """How much slower one run of one of the first `drift_blocks` blocks is."""
    num_arms: int = 2
    tail_degrees: int = 3
    """Of Student's t; many are a normal distribution."""


@dataclass(frozen=True, slots=True)
class Judged:
    """All trials after some number of blocks: intervals (trials, metrics) at the levels of verdicts."""

    low: Floats
    high: Floats
    part: Ordered
    num_blocks: int

    @property
    def differs(self) -> Bools:
        return (self.low > 0) | (self.high < 0)

    @property
    def is_told(self) -> Bools:
        """Whether there is a verdict: different or equivalent."""
        bound = math.log1p(DEFAULT_MARGIN)
        return self.differs | ((self.low > -bound) & (self.high < bound))


FIGURES = deciding_figures()
LEADING = [FIGURES.index(figure) for figure in leading_figures(is_open=False)]
LEVELS = [
    1 - (1 - CONFIDENCE) * error_share(figure, is_open=False, num_judged=len(FIGURES)) for figure in FIGURES
]
"""Of the interval of each figure, before the error is divided among looks."""


def log_ratios(
    num_trials: int, num_blocks: int, slowdown: float, noise: Noise, generator: np.random.Generator
) -> tuple[Floats, NDArray[np.int64]]:
    """Ratios to the first arm (trials, metrics, arms, blocks), and the place of each run (arms, blocks).

    `slowdown` 0.05: the last arm takes 1.05 times as long for everything.
    """
    num_arms = noise.num_arms
    places = np.argsort([williams_row(num_arms, block) for block in range(num_blocks)], axis=1).T

    def heavy(deviation: float, *shape: int) -> Floats:
        degrees = noise.tail_degrees
        return generator.standard_t(degrees, shape) * (deviation / math.sqrt(degrees / (degrees - 2)))

    runs = heavy(noise.block, num_trials, 1, num_blocks) + heavy(noise.run, num_trials, num_arms, num_blocks)
    nth = places + num_arms * np.arange(num_blocks)
    runs += math.log1p(noise.drift) * nth / (num_arms * noise.drift_blocks - 1)
    struck_block = generator.integers(0, min(noise.drift_blocks, num_blocks), num_trials)
    struck_arm = generator.integers(0, num_arms, num_trials)
    runs[np.arange(num_trials), struck_arm, struck_block] += math.log1p(noise.disturbance)
    runs[:, -1] += math.log1p(slowdown)
    logs = runs[:, None] + heavy(noise.metric, num_trials, len(FIGURES), num_arms, num_blocks)
    return logs - logs[:, :, :1], places


def judge(ratios: Floats, places: NDArray[np.int64], num_blocks: int, first_look: int) -> Judged:
    """As `contrasts` judges the last arm after its first `num_blocks` blocks."""
    part = without_order(ratios[..., :num_blocks], places[:, :num_blocks], 0)
    part = Ordered(part.logs[:, :, -1], part.extra_variance[:, :, -1], part.lost_degrees)
    ends = [
        _interval(part, figure, 1 - (1 - level) * error_of_look(num_blocks, first_look))
        for figure, level in enumerate(LEVELS)
    ]
    low, high = (np.stack(end, axis=1) for end in zip(*ends, strict=True))
    return Judged(low, high, part, num_blocks)


def _interval(part: Ordered, figure: int, confidence: float) -> tuple[Floats, Floats]:
    return log_interval(
        part.logs[:, figure],
        confidence,
        extra_variance=part.extra_variance[:, figure],
        lost_degrees=part.lost_degrees,
    )


@dataclass(frozen=True, slots=True)
class OneLook:
    any_differs: float
    coverage: float
    """Of the plain 95% interval of one metric: the mean over metrics."""


def look_once(num_trials: int, num_blocks: int, slowdown: float, noise: Noise, seed: int) -> OneLook:
    """Comparisons of a planned number of blocks, in which the machine drifts, looked at in the end."""
    noise = replace(noise, drift_blocks=num_blocks)
    ratios, places = log_ratios(num_trials, num_blocks, slowdown, noise, np.random.default_rng(seed))
    judged = judge(ratios, places, num_blocks, num_blocks)
    covered = _covered(judged.part, math.log1p(slowdown))
    return OneLook(float(judged.differs.any(axis=1).mean()), float(covered.mean()))


def _covered(part: Ordered, true: float) -> Bools:
    """Whether the plain 95% interval holds the truth: (trials, metrics)."""
    plain = [_interval(part, figure, CONFIDENCE) for figure in range(len(FIGURES))]
    return np.stack([(low <= true) & (true <= high) for low, high in plain], axis=1)


@dataclass(frozen=True, slots=True)
class AsAsked:
    """Shares of trials that go on as the tool asks, and are looked at after every block."""

    ever_differs: float
    """Any metric, at any look."""
    found: tuple[float, ...]
    """Of each leading figure: slower, when nothing more is asked for."""
    coverage: float
    """Of the plain 95% interval of one metric, after the last block: the mean over metrics."""
    blocks: tuple[float, float]
    """Median and 90th percentile of what was measured."""


def go_on_as_asked(
    num_trials: int, first_look: int, slowdown: float, noise: Noise, max_blocks: int, seed: int
) -> AsAsked:
    """`first_look` blocks, then as many more as the tool asks for, until it tells or has `max_blocks`."""
    ratios, places = log_ratios(num_trials, max_blocks, slowdown, noise, np.random.default_rng(seed))
    asked = np.full(num_trials, first_look)
    ever = np.zeros(num_trials, dtype=bool)
    found = np.zeros((num_trials, len(LEADING)), dtype=bool)
    covered = np.zeros((num_trials, len(FIGURES)), dtype=bool)
    still = np.arange(num_trials)
    for num_blocks in range(first_look, max_blocks + 1):
        judged = judge(ratios[still], places, num_blocks, first_look)
        ever[still] |= judged.differs.any(axis=1)
        for row, trial in enumerate(still):
            if asked[trial] == num_blocks:
                missing = [_missing(judged, row, figure, first_look) for figure in LEADING]
                asked[trial] = min(max_blocks, num_blocks + max(missing))
        done = asked[still] == num_blocks
        found[still[done]] = judged.low[done][:, LEADING] > 0
        covered[still[done]] = _covered(judged.part, math.log1p(slowdown))[done]
        still = still[~done]
        if not still.size:
            break
    blocks = float(np.median(asked)), float(np.quantile(asked, 0.9))
    return AsAsked(float(ever.mean()), tuple(map(float, found.mean(axis=0))), float(covered.mean()), blocks)


def _missing(judged: Judged, trial: int, figure: int, first_look: int) -> int:
    """What the tool asks for. Where it says that no number would do, a trial goes on to the last block."""
    if judged.is_told[trial, figure]:
        return 0
    part = judged.part
    _, error = middle_and_error(part.logs[trial, figure], part.extra_variance[trial, figure])
    missing = blocks_missing(
        float(error),
        judged.num_blocks,
        math.log1p(DEFAULT_MARGIN),
        LEVELS[figure],
        part.lost_degrees,
        first_look,
    )
    return next_blocks(missing, judged.num_blocks)


def planned_table(num_trials: int, seeds: Sequence[int]) -> str:
    lines: list[list[str]] = []
    for num_arms, drift in ((2, 0.20), (6, 0.20), (6, 0.50)):
        for num_blocks in (3, 4, 5, 10, 30):
            noise = Noise(num_arms=num_arms, drift=drift)
            quiet = replace(noise, disturbance=0.0)
            same, slower, undisturbed = (
                [look_once(num_trials, num_blocks, s, n, seed) for seed in seeds]
                for s, n in ((0.0, noise), (0.05, noise), (0.0, quiet))
            )
            shares = [
                _mean(same, lambda r: r.any_differs),
                *(_mean(results, lambda r: r.coverage) for results in (same, slower, undisturbed)),
            ]
            lines.append([str(num_arms), f"{drift:.0%}", str(num_blocks), *map(share, shares)])
    headers = ["arms", "drift", "blocks", "A/A: any metric differs", "A/A: coverage", "5% slower: coverage"]
    return render_table([*headers, "A/A, no block disturbed: coverage"], lines)


def three_table(num_trials: int, seeds: Sequence[int]) -> str:
    """What makes intervals of three blocks wider than they need be: one kind of noise after the other."""
    normal = Noise(drift=0.0, disturbance=0.0, tail_degrees=NORMAL_DEGREES)
    kinds = (
        ("normal noise", normal),
        ("heavy tails", replace(normal, tail_degrees=3)),
        ("normal noise, drift of 20%", replace(normal, drift=0.20)),
        ("normal noise, one disturbed run", replace(normal, disturbance=0.30)),
        ("all of these", Noise()),
    )
    lines: list[list[str]] = []
    for words, noise in kinds:
        each = [
            [look_once(num_trials, FEWEST_BLOCKS, 0.0, replace(noise, num_arms=num), seed) for seed in seeds]
            for num in (2, 6)
        ]
        lines.append([words, *(share(_mean(results, lambda r: r.coverage)) for results in each)])
    return render_table(["3 blocks, A/A: coverage", "2 arms", "6 arms"], lines)


def as_asked_table(num_trials: int, max_blocks: int, seeds: Sequence[int]) -> str:
    lines: list[list[str]] = []
    for first_look, num_arms in ((3, 2), (4, 2), (4, 6)):
        for run in (0.005, 0.010, 0.020):
            noise = Noise(num_arms=num_arms, run=run, metric=run / 2)
            same, slower = (
                [go_on_as_asked(num_trials, first_look, s, noise, max_blocks, seed) for seed in seeds]
                for s in (0.0, 0.05)
            )
            shares = [
                _mean(same, lambda r: r.ever_differs),
                *map(float, np.mean([r.found for r in slower], axis=0)),
                *(_mean(results, lambda r: r.coverage) for results in (same, slower)),
            ]
            blocks = [
                f"{_mean(results, lambda r: r.blocks[0]):.0f} ({_mean(results, lambda r: r.blocks[1]):.0f})"
                for results in (same, slower)
            ]
            lines.append([str(num_arms), str(first_look), f"{run:.1%}", *map(share, shares), *blocks])
    headers = ["arms", "blocks at first", "noise of a run", "A/A: any metric ever differs"]
    headers += [f"5% slower: {FIGURES[figure].label} found" for figure in LEADING]
    headers += ["A/A: coverage at the end", "5% slower: coverage at the end"]
    return render_table([*headers, "A/A: blocks (90%)", "5% slower: blocks (90%)"], lines)


def _mean(results: Sequence[Result], of: Callable[[Result], float]) -> float:
    return float(np.mean([of(result) for result in results]))


def main() -> None:
    parser = argparse.ArgumentParser(description="how often the verdicts are right, on simulated runs")
    parser.add_argument("--trials", type=int, default=2000, help="for each seed (default 2000)")
    parser.add_argument("--max-blocks", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="default 2 3 4")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this Markdown file")
    args = parser.parse_args()
    planned = planned_table(args.trials, args.seeds)
    print(planned, end="\n\n", flush=True)
    three = three_table(args.trials, args.seeds)
    print(three, end="\n\n", flush=True)
    as_asked = as_asked_table(args.trials, args.max_blocks, args.seeds)
    print(as_asked)
    if args.write:
        replace_section(args.write, "trials-planned", planned)
        replace_section(args.write, "trials-three", three)
        replace_section(args.write, "trials-as-asked", as_asked)


if __name__ == "__main__":
    main()
