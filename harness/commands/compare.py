"""`lab compare`: several arms in interleaved blocks, or result files, side by side.

Every block measures every arm once, in an order that is balanced over blocks. One service runs at a time, a
fresh one for each arm and block. All arms of a block get the same requests; each block draws its own, unless
DRAWS=same. Each run has a file of its own, and one more file holds all rows of a load.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from adapters.base import ConfigError, LabError
from harness.commands.bench import INTERRUPTED_STATUS
from harness.commands.options import (
    add_corpus_option,
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
    write_comparison,
)
from harness.comparing.compare_runs import LoadPlan, measure_blocks, plan_digest
from harness.comparing.comparison import render_comparison
from harness.comparing.intervals import FEWEST_BLOCKS
from harness.comparing.loads import (
    DEFAULT_VARIANTS,
    NO_WAIT,
    default_arms,
    fewer_arms,
    find_loads,
    load_settings,
    plan_load,
    with_defaults,
)
from harness.comparing.size import DEFAULT_BLOCKS, SizedLoad, find_size, noted, size_text
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.measure import try_out
from harness.plan.planner import plan
from harness.plan.run_size import sizes_itself
from harness.replay.progress import make_reporter
from harness.results.output_dir import make_folder
from harness.results.record import read_parquet
from harness.settings import add_setting_options, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # One variant, repeats and a running server are what `bench` is for.
    add_setting_options(parser, leave_out=frozenset({"variant", "repeats", "url"}))
    add_corpus_option(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="strategies, each with settings of its own if wanted: continuous@MAX_BATCH=8,MODEL=lab-110m "
        f"(default: {' '.join(DEFAULT_VARIANTS)}; in open loops {NO_WAIT} beside them)",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        help=f"default {DEFAULT_BLOCKS}; {FEWEST_BLOCKS} or 1 where more would take over ten minutes; 1 with "
        "QUICK=1",
    )
    parser.add_argument(
        "--pad",
        choices=("on", "off", "both"),
        help="PAD_FINISHED of the strategies that keep finished rows (default both; on with QUICK=1, for the "
        "default arms of open loops, and for all default arms where time is short)",
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
    if args.blocks is not None and args.blocks < 1:
        raise ConfigError(f"--blocks must be at least 1, not {args.blocks}")
    started_s = perf_counter()
    given = read_settings(args)
    settings = with_defaults(given).model_copy(update={"variant": None, "url": None, "repeats": 1})
    shares = find_loads(settings)
    corpus, schedule = plan(settings, allow_changed_corpus=args.allow_changed_corpus)
    folder = settings.out / "compare"
    make_folder(folder)
    with make_reporter() as reporter:
        pad = args.pad or ("on" if settings.quick else "both")
        arms = find_arms(args.variants or [*DEFAULT_VARIANTS, NO_WAIT], pad, settings, reporter)
        reference = choose_reference([str(arm.name) for arm in arms], args.baseline)
        of_loads = [
            list(arms)
            if args.variants
            else default_arms(arms, share, reference=reference, pad_was_given=args.pad is not None)
            for share in shares
        ]
        size = noted(
            folder / f"{plan_digest(arms, settings, corpus, schedule)[:12]}.size.json",
            lambda: find_size(
                settings,
                list(zip(shares, of_loads, strict=True)),
                reference,
                corpus,
                lambda arm, budgets: try_out(arm, settings, corpus, reporter, budgets),
                is_given=not sizes_itself(given.model_copy(update={"rate": None, "url": None})),
                asked_blocks=args.blocks,
                may_leave_out=not (args.variants or args.pad),
                started_s=started_s,
            ),
            resume=args.resume,
        )
        num_blocks = args.blocks or size.num_blocks
        settings = settings.model_copy(update={"capacity": size.capacity})
        plans = [
            plan_load(
                fewer_arms(own, share, size.left_out, reference),
                load_settings(share, settings).model_copy(update={"requests": num_requests}),
                num_blocks,
                folder,
                resume=args.resume,
                allow_changed_corpus=args.allow_changed_corpus,
            )
            for share, own, num_requests in zip(shares, of_loads, size.requests, strict=True)
        ]
        loads = [
            SizedLoad(of.arms, of.settings.rate, [str(arm.name) for arm in own if arm not in of.arms])
            for of, own in zip(plans, of_loads, strict=True)
        ]
        for line in size_text(size, loads, reference, settings, num_blocks):
            reporter.say(line)
        if num_kept := sum(len(of.ledger) for of in plans):
            reporter.announce(f"{num_kept} runs of this plan are there already")
        for of in plans:
            if of.ledger.num_damaged:
                print(
                    f"{of.ledger.num_damaged} damaged lines of {of.ledger.path} passed over", file=sys.stderr
                )
        with _told_to_resume(plans):
            measured = measure_blocks(plans, reporter)
    is_invalid = False
    for of, measurements in zip(plans, measured, strict=True):
        if not measurements:
            continue
        with _told_to_resume(plans):
            names = [str(arm.name) for arm in of.arms]
            path, manifest = write_comparison(folder, measurements, names, reference, len(of.schedules))
        print(render_comparison(read_parquet(path)[1], manifest, args.margin, objective))
        print(f"rows: {path}\n")
        is_invalid |= manifest.validity.level == "INVALID"
    if any(measurement.was_interrupted for of_load in measured for measurement in of_load):
        print("--resume goes on where this stopped")
        return INTERRUPTED_STATUS
    return 1 if is_invalid else 0


@contextmanager
def _told_to_resume(plans: Sequence[LoadPlan]) -> Iterator[None]:
    try:
        yield
    except LabError as error:
        num_kept = sum(len(of.ledger) for of in plans)
        if not num_kept:
            raise
        kept = f"{num_kept} runs have files of their own, and --resume goes on after them"
        raise LabError(f"{error}; {kept}") from error
