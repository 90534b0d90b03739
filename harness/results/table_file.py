"""A table on disk, with facts in its metadata and checksums over both; needs no package but pyarrow."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness.results.output_dir import whole_file

CRC_KEY = b"facts.crc32"
_ROWS_A_GROUP = 128
"""Smaller groups lose fewer rows to a damaged byte. At 128 a file of 768 rows is 10% larger than in one."""


def write_table(path: Path, table: pa.Table, key: bytes, facts: bytes) -> None:
    """Write a table with facts in its metadata.

    Raises:
        LabError: the disk does not take it.
    """
    metadata = {**(table.schema.metadata or {}), key: facts, CRC_KEY: checksum(facts, table.column_names)}
    with whole_file(path) as file:
        pq.write_table(
            table.replace_schema_metadata(metadata),
            file,
            compression="zstd",
            row_group_size=_ROWS_A_GROUP,
            write_page_checksum=True,
        )


def checksum(facts: bytes, columns: Sequence[str]) -> bytes:
    return b"%08x" % zlib.crc32("\n".join(columns).encode(errors="replace"), zlib.crc32(facts))
