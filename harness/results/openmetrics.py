"""The summary of a run for Prometheus: a file in OpenMetrics text, and a Pushgateway where one is named.

A gateway that does not answer costs a warning, never the run.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from prometheus_client import CollectorRegistry, Gauge, pushadd_to_gateway
from prometheus_client.openmetrics.exposition import generate_latest

from harness.results.manifest import RunManifest
from harness.results.metrics import throughput
from harness.results.stats import percentile
from harness.settings import ReportSettings

LABELS = ("variant", "backend", "model", "arm")
JOB = "batching_lab"


def write_openmetrics(path: Path, rows: pd.DataFrame, manifest: RunManifest) -> Path:
    """Write the file beside `path` and return where it is."""
    registry = summary_of(rows, manifest)
    written = path.with_suffix(".om")
    written.write_bytes(generate_latest(registry))  # type: ignore[no-untyped-call]
    return written


def push(rows: pd.DataFrame, manifest: RunManifest) -> str | None:
    """Push to PUSHGATEWAY_URL, if set; returns what went wrong."""
    url = ReportSettings().pushgateway_url
    if not url:
        return None
    grouping = {"variant": manifest.variant, "arm": manifest.arm}
    try:
        pushadd_to_gateway(url, JOB, summary_of(rows, manifest), grouping_key=grouping, timeout=5)
    except (OSError, ValueError) as error:
        return f"the summary could not be pushed to {url}: {error}"
    return None


def summary_of(rows: pd.DataFrame, manifest: RunManifest) -> CollectorRegistry:
    """Gauges of one run; a percentile with too few samples behind it is left out."""
    registry = CollectorRegistry()
    backend = manifest.service.backend if manifest.service else "external"
    values = (manifest.variant, backend, manifest.model, manifest.arm)

    def gauge(name: str, words: str, value: float | None, **extra: str) -> None:
        if value is None:
            return
        found = gauges.get(name)
        if found is None:
            found = gauges[name] = Gauge(name, words, (*LABELS, *extra), registry=registry)
        found.labels(*values, *extra.values()).set(value)

    gauges: dict[str, Gauge] = {}
    is_open = manifest.schedule.load.is_open
    rates = [rate for _, part in rows.groupby("repeat") if (rate := throughput(part, is_open=is_open))]
    for rate in rates[:1]:
        gauge("lab_run_output_tokens_per_second", "Output tokens a second.", rate.output_tokens_per_s)
    done = rows[rows["error"].isna()]
    for column, name, words in (
        ("ttft_sched_ms", "lab_run_ttft_seconds", "Time to first token, from schedule."),
        ("tpot_ms", "lab_run_tpot_seconds", "Time per output token after the first."),
        ("total_sched_ms", "lab_run_total_seconds", "Whole answer, from schedule."),
    ):
        for q in (50, 95, 99):
            found = percentile(done[column].to_numpy(dtype=float), q).value
            gauge(name, words, None if found is None else found / 1e3, quantile=f"0.{q}")
    gauge("lab_run_requests", "Requests of the run.", float(len(rows)))
    gauge("lab_run_failed_requests", "Requests that failed.", float(len(rows) - len(done)))
    is_invalid = manifest.validity is not None and bool(manifest.validity.invalid)
    gauge("lab_run_is_valid", "1 unless the run is INVALID.", float(not is_invalid))
    return registry
