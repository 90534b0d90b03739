"""Parquet files with facts in their metadata, written whole and read with their checksums.

Every page has a checksum, and so have the facts. Damage to the pages costs the rows of one row group;
damage to the end of the file, where parquet keeps its index, costs all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from adapters.base import LabError
from harness.results.manifest import ComparisonManifest, Manifest, read_manifest
from harness.results.table_file import CRC_KEY, checksum

MANIFEST_KEY = b"lab.manifest"
READ_ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, OverflowError, MemoryError)
"""What pyarrow raises on damaged bytes; MemoryError is one of a length."""


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A file to read. Whatever goes wrong inside the block is an error of this file.

    Raises:
        LabError: there is no such file, it is not parquet, or the block failed.
    """
    check_there(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except LabError as error:
        raise LabError(f"{path} {error}") from error
    except READ_ERRORS as error:
        raise LabError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def manifest_of(file: pq.ParquetFile) -> Manifest:
    """
    Raises:
        LabError: the file carries none, or a damaged one; the message lacks the file's name.
    """
    metadata: dict[bytes, bytes] = file.schema_arrow.metadata or {}
    raw = metadata.get(MANIFEST_KEY)
    if raw is None:
        own = next((name for name in metadata if name.split(b".")[0] == b"lab"), None)
        if own is not None:
            raise LabError(
                "holds figures of the lab, but neither a run nor a comparison: read its rows with "
                f"pandas.read_parquet, and how they came about in the parquet metadata `{own.decode()}`"
            )
        raise LabError("carries no manifest: it was not written by this harness")
    if metadata.get(CRC_KEY, kept := checksum(raw, file.schema_arrow.names)) != kept:
        raise LabError("has a damaged manifest or index; pandas.read_parquet may still read its rows")
    try:
        return read_manifest(raw)
    except LabError as error:
        raise LabError(f"cannot be used: {error}") from error


def conform(table: pa.Table, schema: pa.Schema, required: Sequence[str]) -> pa.Table:
    """The columns of `schema`. Those that came later than the file are empty, those of later versions stay.

    Raises:
        LabError: one that every version has is missing.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    unknown = [name for name in table.column_names if name not in schema.names]
    if "step" in unknown and "request_id" in missing:
        raise LabError("holds the steps of a run, not its requests: name the file without .steps")
    if lacking := [name for name in required if name in missing]:
        raise LabError(f"is no result of this harness, or damaged: it has no column {lacking[0]}")
    for name in missing:
        table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
    columns = [table[field.name].cast(field.type) for field in schema]
    made = pa.table(columns, schema=schema)
    made.validate(full=True)
    for name in unknown:
        made = made.append_column(name, table[name])
    return made


def check_belongs(manifest: Manifest, rows: pa.Table) -> None:
    """
    Raises:
        LabError: the rows are of other runs than the manifest.
    """
    runs = manifest.runs if isinstance(manifest, ComparisonManifest) else [manifest]
    if isinstance(manifest, ComparisonManifest) and not {run.arm for run in runs} <= set(manifest.arms):
        raise LabError("has a damaged manifest: its list of arms leaves one out")
    for name, told in (("run_id", {run.run_id for run in runs}), ("arm", {run.arm for run in runs})):
        if other := set(rows[name].unique().to_pylist()) - told:
            raise LabError(f"holds rows that its manifest does not know: {name} {other.pop()}")


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def check_there(path: Path) -> None:
    """
    Raises:
        LabError: there is no such file.
    """
    if not path.is_file():
        raise LabError(f"there is no file {path}")
