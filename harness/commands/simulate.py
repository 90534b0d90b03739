"""`lab simulate`: a fleet on a virtual clock, with the lab's own engine, strategies and load.

Figures are predictions from a calibration and say so wherever they stand. Exit status: 0, or 2 when nothing
could be simulated; with `--verify` 1 when a figure of a run is further off than is allowed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from adapters.base import ConfigError
from harness.commands.bench import add_corpus_option
from harness.commands.options import add_slo_option, without_steps
from harness.comparing.arms import parse_arm, split_names
from harness.plan.planner import plan
from harness.results.formulas import throughput
from harness.results.manifest import RunManifest
from harness.results.metrics import OUTPUT_TOKENS, REQUESTS, TPOT, TTFT, Figure
from harness.results.slo import Slo, goodput
from harness.results.table import render_table, share
from harness.settings import OF_COMPARE, HarnessSettings, add_setting_options, read_settings
from harness.simulator.calibration import (
    DEFAULT,
    Calibration,
    null_calibration,
    read_calibration,
    write_calibration,
)
from harness.simulator.measured import calibrate
from harness.simulator.output import write_run
from harness.simulator.routers import ROUTERS
from harness.simulator.simulation import FleetOptions, read_arm, simulate
from harness.simulator.verify import render_verified, verify

_OF_REAL_RUNS = OF_COMPARE.union(
    {
        *("variant", "backend", "model", "repeats", "url", "warmup", "floor", "processes", "shard"),
        *("start_at", "start_timeout_s", "request_timeout_s", "temperature", "ignore_eos", "salt"),
    }
)
"""Settings of the harness that a virtual clock has no use for."""
_FIGURES = (
    *(Figure(metric) for metric in (OUTPUT_TOKENS, REQUESTS)),
    *(Figure(metric, q) for metric in (TTFT, TPOT) for q in (50, 95)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_setting_options(parser, leave_out=_OF_REAL_RUNS)
    add_corpus_option(parser)
    add = parser.add_argument
    add(
        "--variants", nargs="+", metavar="NAME", default=["baseline", "static", "dynamic", "continuous"],
        help="strategies with settings, as in `lab compare`: continuous@ORDER=hrrn,MAX_BATCH=32",
    )  # fmt: skip
    add(
        "--calibrate", default=str(DEFAULT), metavar="FROM",
        help="a calibration (.json), a measured RUN.parquet with its step log, or null "
        "(default: lab-26m on 2 cores)",
    )  # fmt: skip
    add("--save-calibration", type=Path, metavar="PATH", help="write the calibration as JSON")
    add("--allow-busy", action="store_true", help="calibrate on a run whose machine was not quiet")
    add("--replicas", type=int, default=1, metavar="N", help="engines behind the router (default 1)")
    add("--router", choices=ROUTERS, default="round_robin", help="who gets a request (default round_robin)")
    add(
        "--info-delay-ms", type=float, default=0.0, metavar="MS",
        help="how late the router learns of ends and queues (default 0)",
    )  # fmt: skip
    add("--exact", action="store_true", help="every step an event of its own; slower, same rows")
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
    if args.replicas < 1:
        raise ConfigError(f"--replicas must be at least 1, not {args.replicas}")
    settings = read_settings(args)
    corpus, schedule = plan(settings, allow_changed_corpus=args.allow_changed_corpus)
    options = FleetOptions(
        args.replicas,
        args.router,
        args.info_delay_ms / 1000,
        settings.seed,
        args.exact,
        settings.max_in_flight,
    )
    slo = Slo(tuple(args.slo))
    lines, most, paths = [], dict[str, int](), []
    for text in split_names(args.variants):
        name, own = parse_arm(text)
        made = simulate(read_arm(name, own, calibration), calibration, schedule, options)
        label = " ".join([made.settings.variant, *(f"{key}={value}" for key, value in own.items())])
        path, rows, manifest = write_run(made, label, settings, corpus, schedule, calibration)
        lines.append(_line(label, rows, manifest, slo))
        most = {name: max(value, most.get(name, 0)) for name, value in made.most.items()}
        paths.append(path)
    print(_render(lines, settings, options, slo))
    print(f"\nSIMULATED, not measured: {calibration.in_words()}")
    for doubt in (*calibration.outside(most), *calibration.notes):
        print(f"  caution: {doubt}")
    print("\n".join(f"rows: {path}" for path in paths))
    return 0


def read_source(source: str, *, allow_busy: bool) -> Calibration:
    """
    Raises:
        ConfigError: it is none of the three, or cannot be used.
    """
    if source == "null":
        return null_calibration()
    path = Path(source)
    return calibrate(path, allow_busy=allow_busy) if path.suffix == ".parquet" else read_calibration(path)


def _line(label: str, rows: pd.DataFrame, manifest: RunManifest, slo: Slo) -> list[str]:
    is_open = manifest.schedule.load.is_open
    steps = manifest.repeats[0].steps
    cells = [label, *(figure.text(figure.value(rows, is_open)) for figure in _FIGURES)]
    cells += [f"{steps.mean_batch_size:.2f}", share(steps.dead_row_share)] if steps else ["", ""]
    if slo:
        rate = throughput(rows, is_open=is_open)
        good = goodput(rows, slo, rate.window_s if rate else float("inf"))
        missed = [
            limit.text() for limit in slo.on_the_run if not limit.is_met_by(limit.figure.value(rows, is_open))
        ]
        cells.append(f"{good.share:.0%}" + (f"; misses {', '.join(missed)}" if missed else ""))
    return cells


def _render(lines: list[list[str]], settings: HarnessSettings, options: FleetOptions, slo: Slo) -> str:
    headers = ["simulated arm", *(figure.label for figure in _FIGURES), "mean batch", "dead rows"]
    headers += ["within SLO"] if slo else []
    load = f"trace {settings.trace}" if settings.trace else f"{settings.concurrency} users"
    load = f"{settings.rate:g} requests/s" if settings.rate else load
    fleet = f"{options.num_replicas} replica(s), {options.router}"
    heading = f"{settings.requests} requests, {load}, {fleet}, seed {settings.seed}"
    return f"{heading}\n\n{render_table(headers, lines)}"


def _verify(paths: list[Path], calibration: Calibration) -> int:
    runs = [verify(path, calibration) for path in paths]
    print(f"{calibration.in_words()}\n\n{render_verified(runs)}")
    return 1 if any(check.is_off for run in runs for check in run.checks) else 0
