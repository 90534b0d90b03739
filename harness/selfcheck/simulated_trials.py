"""How often verdicts are right on simulated runs of a known slowdown.

`python -m harness.selfcheck.simulated_trials` prints a table. Every trial does what a user does: three
blocks, then, if the deciding metric cannot tell, as many more as the tool asks for. Noise has four layers:
the machine drifts from block to block (for both arms), every start of a service differs a little, some runs
are disturbed by neighbours, and requests scatter within a run.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.comparing.contrasts import error_share
from harness.comparing.verdict import FEWEST_BLOCKS, Verdict, judge_ratio
from harness.results.metrics import OUTPUT_TOKENS, Figure, deciding_figures
from harness.results.table import render_table, share

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviations of logarithms. `disturbed`: share of runs slowed by an exponential of this mean."""

    block: float = 0.05
    run: float = 0.010
    disturbed: float = 0.05
    disturbance: float = 0.03
    request: float = 0.05
    num_requests: int = 64
    max_blocks: int = 120


@dataclass(frozen=True, slots=True)
class Trial:
    """The verdicts on all deciding figures in the end, and whether any look ever said "different"."""

    verdicts: tuple[Verdict, ...]
    asked_blocks: int
    ever_different: bool

    @property
    def decision(self) -> Verdict:
        return self.verdicts[deciding_figures().index(Figure(OUTPUT_TOKENS))]


def one_trial(slowdown: float, noise: Noise, generator: np.random.Generator) -> Trial:
    """`slowdown` 0.05: the second arm takes 1.05 times as long for everything."""
    work = np.exp(generator.normal(0.0, 0.5, noise.num_requests))
    logs: list[list[float]] = [[] for _ in deciding_figures()]
    ever = False
    target = FEWEST_BLOCKS
    while True:
        while len(logs[0]) < target:
            drift = generator.normal(0.0, noise.block)
            runs = [_run(work, drift + extra, noise, generator) for extra in (0.0, math.log1p(slowdown))]
            for metric, (theirs, ours) in enumerate(zip(*runs, strict=True)):
                logs[metric].append(ours - theirs)
        found = tuple(
            judge_ratio(
                each,
                higher_is_better=figure.metric.higher_is_better,
                error_share=error_share(figure, is_open=False, num_judged=len(logs)),
            )
            for figure, each in zip(deciding_figures(), logs, strict=True)
        )
        ever = ever or any(verdict.word in ("better", "worse") for verdict in found)
        trial = Trial(found, target, ever)
        if target > FEWEST_BLOCKS or trial.decision.word != "can't tell":
            return trial
        target = min(noise.max_blocks, target + trial.decision.num_missing)


def _run(work: Floats, shift: float, noise: Noise, generator: np.random.Generator) -> list[float]:
    """Logarithms of the deciding figures of one run (of `time per request`: the mean of logarithms)."""
    shift += generator.normal(0.0, noise.run)
    if generator.random() < noise.disturbed:
        shift += generator.exponential(noise.disturbance)
    total = work * np.exp(shift + generator.normal(0.0, noise.request, len(work)))
    ttft = 0.3 * work * np.exp(shift + generator.normal(0.0, noise.request, len(work)))
    return [
        -math.log(total.sum()),
        float(np.log(total).mean()),
        *(math.log(float(np.percentile(values, q))) for values, q in ((ttft, 50), (ttft, 95), (total, 95))),
    ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares of trials."""

    decided_different: float
    any_metric_different: float
    ever_different: float
    equivalent: float
    median_blocks: float


def many_trials(num_trials: int, slowdown: float, noise: Noise, seed: int = 1) -> Outcome:
    generator = np.random.default_rng(seed)
    trials = [one_trial(slowdown, noise, generator) for _ in range(num_trials)]
    different = ("better", "worse") if slowdown == 0 else ("worse",)
    return Outcome(
        float(np.mean([t.decision.word in different for t in trials])),
        float(np.mean([any(j.word in different for j in t.verdicts) for t in trials])),
        float(np.mean([t.ever_different for t in trials])),
        float(np.mean([t.decision.word == "equivalent" for t in trials])),
        float(np.median([t.asked_blocks for t in trials])),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="how often the verdicts are right, on simulated runs")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    lines: list[list[str]] = []
    for run in (0.005, 0.010, 0.020):
        for slowdown in (0.0, 0.05):
            noise = Noise(run=run)
            result = many_trials(args.trials, slowdown, noise, args.seed)
            shares = (result.decided_different, result.any_metric_different, result.ever_different)
            lines.append(
                [
                    f"{run:.1%}",
                    f"{slowdown:.0%}",
                    *map(share, shares),
                    share(result.equivalent),
                    f"{result.median_blocks:g}",
                ]
            )
    headers = [
        "noise of a run",
        "slowdown",
        "tok/s differs",
        "any metric differs",
        "at any look",
        "equivalent",
    ]
    print(render_table([*headers, "blocks"], lines))


if __name__ == "__main__":
    main()
