"""Simulates measured runs again and says how far off each figure is.

A run takes part with its own requests, lengths and service settings; only times come from the calibration.
The scheduler is held against the run's own step log as well, at the logged times.
The run that a calibration was made from proves nothing and is refused, and so is one of another model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from adapters.base import BackendConfig, ConfigError
from harness.plan.arrival_times import think_times
from harness.plan.schedule import PlannedRequest, Schedule
from harness.results.manifest import RunManifest, StepSummary
from harness.results.metrics import OUTPUT_TOKENS, TPOT, TTFT, Figure
from harness.results.record import ReplayLabels, make_table, to_frame
from harness.results.steps import summarise_steps
from harness.simulator.calibration import Calibration
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.measured import read_whole_run, settings_of
from harness.simulator.replaying import replay_steps
from harness.simulator.simulation import make_rows, simulate
from harness.simulator.verified import Checked, VerifiedRun

_FIGURES: tuple[tuple[Figure, float, float], ...] = (
    (Figure(OUTPUT_TOKENS), 0.05, 0.02),
    (Figure(TTFT, 50), 0.10, 0.10),
    (Figure(TPOT, 50), 0.05, 0.10),
    (Figure(TTFT, 95), 0.20, 0.20),
    (Figure(TPOT, 95), 0.20, 0.20),
)
"""What is checked, and the errors that are allowed: of a model, and of the null backend's formula."""
_BATCH_ALLOWED, _DEAD_ALLOWED = 0.05, 0.0005


def verify_all(paths: Sequence[Path], calibration: Calibration) -> list[VerifiedRun]:
    """Each run by itself, and repeats of one run against each other.

    Raises:
        ConfigError: as `verify`.
    """
    runs = [verify(path, calibration) for path in paths]
    repeats: dict[tuple[str, str], list[VerifiedRun]] = {}
    for run in runs:
        repeats.setdefault(run.what, []).append(run)

    def with_repeats(run: VerifiedRun) -> VerifiedRun:
        of_each = zip(*(other.checks for other in repeats[run.what]), strict=True)
        values = [tuple(c.measured for c in checks if c.measured is not None) for checks in of_each]
        each = zip(run.checks, values, strict=True)
        return replace(run, checks=tuple(replace(check, repeats=found) for check, found in each))

    return [with_repeats(run) for run in runs]


def verify(path: Path, calibration: Calibration) -> VerifiedRun:
    """
    Raises:
        ConfigError: the run cannot be simulated, has failed requests, is the calibration's own, or is of
            another model.
    """
    manifest, rows, steps = read_whole_run(path)
    if manifest.run_id == calibration.source:
        raise ConfigError(f"{path} is the run that the calibration was made from")
    if num_failed := int(rows["error"].notna().sum()):
        raise ConfigError(
            f"{num_failed} of the {len(rows)} requests of {path} failed, and what they cost the others is "
            "not simulated: verify a run without failures"
        )
    _refuse_another_machine(path, manifest, calibration)
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
    is_null = settings.backend == "null"
    checks = [
        Checked(
            figure.label,
            figure.value(rows, is_open),
            figure.value(said, is_open),
            of_null if is_null else of_model,
        )
        for figure, of_model, of_null in _FIGURES
    ]
    checks += _of_steps(manifest.repeats[0].steps, summarise_steps(made.steps, 0))
    load = f"{schedule.load.rate:.3g}/s" if is_open else f"{schedule.load.concurrency} users"
    load = "trace" if schedule.load.trace_sha256 else load
    is_said = "MAX_BATCH=" in manifest.arm or settings.max_batch == BackendConfig().max_batch_size
    name = manifest.arm if is_said else f"{manifest.arm} MAX_BATCH={settings.max_batch}"
    others = manifest.repeats[0].machine.other_cpu_share
    warmup = manifest.settings.model_dump().get("warmup")  # a run that began colder is no repeat
    replay = replay_steps(manifest, rows, steps)
    return VerifiedRun(name, load, others, tuple(checks), f"{schedule.digest}/{warmup}", replay)


def _refuse_another_machine(path: Path, manifest: RunManifest, calibration: Calibration) -> None:
    assert manifest.service is not None
    its = manifest.service.model_dump() | {"model": manifest.model}
    for name in ("backend", "model", "device", "dtype", "num_threads"):
        if its[name] != calibration.info[name]:
            raise ConfigError(f"{path} has {name} {its[name]}, the calibration {calibration.info[name]}")


def _of_steps(real: StepSummary | None, said: StepSummary | None) -> list[Checked]:
    if real is None or said is None:
        return []
    dead = Checked("dead share", real.dead_row_share, said.dead_row_share, _DEAD_ALLOWED)
    return [Checked("mean batch", real.mean_batch_size, said.mean_batch_size, _BATCH_ALLOWED), dead]


def _schedule_of(
    rows: pd.DataFrame, manifest: RunManifest
) -> tuple[Schedule, Callable[[PlannedRequest], int]]:
    """The requests that were answered, with the lengths that their answers had."""
    ordered, load = rows.sort_values("schedule_index"), manifest.schedule.load
    num = manifest.schedule.num_requests
    think_s = [0.0] * num if load.think_ms is None else think_times(num, load, manifest.seeds["think"])
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
            think_s=think_s[int(row["schedule_index"])],
        )
        for row in ordered.to_dict("records")
    )
    lengths = dict(zip(ordered["schedule_index"], ordered["num_prompt_tokens"], strict=True))
    schedule = Schedule(load, requests, {}, manifest.schedule.plan_digest)
    return schedule, lambda planned: int(lengths[planned.index])
