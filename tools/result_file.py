"""Rows of a measurement as a parquet file that says what they were measured on.

A frame, a path and facts enter; a file leaves whose metadata carries the facts and the host under `lab`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from harness.replay.machine import describe_host


def write_rows(frame: pd.DataFrame, path: Path, facts: dict[str, Any]) -> None:
    """Write or replace `path`; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    manifest = json.dumps({**facts, "host": describe_host()}, default=str)
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), "lab": manifest}), path)
