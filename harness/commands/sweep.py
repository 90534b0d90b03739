"""`lab sweep`: one strategy over several loads, the knee of its curve, the highest load that meets the SLOs.

A sweep ends early where the server is saturated; with limits it then searches between the last load that met
them and the first that did not. One run a load gives no interval: `lab capacity` does, for several arms.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from adapters.base import ConfigError
from harness.commands.bench import INTERRUPTED_STATUS
from harness.commands.options import add_corpus_option, add_slo_option
from harness.comparing.capacity import is_saturated, next_load
from harness.measure import measure
from harness.plan.planner import plan
from harness.replay.arm_file import Arm, Measurement
from harness.replay.progress import Reporter, make_reporter
from harness.results.metrics import OUTPUT_TOKENS, REQUESTS, Figure, compared_figures
from harness.results.output_dir import make_folder
from harness.results.slo import Slo
from harness.results.table import render_table
from harness.settings import OF_COMPARE, HarnessSettings, add_setting_options, read_settings

KNEE_GAIN = 0.10
"""A doubling of users that brings less throughput than this is beyond the knee."""


@dataclass(frozen=True, slots=True)
class Point:
    """One load. `met` is None without limits."""

    load: float
    measurement: Measurement
    tokens_per_s: float
    is_saturated: bool
    met: bool | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_setting_options(
        parser, leave_out=OF_COMPARE | {"concurrency", "rate", "repeats", "trace", "time_scale"}
    )
    add_corpus_option(parser)
    loads = parser.add_mutually_exclusive_group(required=True)
    loads.add_argument("--concurrency", type=int, nargs="+", dest="users", metavar="N", help="closed loops")
    loads.add_argument("--rates", type=float, nargs="+", metavar="R", help="open loops, requests a second")
    add_slo_option(parser)
    parser.add_argument(
        "--search", type=int, default=4, metavar="N", help="loads tried by the search (default 4)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return the exit status.

    Raises:
        LabError: nothing could be measured.
    """
    slo = Slo(tuple(args.slo))
    settings = read_settings(args).model_copy(update={"repeats": 1, "rate": None})
    if settings.trace is not None:
        raise ConfigError(f"TRACE is {settings.trace}, but a sweep sets the load itself: unset it")
    loads = sorted(set(args.rates or args.users))
    if loads[0] <= 0:
        raise ConfigError(f"loads must be above 0, not {loads[0]:g}")
    make_folder(settings.out)
    sweep = Sweep(settings, slo, is_open=bool(args.rates), allow_changed=args.allow_changed_corpus)
    with make_reporter() as reporter:
        points = sweep.run(loads, args.search, reporter)
    print(render_sweep(points, slo, is_open=sweep.is_open))
    print("files: " + " ".join(str(point.measurement.path) for point in points))
    print(f"`lab report {Path(points[0].measurement.path).parent}/...` draws the curve of these files")
    return INTERRUPTED_STATUS if any(p.measurement.was_interrupted for p in points) else 0


class Sweep:
    """Measures loads one by one; a point that was measured is not measured again."""

    def __init__(
        self, settings: HarnessSettings, slo: Slo, *, is_open: bool, allow_changed: bool = False
    ) -> None:
        self._settings = settings
        self._slo = slo
        self.is_open = is_open
        self._allow_changed = allow_changed

    def run(self, loads: list[float], num_searched: int, reporter: Reporter) -> list[Point]:
        """All loads in order until saturation, then the search; sorted by load."""
        points: list[Point] = []
        for load in loads:
            points.append(self._measure(load, points, reporter))
            if points[-1].measurement.was_interrupted or points[-1].is_saturated:
                break
        for _ in range(num_searched if self._slo else 0):
            met = [point.load for point in points if point.met]
            missed = [point.load for point in points if not point.met]
            between = next_load(met, missed, is_open=self.is_open)
            if between is None or any(point.measurement.was_interrupted for point in points):
                break
            points.append(self._measure(between, points, reporter))
            points.sort(key=lambda point: point.load)
        return points

    def _measure(self, load: float, before: list[Point], reporter: Reporter) -> Point:
        chosen = {"rate": load} if self.is_open else {"concurrency": int(load)}
        if not self.is_open:
            # Every user asks at least four times, else the load is not held.
            chosen["requests"] = max(self._settings.requests, 4 * int(load))
        settings = self._settings.model_copy(update=chosen)
        corpus, schedule = plan(settings, allow_changed_corpus=self._allow_changed)
        reporter.announce(f"{load:g} {'requests/s' if self.is_open else 'users'}")
        measurement = measure(Arm(settings.variant), settings, corpus, schedule, reporter, [0])
        tokens_per_s = Figure(OUTPUT_TOKENS).value(measurement.rows, self.is_open) or 0.0
        met = None
        if self._slo:
            is_valid = measurement.validity.level != "INVALID"
            met = is_valid and self._slo.are_met(measurement.rows, is_open=self.is_open)
        saturated = is_saturated(measurement.rows) if self.is_open else False
        if not self.is_open and len(before) > 1:
            gain = tokens_per_s / max(before[-2].tokens_per_s, 1e-9) - 1
            saturated = gain < KNEE_GAIN and met is not True
        return Point(load, measurement, tokens_per_s, saturated, met)


def knee(points: list[Point]) -> float | None:
    """The load of the best ratio of throughput to median total time (Kleinrock's power)."""
    powers = [
        (point.tokens_per_s / float(median), point.load)
        for point in points
        if (median := point.measurement.rows["total_sched_ms"].median()) == median and median > 0
    ]
    return max(powers)[1] if len(powers) > 2 else None


def render_sweep(points: list[Point], slo: Slo, *, is_open: bool) -> str:
    """The table, the knee, and the highest load that met the limits."""
    unit = "requests/s" if is_open else "users"
    columns = compared_figures()
    columns.insert(1, Figure(REQUESTS))
    lines: list[list[str]] = []
    for point in points:
        values = (figure.value(point.measurement.rows, is_open) for figure in columns)
        cells = [f"{point.load:g}", *(f.text(value) for f, value in zip(columns, values, strict=True))]
        state = "saturated" if point.is_saturated else point.measurement.validity.level
        lines.append([*cells, state, "-" if point.met is None else "yes" if point.met else "no"])
    headers = [unit, *(figure.label for figure in columns), "state", "met SLO"]
    text = [render_table(headers, lines), "Latencies in ms; TTFT and total from schedule."]
    found = knee(points)
    text.append(f"knee: {found:g} {unit}" if found is not None else "knee: too few loads to tell")
    if slo:
        met = [point.load for point in points if point.met]
        best = f"{max(met):.3g} {unit}" if met else f"none of {min(p.load for p in points):g} {unit} or more"
        text.append(f"highest load that met {slo.text()}: {best}")
    return "\n".join(text)
