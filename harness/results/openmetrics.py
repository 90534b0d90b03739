"""The summary of a run for Prometheus: a file in OpenMetrics text, and a Pushgateway where one is named.

The file is `<file>.om` beside the parquet; PUSHGATEWAY_URL names the gateway. One that does not answer
costs a warning, never the run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
from prometheus_client import CollectorRegistry, Gauge, pushadd_to_gateway
from prometheus_client.openmetrics.exposition import generate_latest

from harness.results.metrics import METRICS
from harness.results.record import Manifest
from harness.results.validity import load_of

LABELS = ("variant", "backend", "model", "arm")
JOB = "batching_lab"
_UNITS = {"ms": ("seconds", 1e-3), "per_s": ("per_second", 1.0)}
"""Prometheus has base units only; one that is not here keeps its name."""


def write_openmetrics(path: Path, rows: pd.DataFrame, manifest: Manifest) -> Path:
    """Write the file beside `path` and return where it is."""
    registry = summary_of(rows, manifest)
    written = path.with_suffix(".om")
    written.write_bytes(generate_latest(registry))  # type: ignore[no-untyped-call]
    return written


def push(rows: pd.DataFrame, manifest: Manifest) -> str | None:
    """Push to PUSHGATEWAY_URL, if set; returns what went wrong."""
    url = os.environ.get("PUSHGATEWAY_URL")
    if not url:
        return None
    grouping = {"variant": str(manifest["variant"]), "arm": str(manifest["arm"])}
    try:
        pushadd_to_gateway(url, JOB, summary_of(rows, manifest), grouping_key=grouping, timeout=5)
    except (OSError, ValueError) as error:
        return f"the summary could not be pushed to {url}: {error}"
    return None


def summary_of(rows: pd.DataFrame, manifest: Manifest) -> CollectorRegistry:
    """Gauges of one run; a percentile with too few samples behind it is left out."""
    registry = CollectorRegistry()
    service = manifest["service"] or {}
    values = (manifest["variant"], service.get("backend", "external"), manifest["model"], manifest["arm"])

    def gauge(name: str, words: str, value: float | None, factor: float = 1.0, **extra: str) -> None:
        if value is None:
            return
        found = gauges.get(name)
        if found is None:
            found = gauges[name] = Gauge(name, words, (*LABELS, *extra), registry=registry)
        found.labels(*map(str, values), *extra.values()).set(value * factor)

    gauges: dict[str, Gauge] = {}
    is_open = load_of(manifest).is_open
    for metric in METRICS:
        unit, factor = _UNITS.get(metric.unit, (metric.unit, 1.0))
        name = "_".join(filter(None, ("lab_run", metric.name, unit)))
        for figure in metric.figures:
            extra = {} if figure.q is None else {"quantile": f"0.{figure.q}"}
            gauge(name, metric.description, figure.over(rows, is_open), factor, **extra)
    gauge("lab_run_requests", "Requests of the run.", float(len(rows)))
    gauge("lab_run_failed_requests", "Requests that failed.", float(rows["error"].notna().sum()))
    level = (manifest["validity"] or {}).get("level")
    gauge("lab_run_is_valid", "1 unless the run is INVALID.", float(level != "INVALID"))
    return registry
