"""The history as OpenMetrics with time stamps, for `promtool tsdb create-blocks-from openmetrics`.

The names and labels are those that the dashboards query. Seconds stand here, milliseconds in the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from harness.history.series import SHOWN, is_number, validity_number
from harness.results.metrics import METRICS

LABELS = ("strategy", "backend", "model", "load", "commit")
NAMES = {
    "output_tokens_per_s": ("lab_result_throughput_tokens_per_s", 1.0),
    "ttft_p50_ms": ("lab_result_ttft_p50_seconds", 1e-3),
    "ttft_p95_ms": ("lab_result_ttft_p95_seconds", 1e-3),
    "tpot_p50_ms": ("lab_result_tpot_p50_seconds", 1e-3),
    "itl_p99_ms": ("lab_result_itl_p99_seconds", 1e-3),
}
_WORDS = {figure.key: metric.description for metric in METRICS for figure in metric.figures}
_ENDS = {"value": "", "low": "_low", "high": "_high"}


def to_openmetrics(rows: pd.DataFrame) -> str:
    """Text of all families, each contiguous, the samples of a series in the order of time."""
    results = rows[(rows["kind"] == "result") & ~rows["is_old"]]
    compared = rows[rows["kind"] == "comparison"]
    lines: list[str] = []
    for metric in SHOWN:
        name, factor = NAMES[metric]
        own = results[results["metric"] == metric]
        for column, end in _ENDS.items():
            samples = _samples(own, column, LABELS, factor)
            lines += _family(name + end, _words(_WORDS[metric], column), samples)
    once = results.drop_duplicates(["entry_id", *LABELS])
    validity = [
        (_labels(row, LABELS), row["started_at"], validity_number(row["validity"])) for row in _dicts(once)
    ]
    lines += _family("lab_result_valid", "1 VALID, 0.5 CAUTION, 0 INVALID.", validity)
    ratios = compared.rename(columns={"strategy": "arm"})
    for column, end in _ENDS.items():
        samples = _samples(ratios, column, ("metric", "arm", "against"), 1.0)
        lines += _family("lab_comparison_ratio" + end, _words("Ratio to `against`.", column), samples)
    return "".join(f"{line}\n" for line in [*lines, "# EOF"])


_Sample = tuple[str, pd.Timestamp, float]


def _samples(rows: pd.DataFrame, column: str, labels: tuple[str, ...], factor: float) -> list[_Sample]:
    return [
        (_labels(row, labels), row["started_at"], row[column] * factor)
        for row in _dicts(rows)
        if is_number(row[column])
    ]


def _family(name: str, words: str, samples: list[_Sample]) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} gauge"
    # Of two samples of a series at one instant Prometheus takes none.
    for (labels, at), value in sorted({(labels, at): value for labels, at, value in samples}.items()):
        yield f"{name}{{{labels}}} {value:.9g} {at.timestamp():.3f}"


def _labels(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return ",".join(f'{name}="{_escaped(str(row[name]))}"' for name in names)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _words(words: str, column: str) -> str:
    return words if column == "value" else f"The {column} end of the 95% interval. {words}"


def _dicts(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]
