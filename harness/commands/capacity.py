"""`lab capacity`: of every arm, the highest rate at which the limits hold, with an interval over blocks.

Every probe is a run of its own, against a fresh service, with a file of its own. The rates that were tried
and what came of them stand in one more file, `results/capacity/<time>.parquet`, and beside it as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from adapters.base import ConfigError
from harness.commands.bench import INTERRUPTED_STATUS
from harness.commands.options import add_corpus_option, add_slo_option, parse_share
from harness.comparing.arms import find_arms
from harness.comparing.capacity import Capacities, find_capacities, is_saturated
from harness.comparing.combine import choose_reference
from harness.measure import measure
from harness.plan.planner import plan
from harness.plan.schedule import Arrivals
from harness.replay.arm_file import Arm
from harness.replay.progress import Reporter, make_reporter
from harness.results.output_dir import free_path, make_folder, utc_stamp, whole_file
from harness.results.slo import Slo
from harness.results.table_file import write_table
from harness.settings import OF_COMPARE, HarnessSettings, add_setting_options, read_settings

DEFAULT_BLOCKS = 3
DEFAULT_REQUESTS = 300
"""A run has to be long against the limit: a queue that grows for a moment only stays within it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    left_out = {"variant", "concurrency", "rate", "repeats", "trace", "time_scale"}
    add_setting_options(parser, leave_out=OF_COMPARE.union(left_out))
    add_corpus_option(parser)
    add_slo_option(parser)
    parser.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="arms, as `lab compare`")
    parser.add_argument("--pad", choices=("on", "off", "both"), default="on", help="as `lab compare`")
    parser.add_argument("--baseline", metavar="NAME", help="arm that ratios refer to")
    parser.add_argument(
        "--blocks", type=int, default=DEFAULT_BLOCKS, metavar="N", help=f"default {DEFAULT_BLOCKS}"
    )
    parser.add_argument(
        "--from-rate", type=float, default=1.0, metavar="R", help="where the first search starts (default 1)"
    )
    parser.add_argument(
        "--closest",
        type=parse_share,
        default=0.03,
        metavar="SHARE",
        help="a search stops when two rates are this close, of which one meets the limits (default 3%%)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return the exit status.

    Raises:
        LabError: nothing could be measured.
    """
    slo = Slo(tuple(args.slo))
    if not slo:
        raise ConfigError("a capacity needs limits: --slo ttft_p95_ms=500,tpot_p95_ms=50")
    if args.blocks < 1 or args.from_rate <= 0:
        raise ConfigError("--blocks must be at least 1 and --from-rate above 0")
    settings = read_settings(args)
    if settings.trace is not None:
        raise ConfigError(f"TRACE is {settings.trace}, but the search sets the load itself: unset it")
    if bool(settings.url) == bool(args.variants):
        raise ConfigError("name the arms (--variants continuous dynamic), or one server (--url)")
    chosen: dict[str, Any] = {"repeats": 1, "variant": None}
    if settings.arrivals is None:
        chosen["arrivals"] = Arrivals.POISSON
    if "requests" not in settings.model_fields_set:
        chosen["requests"] = DEFAULT_REQUESTS
    settings = settings.model_copy(update=chosen)
    folder = settings.out / "capacity"
    make_folder(folder)
    tried: list[dict[str, object]] = []
    with make_reporter() as reporter:
        arms = [Arm(None, "server")]
        if not settings.url:
            arms = find_arms(args.variants, args.pad, settings, reporter)

        def holds_at(arm: Arm, block: int) -> Callable[[float], bool]:
            return lambda rate: _probe(
                arm, block, rate, settings, slo, args.allow_changed_corpus, reporter, tried
            )

        reference = choose_reference([str(arm.name) for arm in arms], args.baseline)
        of_block: dict[str, list[float | None]] = {}
        was_interrupted = False
        try:
            find_capacities(
                arms, args.blocks, args.from_rate, args.closest, settings.seed, holds_at, of_block
            )
        except KeyboardInterrupt:
            was_interrupted = True
    if was_interrupted:
        print(f"interrupted after {len(tried)} runs")
        if not tried:
            return INTERRUPTED_STATUS
    found = Capacities(of_block, reference, slo.text(), args.closest, was_interrupted)
    path = write_capacities(folder, found, tried)
    print(found.text())
    print(f"{len(tried)} runs; the rates tried: {path} and {path.with_suffix('.json')}")
    return INTERRUPTED_STATUS if was_interrupted else 0


def _probe(
    arm: Arm,
    block: int,
    rate: float,
    settings: HarnessSettings,
    slo: Slo,
    allow_changed: bool,
    reporter: Reporter,
    tried: list[dict[str, object]],
) -> bool:
    """Whether the limits hold; not where the server was saturated or the run does not count."""
    at_rate = settings.model_copy(update={"rate": rate})
    corpus, schedule = plan(at_rate, allow_changed_corpus=allow_changed, draw=block)
    reporter.announce(f"block {block + 1}: {arm.name} at {rate:.3g} requests/s")
    measured = measure(arm, at_rate, corpus, schedule, reporter, [block])
    if measured.was_interrupted:
        raise KeyboardInterrupt
    saturated = is_saturated(measured.rows)
    met = measured.validity.level != "INVALID" and not saturated and slo.are_met(measured.rows, is_open=True)
    entry = {"arm": str(arm.name), "block": block, "rate": rate, "met": met, "saturated": saturated}
    tried.append({**entry, "validity": measured.validity.level, "path": str(measured.path)})
    return met


def write_capacities(folder: Path, found: Capacities, tried: Sequence[dict[str, object]]) -> Path:
    """Parquet with one row a run and the result in its metadata, and JSON with the result alone."""
    path = free_path(folder, utc_stamp())
    facts = json.dumps(found.facts(), indent=2)
    write_table(path, pa.Table.from_pylist(list(tried)), b"lab.capacity", facts.encode())
    with whole_file(path.with_suffix(".json")) as file:
        file.write(f"{facts}\n".encode())
    return path
