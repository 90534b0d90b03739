"""The summary of a run for Prometheus: a file in OpenMetrics text, and a Pushgateway where one is named.

A gateway that does not answer costs a warning, never the run.
"""

from __future__ import annotations

from functools import partial
from http.client import HTTPException
from pathlib import Path

import pandas as pd
from prometheus_client import CollectorRegistry, Gauge, pushadd_to_gateway
from prometheus_client.exposition import basic_auth_handler, default_handler
from prometheus_client.openmetrics.exposition import generate_latest

from harness.results.manifest import RunManifest
from harness.results.metrics import METRICS
from harness.results.output_dir import whole_file
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
            extra = {} if figure.q is None else {"quantile": f"0.{figure.q}"}
            gauge(name, metric.description, figure.over(rows, is_open), factor, **extra)
    gauge("lab_run_requests", "Requests of the run.", float(len(rows)))
    gauge("lab_run_failed_requests", "Requests that failed.", float(rows["error"].notna().sum()))
    joules = [entry.joules_per_token for entry in manifest.repeats if entry.joules_per_token is not None]
    words = "Energy of the GPU for each output token."
    gauge("lab_run_gpu_joules_per_token", words, sum(joules) / len(joules) if joules else None)
    is_invalid = manifest.validity is not None and bool(manifest.validity.invalid)
    gauge("lab_run_is_valid", "1 unless the run is INVALID.", float(not is_invalid))
    return registry
