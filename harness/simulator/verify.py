"""Simulates measured runs again and says how far off each figure is.

A run takes part with its own requests, lengths and service settings; only times come from the calibration.
The run that a calibration was made from proves nothing and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from adapters.base import ConfigError
from harness.plan.schedule import PlannedRequest, Schedule
from harness.results.manifest import RunManifest, StepSummary
from harness.results.metrics import OUTPUT_TOKENS, TPOT, TTFT, Figure
from harness.results.record import ReplayLabels, make_table, to_frame
from harness.results.steps import summarise_steps
from harness.results.table import MISSING, render_table
from harness.simulator.calibration import Calibration
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.measured import read_run, settings_of
from harness.simulator.simulation import make_rows, simulate


@dataclass(frozen=True, slots=True)
class Checked:
    """One figure of one run; `allowed` is the largest relative error that counts as right."""

    name: str
    measured: float | None
    simulated: float | None
    allowed: float | None

    @property
    def error(self) -> float | None:
        if self.measured is None or self.simulated is None:
            return None
        if self.measured == self.simulated:
            return 0.0
        return self.simulated / self.measured - 1 if self.measured else None

    @property
    def is_off(self) -> bool:
        return self.allowed is not None and (self.error is None or abs(self.error) > self.allowed)

    def text(self) -> str:
        if self.measured is None or self.simulated is None:
            return MISSING
        said = f"{self.error:+.1%}" if self.error is not None else "?"
        return f"{self.measured:.4g} -> {self.simulated:.4g} ({said}){' !' if self.is_off else ''}"


@dataclass(frozen=True, slots=True)
class VerifiedRun:
    name: str
    load: str
    others: float | None
    """Share of the CPU that other processes used while it was measured."""
    checks: tuple[Checked, ...]


_FIGURES: tuple[tuple[Figure, float | None], ...] = (
    (Figure(OUTPUT_TOKENS), 0.02),
    (Figure(TTFT, 50), 0.10),
    (Figure(TPOT, 50), 0.10),
    (Figure(TTFT, 95), None),
)
_BATCH_ALLOWED, _DEAD_ALLOWED = 0.05, 0.0005


def verify(path: Path, calibration: Calibration) -> VerifiedRun:
    """
    Raises:
        ConfigError: the run cannot be simulated, or is the calibration's own.
    """
    manifest, rows, _ = read_run(path)
    if manifest.run_id == calibration.source:
        raise ConfigError(f"{path} is the run that the calibration was made from")
    if manifest.repeats[1:] or manifest.schedule.shard != (0, 1):
        raise ConfigError(f"{path} holds several replays, or a part of one: verify single runs")
    settings = settings_of(manifest)
    schedule, num_prompt_tokens = _schedule_of(rows, manifest)
    made = simulate(
        settings,
        calibration,
        schedule,
        FleetOptions(),
        num_prompt_tokens=num_prompt_tokens,
    )
    labels = ReplayLabels("simulated", manifest.variant, manifest.arm, "", "", 0)
    said = to_frame(make_table(make_rows(labels, made.flights)))
    is_open = schedule.load.is_open
    checks = [
        Checked(figure.label, figure.value(rows, is_open), figure.value(said, is_open), allowed)
        for figure, allowed in _FIGURES
    ]
    checks += _of_steps(manifest.repeats[0].steps, summarise_steps(made.steps, 0))
    load = f"{schedule.load.rate:.3g}/s" if is_open else f"{schedule.load.concurrency} users"
    load = "trace" if schedule.load.trace_sha256 else load
    return VerifiedRun(manifest.arm, load, manifest.repeats[0].machine.other_cpu_share, tuple(checks))


def _of_steps(real: StepSummary | None, said: StepSummary | None) -> list[Checked]:
    if real is None or said is None:
        return []
    dead = Checked("dead share", real.dead_row_share, said.dead_row_share, _DEAD_ALLOWED)
    return [Checked("mean batch", real.mean_batch_size, said.mean_batch_size, _BATCH_ALLOWED), dead]


def _schedule_of(
    rows: pd.DataFrame, manifest: RunManifest
) -> tuple[Schedule, Callable[[PlannedRequest], int]]:
    """The requests that were answered, with the lengths that their answers had."""
    ordered = rows.sort_values("schedule_index")
    requests = tuple(
        PlannedRequest(
            index=int(row["schedule_index"]),
            prompt_id=str(row["prompt_id"]),
            prompt="",
            max_tokens=int(row["num_output_tokens"]),
            seed=int(row["seed"]),
            offset_s=None if pd.isna(row["offset_s"]) else float(row["offset_s"]),
            user=None if pd.isna(row["user"]) else str(row["user"]),
            priority=None if pd.isna(row["priority"]) else int(row["priority"]),
        )
        for row in ordered.to_dict("records")
    )
    lengths = dict(zip(ordered["schedule_index"], ordered["num_prompt_tokens"], strict=True))
    schedule = Schedule(manifest.schedule.load, requests, {}, manifest.schedule.digest)
    return schedule, lambda planned: int(lengths[planned.index])


def render_verified(runs: list[VerifiedRun]) -> str:
    names = [check.name for check in runs[0].checks]
    lines = [
        [run.name, run.load, MISSING if run.others is None else f"{run.others:.0%}"]
        + [check.text() for check in run.checks]
        for run in runs
    ]
    summary = []
    for place, name in enumerate(names):
        errors = [abs(e) for run in runs if (e := run.checks[place].error) is not None]
        num_off = sum(run.checks[place].is_off for run in runs)
        middle = f"{pd.Series(errors).median():.1%}" if errors else MISSING
        summary.append(f"{name}: median error {middle}, {num_off} of {len(runs)} runs beyond what is allowed")
    table = render_table(["arm", "load", "others' CPU", *names], lines)
    return "\n".join([table, "", *summary])
