"""Options that several commands share, and how people write their values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adapters.base import ConfigError
from harness.comparing.trade import OBJECTIVES, objective_figure
from harness.results.metrics import Figure
from harness.results.slo import Slo, parse_limits
from harness.results.steps import STEPS_SUFFIX


def add_corpus_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-changed-corpus",
        action="store_true",
        help="replay a corpus whose digest is not the recorded one; such a run does not count",
    )


def add_slo_option(parser: argparse.ArgumentParser) -> None:
    """`args.slo` is the list of all limits given, for `Slo(tuple(args.slo))`."""
    parser.add_argument(
        "--slo",
        type=parse_limits,
        action="extend",
        default=[],
        metavar="LIMITS",
        help="limits, as ttft_ms=500,tpot_ms=50 on each request (goodput) and ttft_p95_ms=500 on the run",
    )


def add_objective_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="what decides which arm is best; by default none is that is surely worse in something "
        "(goodput needs --slo)",
    )


def chosen_objective(args: argparse.Namespace) -> Figure | None:
    """
    Raises:
        ConfigError: goodput without limits, or limits without it.
    """
    if args.slo and args.objective != "goodput":
        raise ConfigError("--slo says which answers count as good: give --objective goodput with it")
    return objective_figure(args.objective, Slo(tuple(args.slo))) if args.objective else None


def parse_share(text: str) -> float:
    """Read `5%` or `0.05`.

    Raises:
        argparse.ArgumentTypeError: it is no number, or not between 0 and 1.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 5% or 0.05")
    return value


def without_steps(paths: Sequence[Path]) -> list[Path]:
    """The files but for step logs, which `results/*/*.parquet` finds beside the rows.

    Raises:
        ConfigError: there are only step logs.
    """
    steps = [path for path in paths if path.name.endswith(STEPS_SUFFIX)]
    if len(steps) == len(paths):
        raise ConfigError(
            f"{steps[0]} holds the steps of a run, not its requests: name the file without .steps"
        )
    if steps:
        more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
        print(f"passed over: {steps[0]}{more}, which holds steps, not requests", file=sys.stderr)
    return [path for path in paths if path not in steps]
