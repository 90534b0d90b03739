"""`lab gate`: does a new result regress against an old one? For CI: the exit status says so.

Only runs that were measured in turns (--against-commit, or --against-arm of one comparison) can pass or fail:
between two sessions a machine changes its speed by more than a regression. 0 no regression, 1 a regression,
2 runs that do not count, 3 where the blocks cannot tell, 4 inconclusive because not measured in turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.base import ConfigError
from adapters.text.unicode_text import printable
from harness.commands.bench import INTERRUPTED_STATUS
from harness.commands.gate_commit import CommitRuns, measure_against
from harness.commands.options import add_corpus_option, parse_share
from harness.comparing.combine import Comparison, compare_files
from harness.comparing.contrasts import Contrast, Design, contrasts, design_of, leading_figures
from harness.comparing.intervals import FEWEST_BLOCKS, MAX_MORE_BLOCKS
from harness.results.manifest import RunManifest
from harness.results.metrics import METRICS, Figure
from harness.results.table import MISSING, render_table
from harness.settings import OF_COMPARE, add_setting_options

Result = Literal["pass", "REGRESSION", "can't tell"]
CANNOT_TELL_STATUS = 3
NOT_IN_TURNS_STATUS = 4


@dataclass(frozen=True, slots=True)
class Gated:
    contrast: Contrast
    result: Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the new result file")
    against = parser.add_mutually_exclusive_group(required=True)
    against.add_argument("--against", type=Path, metavar="FILE", help="the old one")
    against.add_argument(
        "--against-arm", metavar="NAME", help="the old arm within FILE, a comparison measured in turns"
    )
    against.add_argument(
        "--against-commit",
        metavar="REV",
        help="no FILE: measure services of this commit and of this tree in turns now",
    )
    parser.add_argument(
        "--allow-sessions",
        action="store_true",
        help="with --against: judge although the two files were measured in different sessions",
    )
    parser.add_argument(
        "--max-regression", type=parse_share, default=0.05, metavar="SHARE", help="still passes (default 5%%)"
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="hold these alone, as output-tok/s TPOT-p95"
    )
    parser.add_argument("--allow-invalid", action="store_true", help="judge files that are INVALID as well")
    parser.add_argument(
        "--strict", action="store_true", help=f"exit {CANNOT_TELL_STATUS} where blocks can't tell any metric"
    )
    measuring = parser.add_argument_group("with --against-commit")
    measuring.add_argument(
        "--variants",
        nargs="+",
        default=["continuous"],
        metavar="NAME",
        help="strategies (default continuous)",
    )
    measuring.add_argument(
        "--blocks", type=int, default=FEWEST_BLOCKS, metavar="N", help=f"default {FEWEST_BLOCKS}"
    )
    measuring.add_argument(
        "--measure-on",
        type=float,
        default=0.0,
        metavar="S",
        help="while the blocks cannot tell, measure more, for at most so many seconds in all",
    )
    add_corpus_option(parser)
    add_setting_options(parser, leave_out=(OF_COMPARE - {"draws"}) | {"variant", "repeats", "url"})


def run(args: argparse.Namespace) -> int:
    """Print what was found and return the exit status.

    Raises:
        LabError: the files cannot be read or held against each other.
    """
    figures = [figure_called(name) for name in args.metrics] if args.metrics else None
    if args.against_commit:
        return _gate_commit(args, figures)
    if args.file is None:
        raise ConfigError("name the FILE to judge; --against-commit alone measures for itself")
    made = _read(args.against, args.against_arm, args.file, allow_invalid=args.allow_invalid)
    pairs = _pairs_of(made, args.against, args.against_arm)
    gated = gate(made, pairs, args.max_regression, figures=figures, in_turns=args.against is None)
    _print_found(made, gated)
    if args.against and not args.allow_sessions:
        print(
            "inconclusive: the two files were not measured in turns, and what the machine did in between is "
            "in the ratios. Measure both in one `lab compare` and give --against-arm, or accept that with "
            "--allow-sessions."
        )
        return NOT_IN_TURNS_STATUS
    results = {g.result for g in gated}
    if "REGRESSION" in results:
        return 1
    if "can't tell" in results:
        print(_what_is_missing([g.contrast for g in gated if g.result == "can't tell"]))
        return CANNOT_TELL_STATUS if args.strict else 0
    return 0


def _gate_commit(args: argparse.Namespace, figures: list[Figure] | None) -> int:
    """0 says that the leading metrics (all with --strict, those of --metrics) are surely within the limit."""

    def held(runs: CommitRuns) -> list[Gated]:
        return gate(runs.made, runs.pairs, args.max_regression, figures=figures)

    def undecided(gated: Sequence[Gated], runs: CommitRuns) -> list[Contrast]:
        leading = leading_figures(runs.is_open)
        needed = [g for g in gated if figures or args.strict or g.contrast.figure in leading]
        return [g.contrast for g in needed if g.result == "can't tell"]

    def goes_on(runs: CommitRuns) -> bool:
        # Out of reach is said of the limit; a difference larger than that may be told all the same.
        gated = held(runs)
        return bool(undecided(gated, runs)) and all(g.result != "REGRESSION" for g in gated)

    runs = measure_against(args, goes_on)
    if runs.was_interrupted:
        print(f"interrupted; rows: {runs.path}")
        return INTERRUPTED_STATUS
    gated = held(runs)
    print(runs.heading)
    _print_found(runs.made, gated)
    print(f"rows: {runs.path}")
    if (invalid := runs.made.manifest.validity.invalid) and not args.allow_invalid:
        raise ConfigError(f"the runs are INVALID ({invalid[0]}); --allow-invalid judges them anyway")
    if any(g.result == "REGRESSION" for g in gated):
        return 1
    if missing := undecided(gated, runs):
        print(_what_is_missing(missing))
        return CANNOT_TELL_STATUS
    return 0


def _print_found(made: Comparison, gated: list[Gated]) -> None:
    print(_table(gated))
    print("TTFT and total are from schedule.")
    print("\n".join(printable(f"caution: {reason}") for reason in made.manifest.validity.caution))


def _read(old: Path | None, old_arm: str | None, new: Path, *, allow_invalid: bool) -> Comparison:
    """Both files, or the one that holds both arms.

    Raises:
        ConfigError: there is nothing that can be held against each other.
    """
    if old is None:
        return compare_files([new], asked_reference=old_arm, allow_invalid=allow_invalid)
    if os.path.realpath(old) == os.path.realpath(new):  # `resolve` raises where links go in a circle
        raise ConfigError(f"{new} cannot be held against itself")
    made = compare_files([old, new], allow_invalid=allow_invalid)
    invalid = made.manifest.validity.invalid
    if any("cannot be compared" in reason for reason in invalid):
        raise ConfigError(f"{new} cannot be held against {old}: {invalid[0]}")
    return made


def _what_is_missing(contrasts: Sequence[Contrast]) -> str:
    missing = [c.verdict.num_missing if c.verdict else FEWEST_BLOCKS for c in contrasts]
    within = [number for number in missing if number <= MAX_MORE_BLOCKS]
    bounds = [
        f"{c.figure.label} below {c.verdict.bound_text()}"
        for c in contrasts
        if c.verdict and c.verdict.is_out_of_reach
    ]
    # A difference that is sure may still lie on both sides of the limit: then no number is known.
    told = [f"measure {max(1, *within)} more blocks (--blocks, REPEATS=)"] if within else []
    if bounds:
        told.append(f"no {MAX_MORE_BLOCKS} blocks would tell of {', '.join(bounds)} (differences, if any)")
    return "some metrics cannot be told: " + "; ".join(told)


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


def _pairs_of(made: Comparison, old: Path | None, old_arm: str | None) -> list[tuple[str, str]]:
    """Every arm that both files have (or the only one of each), or every arm but `old_arm`.

    Raises:
        ConfigError: the files share no arm.
    """
    if old:
        return _pairs(made.manifest.runs, old)
    return [(old_arm or made.manifest.reference, arm) for arm in made.manifest.arms if arm != old_arm]


def gate(
    made: Comparison,
    pairs: Sequence[tuple[str, str]],
    limit: float,
    *,
    figures: Sequence[Figure] | None = None,
    in_turns: bool = True,
) -> list[Gated]:
    """Each (old arm, new arm) with all deciding figures, or with `figures`."""
    runs = made.manifest.runs
    is_open = runs[0].schedule.load.is_open
    # Blocks of runs that were not made in turns have no places.
    design = design_of(runs) if in_turns else Design()
    # Few runs are long enough for a p99: it is held where it can be, or where it was asked for.
    return [
        Gated(contrast, judge_regression(contrast, limit))
        for before, after in pairs
        for contrast in contrasts(
            made.rows,
            [before, after],
            before,
            is_open=is_open,
            margin=limit,
            figures=figures,
            design=design,
        )
        if contrast.verdict or contrast.figure.q != 99 or figures
    ]


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
