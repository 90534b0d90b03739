"""`lab simulate`: a fleet on a virtual clock, with the lab's own engine, strategies and load.

Figures are predictions from a calibration and say so wherever they stand. Exit status: 0, or 2 when nothing
could be simulated; with `--verify` 1 when a figure of a run is further off than is allowed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import process_time
from typing import Any

import pandas as pd

from harness.commands.fleet_options import (
    OF_REAL_RUNS,
    add_fleet_options,
    fleet_options,
    print_origin,
    read_source,
)
from harness.commands.options import add_corpus_option, add_slo_option, without_steps
from harness.comparing.arms import parse_arm, split_names
from harness.plan.load import load_words
from harness.plan.planner import plan
from harness.results.formulas import Throughput, throughput
from harness.results.manifest import StepSummary
from harness.results.metrics import OUTPUT_TOKENS, REQUESTS, TPOT, TTFT, Figure
from harness.results.slo import Slo, goodput
from harness.results.table import render_table, share
from harness.settings import HarnessSettings, add_setting_options, read_settings
from harness.simulator.brief import BriefRows, long_plan, refuse_limits
from harness.simulator.calibration import Calibration, write_calibration
from harness.simulator.fleet import Fleet
from harness.simulator.output import write_run
from harness.simulator.routers import ROUTERS
from harness.simulator.simulation import read_arm, simulate
from harness.simulator.step_log import StepTotals
from harness.simulator.verify import render_verified, verify

_FIGURES = (
    *(Figure(metric) for metric in (OUTPUT_TOKENS, REQUESTS)),
    *(Figure(metric, q) for metric in (TTFT, TPOT) for q in (50, 95)),
)

_OF_LOAD = ("rate", "concurrency")
_CAN_BE_SWEPT = "rate, concurrency, replicas, router or a setting of the service, in capitals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_setting_options(parser, leave_out=OF_REAL_RUNS)
    add_corpus_option(parser)
    add = parser.add_argument
    add(
        "--variants", nargs="+", metavar="NAME", default=["baseline", "static", "dynamic", "continuous"],
        help="strategies with settings, as in `lab compare`: continuous@ORDER=hrrn,MAX_BATCH=32",
    )  # fmt: skip
    add_fleet_options(parser)
    add("--save-calibration", type=Path, metavar="PATH", help="write the calibration as JSON")
    add("--replicas", type=int, default=1, metavar="N", help="engines behind the router (default 1)")
    add("--router", choices=ROUTERS, default="round_robin", help="who gets a request (default round_robin)")
    add(
        "--sweep", type=_swept, action="append", default=[], metavar="NAME=VALUES",
        help=f"every arm with each of these values, rate=2,4,8 or MAX_BATCH=8,16: {_CAN_BE_SWEPT}; several "
        "times: all combinations",
    )  # fmt: skip
    add("--exact", action="store_true", help="every step an event of its own; slower, same rows")
    add(
        "--brief", action="store_true",
        help="for millions of requests: figures alone, no files of rows and steps",
    )  # fmt: skip
    add(
        "--verify",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="simulate these measured runs and say the errors",
    )
    add_slo_option(parser)


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        LabError: a setting cannot work, or a file cannot be read.
    """
    calibration = read_source(args.calibrate, allow_busy=args.allow_busy)
    if args.save_calibration:
        write_calibration(args.save_calibration, calibration)
    if args.verify:
        return _verify(without_steps(args.verify), calibration)
    settings = read_settings(args)
    make_plan = long_plan if args.brief else plan
    slo = Slo(tuple(args.slo))
    if args.brief:
        refuse_limits(slo)
    lines, most, last = [], dict[str, int](), []
    for point in map(dict[str, Any], product(*args.sweep)):
        at = settings.model_copy(update={name: point[name] for name in _OF_LOAD if name in point})
        corpus, schedule = make_plan(at, allow_changed_corpus=args.allow_changed_corpus)
        is_open = schedule.load.is_open
        replicas, router = point.get("replicas", args.replicas), point.get("router", args.router)
        options = fleet_options(
            args, at, replicas=replicas, router=router, exact=args.exact, brief=args.brief
        )
        for text in split_names(args.variants):
            name, own = parse_arm(text)
            own = {key: value for key, value in point.items() if key.isupper()} | own
            arm = read_arm(name, own, calibration)
            label = " ".join([arm.variant, *(f"{key}={value}" for key, value in (point | own).items())])
            kept, began_s = BriefRows(len(schedule.requests)), process_time()
            made = simulate(arm, calibration, schedule, options, on_end=kept.add if args.brief else None)
            took_s = process_time() - began_s
            if args.brief:
                rows, rate = kept.frame(), kept.throughput(is_open=is_open)
                steps: StepTotals | StepSummary | None = made.fleet.totals
                last.append(f"{label}: {_speed(made.fleet, len(rows), took_s)}")
            else:
                path, rows, manifest = write_run(made, label, at, corpus, schedule, calibration)
                rate, steps = throughput(rows, is_open=is_open), manifest.repeats[0].steps
                last.append(f"rows: {path}")
            lines.append(_line(label, rows, is_open, rate, steps, slo, made.fleet))
            most = {name: max(value, most.get(name, 0)) for name, value in made.most.items()}
    print(_render(lines, args, settings, slo))
    print_origin(calibration, most)
    print("\n".join(last))
    return 0


def _swept(text: str) -> list[tuple[str, int | float | str]]:
    name, _, values = text.partition("=")
    read = {"rate": _above_zero(float), "concurrency": _above_zero(int), "replicas": _above_zero(int)}
    if name not in (*read, "router") and not name.isupper():
        raise argparse.ArgumentTypeError(f"{name!r} cannot be swept: {_CAN_BE_SWEPT}")
    if name == "router" and (unknown := [router for router in values.split(",") if router not in ROUTERS]):
        raise argparse.ArgumentTypeError(f"there is no router {unknown[0]!r}; known: {', '.join(ROUTERS)}")
    try:
        return [(name, read.get(name, str)(value)) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"the values of {name} must be above 0, not {values!r}") from None


def _above_zero(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        if not 0 < (number := kind(text)) < float("inf"):
            raise ValueError
        return number

    return read


def _line(
    label: str,
    rows: pd.DataFrame,
    is_open: bool,
    rate: Throughput | None,
    steps: StepTotals | StepSummary | None,
    slo: Slo,
    fleet: Fleet,
) -> list[str]:
    values = dict[str, float | None]()
    if rate:
        values = {OUTPUT_TOKENS.name: rate.output_tokens_per_s, REQUESTS.name: rate.requests_per_s}
    each = (
        figure.value(rows, is_open) if figure.q else values.get(figure.metric.name) for figure in _FIGURES
    )
    cells = [label, *(figure.text(value) for figure, value in zip(_FIGURES, each, strict=True))]
    cells += [f"{steps.mean_batch_size:.2f}", share(steps.dead_row_share)] if steps else ["", ""]
    cells += [share(float(rows["error"].notna().mean())), f"{fleet.replica_s / 3600:.3g}"]
    if slo:
        good = goodput(rows, slo, rate.window_s if rate else float("inf"))
        missed = [
            limit.text() for limit in slo.on_the_run if not limit.is_met_by(limit.figure.value(rows, is_open))
        ]
        cells.append(f"{good.share:.0%}" + (f"; misses {', '.join(missed)}" if missed else ""))
    return cells


def _speed(fleet: Fleet, num_requests: int, took_s: float) -> str:
    peak = getrusage(RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    return (
        f"{num_requests:,} requests, {fleet.totals.num_steps:,} steps, {fleet.num_events:,} events "
        f"in {took_s:.1f} s of CPU: "
        f"{num_requests / took_s:,.0f} requests/s, {fleet.num_events / took_s:,.0f} events/s; "
        f"at most {peak:.0f} MB"
    )


def _render(lines: list[list[str]], args: argparse.Namespace, settings: HarnessSettings, slo: Slo) -> str:
    headers = ["simulated arm", *(figure.label for figure in _FIGURES), "mean batch", "dead rows"]
    headers += ["failed", "replica hours"]
    headers += ["within SLO"] if slo else []
    load = f"trace {settings.trace}" if settings.trace else load_words(settings.rate, settings.concurrency)
    fleet = f"{args.replicas} replica(s), {args.router}"
    heading = f"{settings.requests} requests, {load}, {fleet}, seed {settings.seed}"
    if args.sweep:
        heading += ", but for what stands with each arm"
    return f"{heading}\n\n{render_table(headers, lines)}"


def _verify(paths: list[Path], calibration: Calibration) -> int:
    runs = [verify(path, calibration) for path in paths]
    print(f"{calibration.in_words()}\n\n{render_verified(runs)}")
    return 1 if any(check.is_off for run in runs for check in run.checks) else 0
