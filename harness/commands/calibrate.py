"""`lab calibrate`: what a step costs, from a designed grid of steps on the backend of a measured run.

The run gives the time around steps (loop, API and client), which needs a service; the cost of a step is
fitted to the steps of both. The grid has rows, contexts and prompts that no single load meets. Takes minutes,
on a machine that does nothing else. Exit status: 0, or 2 when no calibration could be made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import psutil

from adapters.base import ConfigError
from adapters.registry import create_backend
from harness.replay.machine import MachineSample
from harness.simulator.calibration import write_calibration
from harness.simulator.fitting import errors_of, fit_cost
from harness.simulator.grid import measure_grid
from harness.simulator.measured import calibrate, read_run, refuse_busy, settings_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="parquet of a run with its step log, of `lab bench`")
    add("--out", type=Path, required=True, metavar="PATH", help="the calibration, as JSON")
    add("--seed", type=int, default=0, help="of the order of the grid (default 0)")
    add(
        "--grids", type=int, default=1, metavar="N",
        help="measure the grid so often, each time in another order (default 1), since a machine drifts",
    )  # fmt: skip
    add("--allow-busy", action="store_true", help="also where other processes use the CPU")


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        LabError: the run or its model cannot be read, or the machine is not quiet.
    """
    if args.grids < 1:
        raise ConfigError("--grids must be at least 1")
    serving = calibrate(args.run, allow_busy=args.allow_busy)
    manifest, _, its_steps = read_run(args.run)
    config = settings_of(manifest).engine_spec().backend
    backend = create_backend(config)
    try:
        if backend.info.model_digest != serving.info["model_digest"]:
            raise ConfigError(f"{args.run} was measured with another {config.model} than is here now")
        before = MachineSample.take(None)
        seeds = range(args.seed, args.seed + args.grids)
        steps = pd.concat([measure_grid(backend, config, seed=seed) for seed in seeds])
        use = MachineSample.take(None).use_since(before)
    finally:
        backend.close()
    others = max(0.0, (use.busy_share or 0.0) - use.harness_cpu_share / (psutil.cpu_count() or 1))
    note = refuse_busy(others, "the grid", allow_busy=args.allow_busy)
    from_grid, _, _ = fit_cost(steps)
    cost, quality, ranges = fit_cost(pd.concat([steps, its_steps[list(steps)]]))
    made = serving.model_copy(
        update={"cost": cost, "fit": quality, "ranges": ranges, "notes": (*serving.notes, *note)}
    )
    write_calibration(args.out, made)
    print(f"{len(steps):,} steps\n{made.in_words()}")
    for name, of in (("the grid alone", from_grid), ("the run alone", serving.cost), ("both", cost)):
        middle, high = errors_of(of, its_steps)
        print(f"steps of the run by a fit to {name}: off by {middle:.1%} (median), {high:.0%} (p95)")
    print(f"calibration: {args.out}")
    return 0
