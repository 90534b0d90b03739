"""The service's own account of a replay: how full its batches were, and what was computed for nothing.

What enters are the lines of `/steps`; what leaves is a handful of figures for the manifest and the lines
themselves as a parquet file beside the rows. Knows no client-side stamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pyarrow as pa

from harness.results.record import Manifest, arrow_columns, write_table
from services.contract.status import StepLine
from services.contract.timings import StepRecord

STEP_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("repeat", pa.int32()),
        ("step", pa.int64()),
        *((name, kind) for name, kind in arrow_columns(StepRecord) if name != "step"),
    ]
)


@dataclass(frozen=True, slots=True)
class StepSummary:
    """`mean_batch_size` counts live rows a step; `dead_row_share` is dead rows of all rows computed."""

    num_steps: int
    mean_batch_size: float
    dead_row_share: float
    median_step_ms: float
    busy_s: float
    num_dropped: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise_steps(lines: Sequence[StepLine], num_dropped: int) -> StepSummary | None:
    """None where no step was logged."""
    if not lines:
        return None
    num_live = sum(line.num_rows for line in lines)
    num_dead = sum(line.num_dead_rows for line in lines)
    return StepSummary(
        num_steps=len(lines),
        mean_batch_size=fmean(line.num_rows for line in lines),
        dead_row_share=num_dead / max(1, num_live + num_dead),
        median_step_ms=median(line.duration_s for line in lines) * 1e3,
        busy_s=sum(line.duration_s for line in lines),
        num_dropped=num_dropped,
    )


def step_rows(lines: Sequence[StepLine], run_id: str, repeat: int) -> list[dict[str, Any]]:
    return [{"run_id": run_id, "repeat": repeat, **line.model_dump()} for line in lines]


def write_steps(path: Path, rows: list[dict[str, Any]], manifest: Manifest) -> None:
    write_table(path, pa.Table.from_pylist(rows, schema=STEP_SCHEMA), manifest)
