"""Rows of a measurement as a parquet file; its metadata says under `lab` what they were measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from harness.replay.machine import describe_host
from harness.results.parquet_file import write_table


def write_rows(frame: pd.DataFrame, path: Path, facts: dict[str, Any]) -> None:
    """Write or replace `path`; its folder is made."""
    content = json.dumps({**facts, "host": describe_host().model_dump()}, default=str)
    write_table(path, pa.Table.from_pandas(frame, preserve_index=False), b"lab", content.encode())
