"""Rows on disk: a journal while the run goes on, parquet with the manifest in its metadata when it ends.

A killed harness loses no finished row: each is in the JSON-lines journal before the next is measured, and
`lab report --recover FILE` turns a journal into the parquet file that it would have become.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pandas as pd
import pyarrow as pa

from adapters.base import LabError
from harness.client.answer import INT32_LIMIT, Answer
from harness.results.formulas import RequestMetrics, request_metrics
from harness.results.line_file import LineFile, read_records
from harness.results.manifest import Manifest, RepeatEntry, RunManifest, parse_facts
from harness.results.output_dir import make_folder
from harness.results.parquet_file import (
    MANIFEST_KEY,
    check_belongs,
    check_there,
    conform,
    manifest_of,
    opened,
)
from harness.results.table_file import write_table
from services.contract.timings import SequenceTimings

JOURNAL_SUFFIX = ".journal.jsonl"


def arrow_columns(contract: type) -> list[tuple[str, pa.DataType]]:
    """The fields of a dataclass of `services.contract.timings` as columns."""
    kinds = {int: pa.int32(), float: pa.float64(), float | None: pa.float64()}
    return [(name, kinds[hint]) for name, hint in get_type_hints(contract).items()]


TIMING_COLUMNS = arrow_columns(SequenceTimings)

SCHEMA = pa.schema(
    [
        # which replay
        ("run_id", pa.string()),
        ("variant", pa.string()),
        ("arm", pa.string()),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("repeat", pa.int32()),
        # what was planned
        ("request_id", pa.string()),
        ("prompt_id", pa.string()),
        ("schedule_index", pa.int32()),
        ("offset_s", pa.float64()),
        ("max_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("user", pa.string()),
        ("priority", pa.int32()),
        # what happened
        ("group_id", pa.int32()),
        ("group_size", pa.int32()),
        ("body_sha256", pa.string()),
        ("scheduled_s", pa.float64()),
        ("sent_s", pa.float64()),
        ("written_s", pa.float64()),
        ("chunk_s", pa.list_(pa.float64())),
        ("chunk_tokens", pa.list_(pa.int32())),
        ("finish_s", pa.float64()),
        # what follows from it
        ("ttft_ms", pa.float64()),
        ("ttft_sched_ms", pa.float64()),
        ("tokens_per_sec", pa.float64()),
        ("tpot_ms", pa.float64()),
        ("total_ms", pa.float64()),
        ("total_sched_ms", pa.float64()),
        # what the server said
        ("num_prompt_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        ("output_sha256", pa.string()),
        ("text_sha256", pa.string()),
        ("output_token_ids", pa.list_(pa.int32())),
        ("server_request_id", pa.string()),
        *TIMING_COLUMNS,
    ]
)

REQUIRED = (
    *("run_id", "arm", "repeat", "request_id", "prompt_id", "schedule_index", "max_tokens", "seed"),
    *("scheduled_s", "sent_s", "chunk_s", "finish_s", "num_output_tokens", "error"),
)
"""What no figure and no verdict does without; files of earlier versions may lack others."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReplayLabels:
    """What the rows of one replay have in common."""

    run_id: str
    variant: str
    arm: str
    backend: str
    model: str
    repeat: int


def make_row(labels: ReplayLabels, answer: Answer) -> Row:
    """One row of `SCHEMA` from a completed answer. A failed one keeps its stamps and has no metrics."""
    planned = answer.planned
    metrics = RequestMetrics()
    chunk_tokens = answer.chunk_tokens if answer.has_token_ids else None
    if answer.error is None and answer.sent_s is not None and answer.num_output_tokens is not None:
        metrics = request_metrics(
            scheduled_s=answer.scheduled_s,
            sent_s=answer.sent_s,
            chunk_s=answer.chunk_s,
            chunk_tokens=chunk_tokens,
            num_output_tokens=answer.num_output_tokens,
        )
    has_ids = answer.has_token_ids and max(answer.token_ids, default=0) < INT32_LIMIT
    return {
        **asdict(labels),
        **asdict(metrics),
        **{name: answer.timings.get(name) for name, _ in TIMING_COLUMNS},
        "request_id": f"{labels.run_id}-{labels.repeat}-{planned.index:05d}",
        "prompt_id": planned.prompt_id,
        "schedule_index": planned.index,
        "offset_s": planned.offset_s,
        "max_tokens": planned.max_tokens,
        "seed": planned.seed,
        "user": planned.user,
        "priority": planned.priority,
        "group_id": answer.group_id,
        "group_size": answer.group_size,
        "body_sha256": answer.body_sha256,
        "scheduled_s": answer.scheduled_s,
        "sent_s": answer.sent_s,
        "written_s": answer.written_s,
        "chunk_s": answer.chunk_s,
        "chunk_tokens": chunk_tokens,
        "finish_s": answer.finish_s,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_output_tokens": answer.num_output_tokens,
        "num_cached_tokens": answer.num_cached_tokens,
        "finish_reason": answer.finish_reason,
        "error": answer.error,
        "output_sha256": answer.output_sha256,
        "text_sha256": answer.text_sha256,
        "output_token_ids": answer.token_ids if has_ids else None,
        "server_request_id": answer.server_request_id,
    }


class Journal:
    """The rows of a run that goes on, behind its manifest. A kill loses nothing that was appended.

    A row that the disk did not take is kept, and tried again by `flush`.
    """

    def __init__(self, path: Path, manifest: RunManifest) -> None:
        self.path = path
        self.num_rows = 0
        make_folder(path.parent)
        self._unwritten: list[Row] = []
        self._file = LineFile(path, is_new=True)
        try:
            self._file.append("manifest", manifest.to_json())
        except LabError:
            self.remove()
            raise

    def append(self, row: Row) -> None:
        """
        Raises:
            LabError: the disk took no more.
        """
        self._unwritten.append(row)
        self.flush()

    def append_repeat(self, entry: RepeatEntry) -> None:
        """
        Raises:
            LabError: the disk took no more.
        """
        self._file.append("repeat", entry.to_json())

    def flush(self) -> None:
        """Write what could not be written before.

        Raises:
            LabError: the disk took no more.
        """
        while self._unwritten:
            self._file.append("row", json.dumps(self._unwritten[0], separators=(",", ":")).encode())
            del self._unwritten[0]
            self.num_rows += 1

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Close the file and delete it: its rows are elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)


class JournalContent(NamedTuple):
    """`manifest` is None where its line is damaged; `num_damaged` counts lines."""

    manifest: RunManifest | None
    rows: pa.Table
    num_damaged: int


def read_journal(path: Path) -> JournalContent:
    """Read every record that is whole, and each row once.

    Raises:
        LabError: there is no such file, or it was not written by this harness.
    """
    check_there(path)
    manifest: RunManifest | None = None
    repeats: list[RepeatEntry] = []
    found: dict[str, Row] = {}
    records, num_damaged = read_records(path)
    problem = "it does not begin with a manifest"
    for kind, content in records:
        try:
            if kind == "manifest":
                manifest = parse_facts(RunManifest, content)
            elif kind == "repeat":
                repeats.append(parse_facts(RepeatEntry, content))
            elif kind == "row":
                found.setdefault(str(content["request_id"]), content)
        except (LabError, LookupError, TypeError) as error:
            num_damaged += 1
            problem = str(error) if isinstance(error, LabError) else problem
    rows = list(found.values())
    table = _table_of_sound(rows)
    if manifest is not None:
        manifest.repeats += repeats
    elif not len(table):
        raise LabError(f"{path} is not a journal of this harness: {problem}")
    return JournalContent(manifest, table, num_damaged + len(rows) - len(table))


def _table_of_sound(rows: list[Row]) -> pa.Table:
    """Rows of earlier versions carry no checksum: what damage made of them need not fit the columns."""
    try:
        table = make_table(rows)
        if not table["request_id"].null_count:
            return table
    except (pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
        pass
    half = len(rows) // 2
    if not half:
        return SCHEMA.empty_table()
    return pa.concat_tables([_table_of_sound(rows[:half]), _table_of_sound(rows[half:])])


def make_table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Counts that may be missing stay integers."""
    nullable = {pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}
    frame: pd.DataFrame = table.to_pandas(types_mapper=nullable.get)
    return frame


def write_parquet(path: Path, table: pa.Table, manifest: Manifest) -> None:
    write_table(path, table, MANIFEST_KEY, manifest.to_json())


def read_parquet(path: Path) -> tuple[Manifest, pd.DataFrame]:
    """Read a file of this harness back.

    Raises:
        LabError: there is no such file, it is not parquet, damaged, or no result of this harness.
    """
    with opened(path) as file:
        manifest, table = manifest_of(file), conform(file.read(), SCHEMA, REQUIRED)
        check_belongs(manifest, table)
    return manifest, to_frame(table)


def read_table(path: Path) -> pa.Table:
    """The rows alone, as they stand in the file.

    Raises:
        LabError: as for `read_parquet`.
    """
    with opened(path) as file:
        return conform(file.read(), SCHEMA, REQUIRED)
