"""The service's own account of a replay: how full its batches were, and what was computed for nothing.

The lines of `/steps` become a parquet file beside the rows, and a few figures in the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas as pd
import pyarrow as pa

from harness.results.manifest import RunManifest, StepSummary
from harness.results.parquet_file import conform, opened
from harness.results.record import arrow_columns, write_parquet
from services.contract.status import StepLine
from services.contract.timings import StepRecord

STEPS_SUFFIX = ".steps.parquet"
STEP_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("repeat", pa.int32()),
        ("step", pa.int64()),
        *(
            (name, pa.int64() if "context" in name else kind)  # tokens times context
            for name, kind in arrow_columns(StepRecord)
            if name != "step"
        ),
    ]
)
_REQUIRED = ("run_id", "repeat", "start_s", "duration_s", "num_rows", "num_dead_rows")


def summarise_steps(lines: Sequence[StepRecord], num_dropped: int) -> StepSummary | None:
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


def write_steps(path: Path, rows: list[dict[str, Any]], manifest: RunManifest) -> None:
    write_parquet(path, pa.Table.from_pylist(rows, schema=STEP_SCHEMA), manifest)


def read_steps(path: Path) -> pd.DataFrame:
    """
    Raises:
        LabError: it is no step log, or damaged.
    """
    with opened(path) as file:
        frame: pd.DataFrame = conform(file.read(), STEP_SCHEMA, _REQUIRED).to_pandas()
        return frame
