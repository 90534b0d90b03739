"""A table on disk, with facts in its metadata; needs no package but pyarrow."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_table(path: Path, table: pa.Table, key: bytes, facts: bytes) -> None:
    """Write a table with facts in its metadata; the file appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**(table.schema.metadata or {}), key: facts}
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd")
    os.replace(partial, path)
