"""How many blocks a nightly needs, on made-up ratios: the table of docs/nightly.md.

Each night looks after every block from the third on, as `lab gate --measure-on` does, and is over with its
first verdict. One leading figure is judged, whose share of the allowed error is a quarter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from harness.commands.gate import Result, judge_regression
from harness.comparing.contrasts import Contrast, error_share
from harness.comparing.intervals import FEWEST_BLOCKS, without_order
from harness.comparing.verdict import judge_ratio
from harness.results.metrics import OUTPUT_TOKENS, Figure, deciding_figures
from harness.results.table import MISSING, render_table, share

NOISES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08)
FIGURE = Figure(OUTPUT_TOKENS)


def night(logs: np.ndarray[tuple[int], np.dtype[np.float64]], limit: float) -> tuple[Result, int]:
    """The verdict on logarithms of ratios, one a block, and after how many blocks it was reached."""
    own_share = error_share(FIGURE, is_open=False, num_judged=len(deciding_figures()))
    for num in range(FEWEST_BLOCKS, len(logs) + 1):
        places = np.array([np.arange(num) % 2, (np.arange(num) + 1) % 2])
        ordered = without_order(np.stack([np.zeros(num), logs[:num]]), places, 0)
        verdict = judge_ratio(
            ordered.logs[1].tolist(),
            higher_is_better=True,
            error_share=own_share,
            margin=limit,
            extra_variance=float(ordered.extra_variance[1]),
            lost_degrees=ordered.lost_degrees,
        )
        result = judge_regression(Contrast("new", "old", FIGURE, verdict, ()), limit)
        if result != "can't tell":
            return result, num
    return "can't tell", len(logs)


def trials_text(num_nights: int, num_blocks: int, slowdown: float, limit: float) -> str:
    lines = []
    for noise in NOISES:
        generator = np.random.default_rng(0)
        drawn = noise * generator.normal(size=(num_nights, num_blocks))
        cells = [f"{noise:.1%}"]
        for is_slower, wanted, wrong in ((False, "pass", "REGRESSION"), (True, "REGRESSION", "pass")):
            shift = -np.log1p(slowdown) if is_slower else 0.0
            ended = [night(one + shift, limit) for one in drawn]
            right = [num for word, num in ended if word == wanted]
            needed = f"{np.median(right):.0f}, {np.quantile(right, 0.9):.0f}" if right else MISSING
            cells += [share(len(right) / num_nights), needed]
            cells.append(share(sum(word == wrong for word, _ in ended) / num_nights))
        lines.append(cells)
    slower = f"{slowdown:.0%} slower"
    headers = ["noise of a block's ratio", "same commit: pass", "blocks p50, p90", "red"]
    headers += [f"{slower}: red", "blocks p50, p90", "pass"]
    what = f"{num_nights} nights a line, at most {num_blocks} blocks, limit {limit:.0%}"
    return f"{what}\n{render_table(headers, lines)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.nightly.trials", description=__doc__)
    parser.add_argument("--nights", type=int, default=200, metavar="N")
    parser.add_argument("--blocks", type=int, default=30, metavar="N", help="that the budget allows")
    args = parser.parse_args(argv)
    print(trials_text(args.nights, args.blocks, slowdown=0.2, limit=0.05))
    return 0


if __name__ == "__main__":
    sys.exit(main())
