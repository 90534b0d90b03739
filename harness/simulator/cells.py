"""One arm at one point of a sweep with one seed, simulated by itself: a cell may run in any process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from resource import RUSAGE_SELF, getrusage
from time import process_time
from typing import Any

import pandas as pd

from harness.plan.corpus import default_path
from harness.plan.planner import plan
from harness.plan.schedule import Schedule
from harness.results.formulas import Throughput, throughput
from harness.results.manifest import StepSummary
from harness.results.metrics import OUTPUT_TOKENS, REQUESTS, TPOT, TTFT, Figure
from harness.results.slo import Slo, goodput, parse_limits
from harness.settings import HarnessSettings
from harness.simulator.brief import BriefRows, long_plan
from harness.simulator.calibration import Calibration
from harness.simulator.fleet import Fleet
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.output import write_run
from harness.simulator.simulation import simulate
from harness.simulator.step_log import StepTotals
from services.settings import SECRETS, Settings, all_settings

FIGURES = (
    *(Figure(metric) for metric in (OUTPUT_TOKENS, REQUESTS)),
    *(Figure(metric, q) for metric in (TTFT, TPOT) for q in (50, 95)),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """`options.brief` says whether rows and steps are written."""

    label: str
    settings: Mapping[str, Any]
    """All that were set for the arm, its environment's as well, so that another process has no say. Their
    class is made as the program starts, and no process gives it to another."""
    at: HarnessSettings
    options: FleetOptions
    calibration: Calibration
    limits: str = ""
    """As `--slo` takes them: a parsed one holds functions, which no process gives to another."""
    allow_changed_corpus: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    values: tuple[float | None, ...]
    """Of `FIGURES`."""
    mean_batch: float | None
    dead_share: float | None
    failed_share: float
    replica_s: float
    num_tokens: int
    """Of all answers."""
    good_share: float | None
    """Of requests that meet the SLOs; None without any."""
    missed: tuple[str, ...]
    """Limits on the run that it does not meet."""
    most: dict[str, int]
    """Of each count of `StepWork`, over all steps."""
    told: str
    """Where its files are, or how fast it was."""


def play_all(cells: Iterable[Cell], num_processes: int) -> Iterator[Outcome]:
    """In their order.

    Raises:
        ConfigError: a setting cannot work.
    """
    if num_processes == 1:
        yield from map(play, cells)
        return
    # A forked process would share the locks of the threads of numpy and pyarrow.
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        yield from pool.map(play, cells)


def set_of(arm: Settings) -> dict[str, Any]:
    """What a cell carries of the settings of an arm; no secret goes with it."""
    return arm.model_dump(exclude_unset=True, exclude=set(SECRETS))


def with_whole_paths(cell: Cell) -> Cell:
    """The same cell for a process in another folder. What is no file here is a name, or stays missing."""
    at = cell.at
    corpus, local = at.corpus, default_path()
    if corpus is None and at.trace is None and not local.is_absolute():
        corpus = local  # that of this folder, which the other one lacks
    paths = {"corpus": corpus, "trace": at.trace}
    found = {name: path.absolute() for name, path in paths.items() if path and path.is_file()}
    return replace(cell, at=at.model_copy(update=found))


def play(cell: Cell) -> Outcome:
    """
    Raises:
        ConfigError: a setting cannot work.
    """
    is_brief = cell.options.brief
    make_plan = long_plan if is_brief else plan
    corpus, schedule = make_plan(cell.at, allow_changed_corpus=cell.allow_changed_corpus)
    is_open = schedule.load.is_open
    arm = all_settings()(**cell.settings)
    kept, began_s = BriefRows(len(schedule.requests)), process_time()
    made = simulate(arm, cell.calibration, schedule, cell.options, on_end=kept.add if is_brief else None)
    took_s = process_time() - began_s
    steps: StepTotals | StepSummary | None
    if is_brief:
        rows, rate, steps = kept.frame(), kept.throughput(is_open=is_open), made.fleet.totals
        told = f"{cell.label}: {_speed(made.fleet, schedule, took_s)}"
    else:
        path, rows, manifest = write_run(made, cell.label, cell.at, corpus, schedule, cell.calibration)
        rate, steps = throughput(rows, is_open=is_open), manifest.repeats[0].steps
        told = f"rows: {path}"
    slo = Slo(tuple(parse_limits(cell.limits))) if cell.limits else Slo()
    missed = [m.text() for m in slo.on_the_run if not m.is_met_by(m.figure.value(rows, is_open))]
    return Outcome(
        values=_values(rows, rate, is_open=is_open),
        mean_batch=steps.mean_batch_size if steps else None,
        dead_share=steps.dead_row_share if steps else None,
        failed_share=float(rows["error"].notna().mean()),
        replica_s=made.fleet.replica_s,
        num_tokens=int(rows["num_output_tokens"].sum()),
        good_share=goodput(rows, slo, rate.window_s if rate else float("inf")).share if slo else None,
        missed=tuple(missed),
        most=made.most,
        told=told,
    )


def _values(rows: pd.DataFrame, rate: Throughput | None, *, is_open: bool) -> tuple[float | None, ...]:
    of_run = {OUTPUT_TOKENS: rate.output_tokens_per_s, REQUESTS: rate.requests_per_s} if rate else {}
    return tuple(figure.value(rows, is_open) if figure.q else of_run.get(figure.metric) for figure in FIGURES)


def _speed(fleet: Fleet, schedule: Schedule, took_s: float) -> str:
    num = len(schedule.requests)
    peak = getrusage(RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    return (
        f"{num:,} requests, {fleet.totals.num_steps:,} steps, {fleet.num_events:,} events "
        f"in {took_s:.1f} s of CPU: {num / took_s:,.0f} requests/s, "
        f"{fleet.num_events / took_s:,.0f} events/s; at most {peak:.0f} MB"
    )
