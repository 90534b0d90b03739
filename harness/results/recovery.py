"""What is left of a killed or damaged run, as a result file that says what is missing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from adapters.base import LabError
from harness.results.manifest import ComparisonManifest, Manifest, RunManifest, Validity
from harness.results.parquet_file import (
    READ_ERRORS,
    check_belongs,
    conform,
    manifest_of,
    opened,
)
from harness.results.record import (
    JOURNAL_SUFFIX,
    REQUIRED,
    SCHEMA,
    JournalContent,
    read_journal,
    to_frame,
    write_parquet,
)
from harness.results.table_file import write_table
from harness.results.validity import judge


def recover(journal: Path) -> Path:
    """Write the parquet file that a killed run did not get to write; the journal stays.

    Raises:
        LabError: it is not a journal, its manifest is damaged, or the parquet file is there already.
    """
    if not journal.name.endswith(JOURNAL_SUFFIX):
        raise LabError(f"{journal} is not a journal: its name should end in {JOURNAL_SUFFIX}")
    path = _free(journal.with_name(journal.name.removesuffix(JOURNAL_SUFFIX) + ".parquet"), journal)
    content = read_journal(journal)
    if content.manifest is None:
        write_table(path, content.rows, b"lab", b'{"manifest": "damaged"}')
        raise LabError(
            f"{journal} has a damaged manifest, so no report can be made of it; its {len(content.rows)} "
            f"whole rows are now in {path}, for pandas.read_parquet"
        )
    _write(path, known_damage(content, journal), content.rows)
    return path


def recover_damaged(path: Path) -> Path:
    """Write what is whole of a damaged parquet file beside it; the file stays.

    Raises:
        LabError: it is not damaged or not parquet, nothing is left, or the file to write is there already.
    """
    written = _free(path.with_suffix(".recovered.parquet"), path)
    tables: list[pa.Table] = []
    with opened(path) as file:
        manifest = manifest_of(file)
        for group in range(file.num_row_groups):
            try:
                tables.append(conform(file.read_row_group(group), SCHEMA, REQUIRED))
            except READ_ERRORS:
                continue
        num_planned = file.metadata.num_rows
        table = pa.concat_tables([SCHEMA.empty_table(), *tables], promote_options="default")
        check_belongs(manifest, table)
        num_lost = num_planned - len(table)
        if not num_lost:
            raise LabError("is not damaged: leave --recover out")
        if not len(table):
            raise LabError("is damaged in all its parts")
    manifest.damage = f"{num_lost} of {num_planned} rows of {path} are damaged and left out"
    _write(written, manifest, table)
    return written


def known_damage(content: JournalContent, journal: Path) -> RunManifest:
    """The manifest of a journal, with a sentence on its damaged lines.

    Raises:
        LabError: it is damaged itself.
    """
    if content.manifest is None:
        raise LabError(
            f"{journal} has a damaged manifest; --recover saves its {len(content.rows)} whole rows"
        )
    if content.num_damaged:
        lines = "1 damaged line" if content.num_damaged == 1 else f"{content.num_damaged} damaged lines"
        content.manifest.damage = f"{lines} of {journal} passed over"
    return content.manifest


def _free(path: Path, source: Path) -> Path:
    if path.exists():
        raise LabError(f"{path} is already there; remove it first if {source.name} should be used instead")
    return path


def _write(path: Path, manifest: Manifest, table: pa.Table) -> None:
    if isinstance(manifest, ComparisonManifest):
        damage = (manifest.damage,) if manifest.damage else ()
        manifest.validity = Validity((*damage, *manifest.validity.invalid), manifest.validity.caution)
    else:
        manifest.validity = judge(to_frame(table), manifest)
    write_parquet(path, table, manifest)
