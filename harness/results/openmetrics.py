"""The summary of a run for Prometheus: a file in OpenMetrics text, and a Pushgateway where one is named.

A gateway that does not answer costs a warning, never the run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pandas as pd
from prometheus_client import CollectorRegistry, Gauge, pushadd_to_gateway
from prometheus_client.exposition import basic_auth_handler, default_handler
from prometheus_client.openmetrics.exposition import generate_latest

from harness.results.manifest import RunManifest
from harness.results.metrics import METRICS, OUTPUT_TOKENS, Figure
from harness.results.output_dir import whole_file
from harness.results.steady import FIGURES as STEADY_FIGURES
from harness.results.steady import steady_figures
from harness.settings import ReportSettings, split_login

LABELS = ("variant", "backend", "model", "arm")
JOB = "batching_lab"
_UNITS = {"ms": ("seconds", 1e-3), "per_s": ("per_second", 1.0)}
"""Prometheus has base units only; one that is not here keeps its name."""


def write_openmetrics(path: Path, rows: pd.DataFrame, manifest: RunManifest) -> Path:
    """Write the file beside `path` and return where it is."""
    registry = summary_of(rows, manifest)
    written = path.with_suffix(".om")
    with whole_file(written) as file:
        file.write(generate_latest(registry))  # type: ignore[no-untyped-call]
    return written


def push(rows: pd.DataFrame, manifest: RunManifest) -> str | None:
    """Push to PUSHGATEWAY_URL, if set; returns what went wrong."""
    url = ReportSettings().pushgateway_url
    if not url:
        return None
    grouping = {"variant": manifest.variant, "arm": manifest.arm}
    url, login = split_login(url)
    user, _, password = (login or "").partition(":")
    send = partial(basic_auth_handler, username=user, password=password) if login else default_handler
    try:
        pushadd_to_gateway(url, JOB, summary_of(rows, manifest), grouping, timeout=5, handler=send)
    except (OSError, ValueError, HTTPException) as error:
        return f"the summary could not be pushed to {url}: {error}"
    return None


def _quantile(figure: Figure) -> dict[str, str]:
    return {} if figure.q is None else {"quantile": f"0.{figure.q}"}


def _add_steady(gauge: Callable[..., None], rows: pd.DataFrame, manifest: RunManifest) -> None:
    """The figures of the steady window; nothing where load was never as asked."""
    found = steady_figures(rows, manifest.schedule.load)
    if found is None:
        return
    where = "In the steady window, while load was as asked."
    gauge("lab_run_steady_share", "Share of the time that the steady window covers.", found.share)
    gauge("lab_run_steady_requests", f"Requests. {where}", float(found.num_requests))
    rate = OUTPUT_TOKENS
    gauge(f"lab_run_steady_{rate.name}_per_second", f"{rate.description} {where}", found.output_tokens_per_s)
    for figure, value in zip(STEADY_FIGURES, found.latencies, strict=True):
        unit, factor = _UNITS[figure.metric.unit]
        words = f"{figure.metric.description} {where}"
        gauge(f"lab_run_steady_{figure.metric.name}_{unit}", words, value, factor, **_quantile(figure))


def summary_of(rows: pd.DataFrame, manifest: RunManifest) -> CollectorRegistry:
    """Gauges of one run; a percentile with too few samples behind it is left out."""
    registry = CollectorRegistry()
    backend = manifest.service.backend if manifest.service else "external"
    values = (manifest.variant, backend, manifest.model, manifest.arm)

    def gauge(name: str, words: str, value: float | None, factor: float = 1.0, **extra: str) -> None:
        if value is None:
            return
        found = gauges.get(name)
        if found is None:
            found = gauges[name] = Gauge(name, words, (*LABELS, *extra), registry=registry)
        found.labels(*map(str, values), *extra.values()).set(value * factor)

    gauges: dict[str, Gauge] = {}
    is_open = manifest.schedule.load.is_open
    for metric in METRICS:
        unit, factor = _UNITS.get(metric.unit, (metric.unit, 1.0))
        name = "_".join(filter(None, ("lab_run", metric.name, unit)))
        for figure in metric.figures:
            gauge(name, metric.description, figure.over(rows, is_open), factor, **_quantile(figure))
            for end, bound in zip(("low", "high"), figure.interval(rows) or (), strict=False):
                words = f"{end.capitalize()} end, by ranks, of the percentile's interval."
                name_of_end = "_".join(("lab_run", metric.name, end, unit))
                gauge(name_of_end, f"{metric.description} {words}", bound, factor, **_quantile(figure))
    _add_steady(gauge, rows, manifest)
    gauge("lab_run_requests", "Requests of the run.", float(len(rows)))
    gauge("lab_run_failed_requests", "Requests that failed.", float(rows["error"].notna().sum()))
    joules = [entry.joules_per_token for entry in manifest.repeats if entry.joules_per_token is not None]
    words = "Energy of the GPU for each output token."
    gauge("lab_run_gpu_joules_per_token", words, sum(joules) / len(joules) if joules else None)
    is_invalid = manifest.validity is not None and bool(manifest.validity.invalid)
    gauge("lab_run_is_valid", "1 unless the run is INVALID.", float(not is_invalid))
    return registry
