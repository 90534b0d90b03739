"""The history as OpenMetrics with time stamps, for `promtool tsdb create-blocks-from openmetrics`.

The names and labels are those that the dashboards query. Seconds stand here, milliseconds in the store. An
INVALID result is no value: it has `lab_result_valid` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pandas as pd
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector

from harness.history.series import GROUP, SHOWN, chained, is_number, validity_number
from harness.results.metrics import FIGURES

LABELS = ("strategy", *GROUP, "machine", "commit")
COMPARISON_LABELS = ("metric", "arm", "against", *GROUP)
CHAIN_LABELS = ("metric", "strategy", *GROUP, "commit")
NAMES = {
    "output_tokens_per_s": ("lab_result_throughput_tokens_per_s", 1.0),
    "ttft_p50_ms": ("lab_result_ttft_p50_seconds", 1e-3),
    "ttft_p95_ms": ("lab_result_ttft_p95_seconds", 1e-3),
    "tpot_p50_ms": ("lab_result_tpot_p50_seconds", 1e-3),
    "itl_p99_ms": ("lab_result_itl_p99_seconds", 1e-3),
}
_ENDS = {"value": "", "low": "_low", "high": "_high"}


def to_openmetrics(rows: pd.DataFrame) -> str:
    """Text of all families, each contiguous, the samples of a series in the order of time."""
    registry = CollectorRegistry()
    registry.register(_HistoryCollector(rows))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return text.decode()


class _HistoryCollector(Collector):
    def __init__(self, rows: pd.DataFrame) -> None:
        self._rows = rows

    def collect(self) -> Iterator[Metric]:
        rows = self._rows
        counts = rows["validity"] != "INVALID"
        is_result = (rows["kind"] == "result") & ~rows["is_old"]
        results, values = rows[is_result], rows[is_result & counts]
        for metric in SHOWN:
            name, factor = NAMES[metric]
            own = values[values["metric"] == metric]
            yield from _with_ends(name, FIGURES[metric].metric.description, own, LABELS, factor)
        once = results.drop_duplicates(["entry_id", *LABELS])
        valid = once["validity"].map(validity_number)
        yield _family("lab_result_valid", "1 VALID, 0.5 CAUTION, 0 INVALID.", once, LABELS, valid)
        compared = rows[(rows["kind"] == "comparison") & counts].rename(columns={"strategy": "arm"})
        yield from _with_ends("lab_comparison_ratio", "Ratio to `against`.", compared, COMPARISON_LABELS)
        words = "Level of a commit, chained from ratios measured in turns; the oldest commit is 1."
        yield from _with_ends("lab_chained_ratio", words, chained(rows), CHAIN_LABELS)


def _with_ends(
    name: str, words: str, rows: pd.DataFrame, labels: tuple[str, ...], factor: float = 1.0
) -> Iterator[Metric]:
    """The figure, and each end of its interval as a family of its own."""
    for column, end in _ENDS.items():
        about = words if column == "value" else f"The {column} end of the 95% interval. {words}"
        yield _family(name + end, about, rows, labels, rows[column] * factor)


def _family(
    name: str, words: str, rows: pd.DataFrame, labels: tuple[str, ...], values: Iterable[float]
) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    names = rows[list(labels)].fillna("").astype(str).itertuples(index=False)
    told = zip(names, rows["started_at"], values, strict=True)
    # Of two samples of a series at one instant Prometheus takes none.
    samples = {(tuple(who), at.timestamp()): value for who, at, value in told if is_number(value)}
    for (who, at_s), value in sorted(samples.items()):
        family.add_metric(who, value, timestamp=at_s)
    return family
