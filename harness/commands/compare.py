"""`lab compare`: several arms in interleaved blocks, or result files, side by side.

Every block measures every arm once, in an order that is balanced over blocks, one fresh service at a time.
All arms of a block get the same requests; each block draws its own, unless DRAWS=same. Each run has a file
of its own, and one more file holds all rows of a load.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.base import ConfigError, LabError
from harness.commands.bench import INTERRUPTED_STATUS, add_corpus_option
from harness.commands.options import (
    add_objective_option,
    add_slo_option,
    chosen_objective,
    parse_share,
    without_steps,
)
from harness.comparing.arms import find_arms
from harness.comparing.combine import (
    choose_reference,
    compare_files,
    comparison_manifest,
    validity_of,
    write_comparison,
)
from harness.comparing.compare_runs import Ledger, LoadPlan, measure_blocks, plan_digest
from harness.comparing.comparison import render_comparison
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.plan.planner import plan
from harness.replay.progress import make_reporter
from harness.results.output_dir import make_folder
from harness.results.record import read_parquet
from harness.settings import add_setting_options, read_settings

DEFAULT_VARIANTS = ("baseline", "static", "dynamic", "continuous")
DEFAULT_BLOCKS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # One variant, repeats and a running server are what `bench` is for.
    add_setting_options(parser, leave_out=frozenset({"variant", "repeats", "url"}))
    add_corpus_option(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(DEFAULT_VARIANTS),
        metavar="NAME",
        help="strategies, each with settings of its own if wanted: continuous@MAX_BATCH=8,MODEL=lab-110m "
        f"(default: {' '.join(DEFAULT_VARIANTS)})",
    )
    parser.add_argument(
        "--blocks", type=int, default=DEFAULT_BLOCKS, metavar="N", help=f"default {DEFAULT_BLOCKS}"
    )
    parser.add_argument(
        "--pad",
        choices=("on", "off", "both"),
        default="both",
        help="PAD_FINISHED of the strategies that keep finished rows (default both)",
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="arm that ratios refer to (default baseline, else the first)"
    )
    parser.add_argument("--files", nargs="+", type=Path, metavar="FILE", help="compare result files instead")
    parser.add_argument("--allow-invalid", action="store_true", help="with --files: INVALID ones as well")
    parser.add_argument("--resume", action="store_true", help="keep the runs that this same plan has made")
    parser.add_argument(
        "--margin",
        type=parse_share,
        default=DEFAULT_MARGIN,
        metavar="SHARE",
        help=f"differences below this count as none (default {DEFAULT_MARGIN:.0%}%)",
    )
    add_objective_option(parser)
    add_slo_option(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print, and return the exit status.

    Raises:
        LabError: nothing could be measured; the message says why.
    """
    objective = chosen_objective(args)
    if args.files:
        files = without_steps(args.files)
        made = compare_files(files, asked_reference=args.baseline, allow_invalid=args.allow_invalid)
        print(render_comparison(made.rows, made.manifest, args.margin, objective))
        return 1 if made.manifest.validity.level == "INVALID" else 0
    if args.blocks < 1:
        raise ConfigError(f"--blocks must be at least 1, not {args.blocks}")
    settings = read_settings(args).model_copy(update={"variant": None, "url": None, "repeats": 1})
    planned = [
        plan(
            settings,
            allow_changed_corpus=args.allow_changed_corpus,
            draw=block if settings.draws == "new" else None,
        )
        for block in range(args.blocks)
    ]
    corpus, schedules = planned[0][0], [schedule for _, schedule in planned]
    folder = settings.out / "compare"
    make_folder(folder)
    with make_reporter() as reporter:
        arms = find_arms(args.variants, args.pad, settings, reporter)
        reference = choose_reference([str(arm.name) for arm in arms], args.baseline)
        ledger = Ledger(folder, plan_digest(arms, settings, corpus, schedules[0]), resume=args.resume)
        if len(ledger):
            reporter.announce(f"{len(ledger)} runs of this plan are there already")
        if ledger.num_damaged:
            print(f"{ledger.num_damaged} damaged lines of {ledger.path} passed over", file=sys.stderr)
        with _told_to_resume(ledger):
            (measurements,) = measure_blocks([LoadPlan(arms, settings, corpus, schedules, ledger)], reporter)
    for measurement in measurements:
        measurement.manifest.path = str(measurement.path)
    runs = [measurement.manifest for measurement in measurements]
    measured = {run.arm for run in runs}
    manifest = comparison_manifest(
        runs,
        [str(arm.name) for arm in arms if arm.name in measured],
        reference,
        args.blocks,
        validity_of(runs, len(arms) * args.blocks),
    )
    with _told_to_resume(ledger):
        path = write_comparison(folder, measurements, manifest)
    print(render_comparison(read_parquet(path)[1], manifest, args.margin, objective))
    print(f"rows: {path}")
    if any(measurement.was_interrupted for measurement in measurements):
        print("--resume goes on where this stopped")
        return INTERRUPTED_STATUS
    return 1 if manifest.validity.level == "INVALID" else 0


@contextmanager
def _told_to_resume(ledger: Ledger) -> Iterator[None]:
    try:
        yield
    except LabError as error:
        if not len(ledger):
            raise
        kept = f"{len(ledger)} runs have files of their own, and --resume goes on after them"
        raise LabError(f"{error}; {kept}") from error
