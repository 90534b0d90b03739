"""Limits on the metrics of a run, as `--slo ttft_p95_ms=500,tpot_ms=50` gives them.

A limit without a percentile holds for every request, and goodput counts the requests that meet all of
those; one with a percentile, or on a metric of the whole run, holds for the run. Latencies are from schedule,
`ttft_send_ms` is from sending.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import pandas as pd

from adapters.base import ConfigError
from harness.results.formulas import Bools, Floats
from harness.results.metrics import METRICS, Figure
from harness.results.stats import MIN_SAMPLES


@dataclass(frozen=True, slots=True)
class Limit:
    """A lower bound where higher is better, else an upper one."""

    figure: Figure
    bound: float

    @property
    def is_on_each_request(self) -> bool:
        return self.figure.q is None and self.figure.metric.samples is not None

    def admits(self, values: Floats) -> Bools:
        """NaN never."""
        return values >= self.bound if self.figure.metric.higher_is_better else values <= self.bound

    def is_met_by(self, value: float | None) -> bool:
        return bool(self.admits(np.array([value], dtype=float)).all())

    def text(self) -> str:
        return f"{self.figure.key}={self.bound:g}"


@dataclass(frozen=True, slots=True)
class Slo:
    limits: tuple[Limit, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.limits)

    @property
    def on_each_request(self) -> Slo:
        return Slo(tuple(limit for limit in self.limits if limit.is_on_each_request))

    @property
    def on_the_run(self) -> tuple[Limit, ...]:
        return tuple(limit for limit in self.limits if not limit.is_on_each_request)

    def are_met(self, rows: pd.DataFrame, *, is_open: bool) -> bool:
        """Whether the run meets all limits; with a failed request it meets none.

        Raises:
            ConfigError: the run is too short for one of the percentiles.
        """
        if rows["error"].notna().any() or not self.meeting(rows).all():
            return False
        for limit in self.on_the_run:
            figure = limit.figure
            value = figure.over(rows, is_open)
            if value is None and figure.q is not None:
                least = MIN_SAMPLES[figure.q]
                raise ConfigError(f"{figure.key} needs {least} answers a run: set REQUESTS higher")
            if not limit.is_met_by(value):
                return False
        return True

    def meeting(self, rows: pd.DataFrame) -> Bools:
        """Which requests meet the limits on each; failed ones miss, and so do those without a value unless
        the answer is too short to have one (TPOT of a single token)."""
        good = rows["error"].isna().to_numpy()
        has_token = rows["ttft_ms"].notna().to_numpy()
        for limit in self.on_each_request.limits:
            metric = limit.figure.metric
            assert metric.samples is not None
            values = metric.samples(rows).worst(len(rows), higher_is_better=metric.higher_is_better)
            good = good & (limit.admits(values) | (np.isnan(values) & has_token))
        return good

    def text(self) -> str:
        return ", ".join(limit.text() for limit in self.limits)


def parse_limits(text: str) -> list[Limit]:
    """Read `ttft_p95_ms=500,tpot_ms=50`. `ttft_sched_ms` is another spelling of `ttft_ms`.

    Raises:
        argparse.ArgumentTypeError: no metric has this name, or a limit is not a number above 0.
    """
    plain = [Figure(metric) for metric in METRICS]
    known = {figure.key: figure for metric in METRICS for figure in (*plain, *metric.figures)}
    limits: list[Limit] = []
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        figure = known.get(name.replace("_sched_", "_"))
        if figure is None:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no metric; use {', '.join(f.key for f in plain)}, or a percentile of requests, "
                f"as ttft_p95_ms ({', '.join(f'p{q}' for q in MIN_SAMPLES)})"
            )
        try:
            bound = float(value)
        except ValueError:
            bound = -1.0
        if not bound > 0:
            raise argparse.ArgumentTypeError(f"the limit of {name} must be a number above 0")
        limits.append(Limit(figure, bound))
    return limits


@dataclass(frozen=True, slots=True)
class Goodput:
    requests_per_s: float
    share: float
    """Of all requests, failed ones included."""


def goodput(rows: pd.DataFrame, slo: Slo, window_s: float) -> Goodput:
    """Requests a second that meet all limits on each request."""
    good = slo.meeting(rows)
    return Goodput(float(good.sum()) / window_s, float(good.mean()))
