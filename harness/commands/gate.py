"""`lab gate`: does a new result file regress against an old one? For CI: the exit status says so.

Both files need several repeats or blocks. 0 passed, 1 a regression, 2 files that do not count, 3 with
--strict where the blocks cannot tell.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.base import ConfigError
from harness.commands.options import parse_share
from harness.comparing.combine import compare_files
from harness.comparing.contrasts import Contrast, contrasts
from harness.comparing.verdict import FEWEST_BLOCKS
from harness.results.manifest import RunManifest
from harness.results.metrics import METRICS, Figure
from harness.results.table import MISSING, render_table

Result = Literal["pass", "REGRESSION", "can't tell"]
INCONCLUSIVE_STATUS = 3


@dataclass(frozen=True, slots=True)
class Gated:
    contrast: Contrast
    result: Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the new result file")
    parser.add_argument("--against", type=Path, required=True, metavar="FILE", help="the old one")
    parser.add_argument(
        "--max-regression", type=parse_share, default=0.05, metavar="SHARE", help="still passes (default 5%%)"
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="hold these alone, as output-tok/s TPOT-p95"
    )
    parser.add_argument("--allow-invalid", action="store_true", help="judge files that are INVALID as well")
    parser.add_argument(
        "--strict", action="store_true", help=f"exit {INCONCLUSIVE_STATUS} where blocks can't tell"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found and return the exit status.

    Raises:
        LabError: the files cannot be read or held against each other.
    """
    figures = [figure_called(name) for name in args.metrics] if args.metrics else None
    gated, reasons = gate(
        args.against, args.file, args.max_regression, allow_invalid=args.allow_invalid, figures=figures
    )
    print(_table(gated))
    print("TTFT, total and time per request are from schedule.")
    print("\n".join(reasons))
    results = {g.result for g in gated}
    if "REGRESSION" in results:
        return 1
    if "can't tell" in results:
        told = [g.contrast.verdict.num_missing for g in gated if g.contrast.verdict]
        missing = max(told, default=FEWEST_BLOCKS)
        print(f"some metrics cannot be told: measure {missing} more blocks in both (REPEATS=)")
        return INCONCLUSIVE_STATUS if args.strict else 0
    return 0


def figure_called(name: str) -> Figure:
    """Any figure of the table of metrics, as `TPOT-p95` or `tpot_p95_ms`.

    Raises:
        ConfigError: there is none of this name.
    """
    figures = [figure for metric in METRICS for figure in metric.figures]
    wanted = name.replace("-", " ").lower()
    for figure in figures:
        if wanted in (figure.label.lower(), figure.key):
            return figure
    raise ConfigError(f"no metric is called {name}; there are {', '.join(f.key for f in figures)}")


def gate(
    old: Path, new: Path, limit: float, *, allow_invalid: bool, figures: Sequence[Figure] | None = None
) -> tuple[list[Gated], list[str]]:
    """Every arm that both files have (or the only one of each), with all deciding figures, or with `figures`.

    Raises:
        ConfigError: the files replayed different schedules or share no arm.
    """
    if old.resolve() == new.resolve():
        raise ConfigError(f"{new} cannot be held against itself")
    made = compare_files([old, new], allow_invalid=allow_invalid)
    validity = made.manifest.validity
    if any("cannot be compared" in reason for reason in validity.invalid):
        raise ConfigError(f"{new} cannot be held against {old}: {validity.invalid[0]}")
    is_open = made.manifest.runs[0].schedule.load.is_open
    found = [
        Gated(contrast, judge_regression(contrast, limit))
        for before, after in _pairs(made.manifest.runs, old)
        for contrast in contrasts(
            made.rows, [before, after], before, is_open=is_open, margin=limit, figures=figures
        )
    ]
    return found, [f"caution: {reason}" for reason in validity.caution]


def judge_regression(contrast: Contrast, limit: float) -> Result:
    """A regression is sure (the interval excludes 1) and larger than the limit; a pass is sure as well."""
    verdict = contrast.verdict
    if verdict is None or verdict.interval is None:
        return "can't tell"
    low, high = verdict.interval
    if not contrast.figure.metric.higher_is_better:
        low, high = 1 / high, 1 / low
    ratio = verdict.ratio if contrast.figure.metric.higher_is_better else 1 / verdict.ratio
    worst = 1 / (1 + limit)
    if high < 1 and ratio < worst:
        return "REGRESSION"
    return "pass" if low >= worst else "can't tell"


def _pairs(runs: Sequence[RunManifest], old: Path) -> list[tuple[str, str]]:
    """(arm of the old file, arm of the new one): of the same name, or the only ones there are."""
    before = {run.own_arm: run.arm for run in runs if run.file == str(old)}
    after = {run.own_arm: run.arm for run in runs if run.file != str(old)}
    if len(before) == len(after) == 1:
        return list(zip(before.values(), after.values(), strict=True))
    common = [name for name in before if name in after]
    if not common:
        raise ConfigError(f"the files share no arm: {', '.join(before)} and {', '.join(after)}")
    return [(before[name], after[name]) for name in common]


def _table(gated: list[Gated]) -> str:
    lines = [
        [
            g.contrast.arm,
            g.contrast.figure.label,
            g.contrast.text() if g.contrast.verdict else MISSING,
            g.result,
        ]
        for g in gated
    ]
    return render_table(["arm", "metric", "new / old", "result"], lines)
